// Elements are made here and nowhere else: text is always text, never markup, whoever wrote it.

import { plain, t } from "./language.js";

function append(parent, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false && child !== "") parent.append(child);
  }
}

/** An element. Functions among the attributes are listeners; false and null leave one out. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  append(made, children);
  return made;
}

/** An element alone; whether the user has opened it does not count. */
function shell(node) {
  const bare = node.cloneNode(false);
  if (bare.localName) bare.removeAttribute("open");
  return bare;
}

/** Changes what differs and nothing else. */
function settle(old, fresh) {
  const before = [...old.childNodes];
  const after = [...fresh.childNodes];
  after.forEach((node, at) => {
    const was = before[at];
    if (!was) old.append(node);
    else if (was.isEqualNode(node)) return;
    else if (was.localName && shell(was).isEqualNode(shell(node))) settle(was, node);
    else was.replaceWith(node);
  });
  for (const node of before.slice(after.length)) node.remove();
}

/** Gives an element other children: what stays the same keeps the focus, and stays open where the user opened it. */
export function fill(parent, ...children) {
  const fresh = parent.cloneNode(false);
  append(fresh, children);
  settle(parent, fresh);
}

/** What a person or another program has named, apart from the direction of what is around it. */
export const named = (text, attributes = {}) => element("bdi", attributes, plain(text));

/** A list that follows data: what stays keeps its element, and with it the focus and what was typed. */
export function follow(list, items, key, make) {
  const before = list.kept ?? new Map();
  const rows = new Map();
  for (const item of items) {
    const row = before.get(key(item)) ?? make(item);
    row.update(item);
    rows.set(key(item), row);
  }
  for (const [id, row] of before) if (!rows.has(id)) row.element.remove();
  let at = list.firstElementChild;
  for (const row of rows.values()) {
    if (row.element === at) at = at.nextElementSibling;
    else list.insertBefore(row.element, at);
  }
  list.kept = rows;
}

/** Tells those who do not see it what happened. */
export function announce(text, urgent = false) {
  const region = document.getElementById(urgent ? "alerts" : "news");
  // The same words again would not be read.
  region.textContent = region.textContent === text ? `${text}\u00a0` : text;
}

/** Moves the focus to something that is no control. */
export function look(at) {
  at.setAttribute("tabindex", "-1");
  at.focus();
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without TLS there is no clipboard: the old way, by a selection.
    const field = element("textarea", { class: "unseen", readonly: true, "aria-hidden": "true", tabindex: "-1" });
    field.value = text;
    const back = document.activeElement;
    (back?.closest("dialog") ?? document.body).append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    back?.focus();
    if (!done) throw new Error("no clipboard");
  }
}

/** A button that copies a reference. */
export function copier(text) {
  const button = element("button", { type: "button", class: "quiet", "aria-label": t("copy.what", { what: text }) }, t("copy"));
  button.addEventListener("click", async () => {
    try {
      await copy(text);
      button.textContent = t("copied");
      announce(t("copied.what", { what: text }));
      setTimeout(() => { button.textContent = t("copy"); }, 2000);
    } catch {
      announce(t("copy.failed"), true);
    }
  });
  return button;
}

/** A reference with its button. */
export const reference = (text) =>
  element("div", { class: "reference" }, element("code", { dir: "ltr" }, plain(text)), copier(text));

/** Asks; true when the answer is `yes`. The focus begins on the harmless answer. */
export function ask(title, body, yes, keep = t("keep")) {
  return new Promise((answer) => {
    const no = element("button", { type: "button", autofocus: true }, keep);
    const go = element("button", { type: "button", class: "danger" }, yes);
    const dialog = element("dialog", { "aria-labelledby": "question", "aria-describedby": "consequence" },
      element("h2", { id: "question" }, title),
      element("div", { id: "consequence" }, body),
      element("div", { class: "answers" }, no, go));
    no.addEventListener("click", () => dialog.close());
    go.addEventListener("click", () => dialog.close("yes"));
    dialog.addEventListener("close", () => {
      dialog.remove();
      answer(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** What went wrong, in the reader's language, and below it what the server said. */
export const problem = (title, advice, said) =>
  element("div", { class: "problem" },
    element("p", {}, element("strong", {}, title), advice ? [" ", advice] : null),
    said ? element("details", {}, element("summary", {}, t("said")), element("p", { lang: "en" }, named(said))) : null);

/** Terms with what they mean; those without are left out. */
export const facts = (...pairs) =>
  element("dl", {}, pairs.filter(([, value]) => value).map(([term, value]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, value))));
