// Whether a session is saved by itself at intervals, who has set that, and the choice for this session.

import { Lost, Refused, insist, path } from "./api.js";
import { announce, element, fill, named } from "./element.js";
import { duration, when } from "./format.js";
import { sentence, t } from "./language.js";
import { words } from "./saves.js";

const OFF = "off";
// Minutes.
const EVERY = [15, 30, 60, 240];
const MOST = 100;

const option = (value) => element("option", { value }, value === OFF ? t("autosave.off") : t("autosave.every", { time: duration(60 * Number(value)) }));

/** The setting of a session; nothing where the server has none. */
export function autosave(first) {
  const id = `s-${first.id}-a`;
  const select = element("select", { id: `${id}-e`, "aria-describedby": `${id}-why` });
  const keep = element("input", { id: `${id}-k`, type: "number", min: "1", max: String(MOST), step: "1", inputmode: "numeric", autocomplete: "off" });
  const number = element("div", { class: "field" }, element("label", { for: keep.id }, t("autosave.keep")), keep);
  const why = element("p", { class: "dim", id: `${id}-why` });
  const error = element("p", { class: "wrong" });
  const clear = element("button", { type: "button", class: "quiet" }, t("autosave.clear"));
  const block = element("div", { class: "autosave" },
    element("div", { class: "pair" }, element("div", { class: "field" }, element("label", { for: select.id }, t("autosave")), select), number), why, clear, error);
  let busy = false;

  const show = (policy) => {
    const value = policy ? String(policy.every_minutes) : OFF;
    const values = [OFF, ...new Set([...EVERY, ...(policy ? [policy.every_minutes] : [])])].map(String);
    const sorted = values.sort((a, b) => (a === OFF ? -1 : b === OFF ? 1 : a - b));
    fill(select, sorted.map(option));
    select.value = value;
    number.hidden = !policy;
    if (document.activeElement !== keep) keep.value = policy ? String(policy.keep) : "";
    fill(why, [
      policy ? t(`autosave.from.${policy.from}`) : t("autosave.none"),
      policy ? t("autosave.if") : null,
      policy?.last ? sentence("autosave.last", { time: when(policy.last) }) : null,
      policy?.waits_for ? sentence("autosave.waits", { reason: named(policy.waits_for, { lang: "en" }) }) : null,
    ].filter(Boolean).map((part) => element("span", {}, part)));
    clear.hidden = Boolean(policy) && policy.from !== "session";
  };

  const send = async (method, body, said) => {
    busy = true;
    fill(error);
    try {
      show((await insist(method, path("sessions", first.id, "autosave"), { body })).autosave);
      announce(said);
    } catch (caught) {
      if (!(caught instanceof Lost || caught instanceof Refused)) throw caught;
      fill(error, words(caught).join(" "));
      announce(words(caught).join(" "), true);
    } finally {
      busy = false;
    }
  };
  const set = () => {
    // Without a number, the server has one.
    const wanted = Math.round(Number(keep.value));
    const kept = keep.value && wanted ? { keep: Math.min(MOST, Math.max(1, wanted)) } : {};
    const body = select.value === OFF ? { off: true } : { every_minutes: Number(select.value), ...kept };
    send("PUT", body, t(select.value === OFF ? "autosave.said.off" : "autosave.said"));
  };
  select.addEventListener("change", set);
  keep.addEventListener("change", set);
  clear.addEventListener("click", () => {
    select.focus();
    send("DELETE", undefined, t("autosave.said.clear"));
  });

  return {
    element: block,
    update(session) {
      block.hidden = !("autosave" in session) || !session.owner || Boolean(session.ended);
      // What is being chosen is not taken away.
      if (!block.hidden && !busy && document.activeElement !== select) show(session.autosave);
    },
  };
}
