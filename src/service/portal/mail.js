// E-mail when a save ends: what is set for all saves, and a box for one save.

import { insist } from "./api.js";
import { announce, element, fill, named } from "./element.js";
import { duration } from "./format.js";
import { language, sentence, t } from "./language.js";
import { words } from "./saves.js";

const NEVER = "never";
// Seconds that a save has to take.
const OVER = [0, 60, 600, 3600];

const changes = new EventTarget();
const over = (me) => me.email.over_seconds ?? null;

const option = (value) => element("option", { value },
  value === NEVER ? t("mail.never") : Number(value) === 0 ? t("mail.always") : t("mail.over", { time: duration(Number(value)) }));

/** Which of all saves an e-mail tells of; nothing where none is sent. */
export function setting(me) {
  if (!me.email) return null;
  const own = over(me) ?? NEVER;
  const values = [NEVER, ...OVER];
  if (!values.includes(own)) values.push(own);
  const select = element("select", { id: "mail" }, values.map((value) => option(String(value))));
  select.value = String(own);
  const error = element("p", { class: "wrong" });
  select.addEventListener("change", async () => {
    const wanted = select.value === NEVER ? null : Number(select.value);
    fill(error);
    try {
      me.email = await insist("PUT", "notify/email", { body: { over_seconds: wanted, language } });
      announce(t("mail.set"));
    } catch (caught) {
      fill(error, words(caught).join(" "));
      select.value = String(over(me) ?? NEVER);
    }
    changes.dispatchEvent(new Event("change"));
  });
  return element("div", { class: "field mail" }, element("label", { for: "mail" }, sentence("mail.all", { address: named(me.email.address) })), select, error);
}

/** A box for one save; as long as it is not touched, what is set for all saves applies. */
export function box(id, me, signal) {
  if (!me.email) return { element: null, rest: () => ({}), reset() {} };
  const input = element("input", { type: "checkbox", id });
  let touched = false;
  const show = () => {
    if (touched) return;
    input.checked = over(me) === 0;
    input.indeterminate = over(me) > 0;
  };
  input.addEventListener("change", () => { touched = true; });
  changes.addEventListener("change", show, { signal });
  show();
  return {
    element: element("div", { class: "check" }, input, element("label", { for: id }, sentence("mail.one", { address: named(me.email.address) }))),
    rest: () => (touched ? { notify: { email: input.checked, language } } : {}),
    reset() {
      touched = false;
      show();
    },
  };
}
