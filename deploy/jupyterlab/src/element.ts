// Elements of the page. Every text is text: nothing is parsed as markup.

type Child = Node | string | null | undefined;

/** Makes an element with attributes and children. */
export function element<K extends keyof HTMLElementTagNameMap>(
  name: K,
  attributes: Record<string, string | boolean> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) {
      made.setAttribute(key, '');
    } else if (value !== false) {
      made.setAttribute(key, value);
    }
  }
  made.append(...children.filter((child): child is Node | string => child !== null && child !== undefined && child !== ''));
  return made;
}

/** Makes a button. */
export function button(text: string, kind: string, press: () => void): HTMLButtonElement {
  const made = element('button', { type: 'button', class: `jp-upperdeck-button ${kind}` }, text);
  made.addEventListener('click', press);
  return made;
}

/** Shows what a stranger may have written: characters that reorder or hide text become escapes. */
export const plain = (text: string): string =>
  text.replace(/[\p{Cc}\p{Cf}]/gu, char => `\\u${(char.codePointAt(0) ?? 0).toString(16).padStart(4, '0')}`);

/** Shows a reference with the beginning of its digest, which is what people compare. */
export const reference = (text: string): string => plain(text).replace(/(@sha256:[0-9a-f]{12})[0-9a-f]{52}$/, '$1…');
