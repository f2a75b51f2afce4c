// The reader's language. To add one: a file in strings/, its code in the list here, its line in mod.rs.

const LANGUAGES = ["en", "ko"];

const wanted = navigator.languages.find((tag) => LANGUAGES.includes(tag.toLowerCase().split("-")[0]));
/** For numbers and times: the reader's region, too. */
export const locale = wanted ?? "en";
/** Code of the language. */
export const language = locale.toLowerCase().split("-")[0];

const { default: strings } = await import(`./strings/${language}.js`);
const plurals = new Intl.PluralRules(locale);
const numbers = new Intl.NumberFormat(locale);

/** What others wrote, with the characters that would reorder or hide what stands around them made visible. */
export const plain = (text) =>
  String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
    (found) => `⟨U+${found.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

// Scripts that run from right to left.
const LEFTWARD = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

/** What is put into a sentence keeps its direction to itself. */
function inside(value) {
  if (typeof value === "number") return numbers.format(value);
  const text = plain(value);
  return LEFTWARD.test(text) ? `\u2068${text}\u2069` : text;
}

/** Whether there are words for it. */
export const has = (key) => key in strings;

/** A sentence as a list of texts and of the elements that are among the values. `n` chooses the plural. */
export function sentence(key, values = {}) {
  const counted = typeof values.n === "number" ? `${key}.${plurals.select(values.n)}` : key;
  return (strings[counted] ?? strings[key] ?? key).split(/(\{\w+\})/).map((part) => {
    const value = /^\{\w+\}$/.test(part) ? values[part.slice(1, -1)] ?? "" : null;
    if (value === null) return part;
    return value instanceof Node ? value : inside(value);
  });
}

/** A sentence as text. */
export const t = (key, values) => sentence(key, values).join("");
