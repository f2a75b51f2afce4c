// Whether a session is saved by itself, at intervals and when it ends, who has set that, and the choices.

import { Lost, Refused, get, insist, path } from "./api.js";
import { announce, element, fill, named } from "./element.js";
import { duration, when } from "./format.js";
import { sentence, t } from "./language.js";
import { words } from "./saves.js";

const OFF = "off";
// Minutes.
const EVERY = [15, 30, 60, 240];
const MOST = 100;

const option = (value) => element("option", { value }, value === OFF ? t("autosave.off") : t("autosave.every", { time: duration(60 * Number(value)) }));

/** Does something with the server, and says what is wrong where it fails. */
async function guarded(error, work) {
  fill(error);
  try {
    await work();
  } catch (caught) {
    if (!(caught instanceof Lost || caught instanceof Refused)) throw caught;
    fill(error, words(caught).join(" "));
    announce(words(caught).join(" "), true);
  }
}

const spans = (texts) => texts.filter(Boolean).map((part) => element("span", {}, part));

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

  const show = (policy, from) => {
    const value = policy ? String(policy.every_minutes) : OFF;
    const values = [OFF, ...new Set([...EVERY, ...(policy ? [policy.every_minutes] : [])])].map(String);
    const sorted = values.sort((a, b) => (a === OFF ? -1 : b === OFF ? 1 : a - b));
    fill(select, sorted.map(option));
    select.value = value;
    number.hidden = !policy;
    if (document.activeElement !== keep) keep.value = policy ? String(policy.keep) : "";
    fill(why, spans([
      policy ? null : t("autosave.none"),
      from ? t(`autosave.from.${from}`) : null,
      policy ? t("autosave.if") : null,
      policy?.last ? sentence("autosave.last", { time: when(policy.last) }) : null,
      policy?.waits_for ? sentence("autosave.waits", { reason: named(policy.waits_for, { lang: "en" }) }) : null,
    ]));
    clear.hidden = from !== "session";
  };

  const send = async (method, body, said) => {
    busy = true;
    await guarded(error, async () => {
      const now = await insist(method, path("sessions", first.id, "autosave"), { body });
      show(now.autosave, now.from);
      announce(said);
    });
    busy = false;
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
      if (!block.hidden && !busy && document.activeElement !== select) show(session.autosave, session.autosave_from);
    },
  };
}

// Without a choice, the pod or the administrator decides.
const UNSET = "";

/** The setting of the user for the end of all own sessions, and what applies to this one. */
export function atEnd(first, me) {
  const id = `s-${first.id}-end`;
  const select = element("select", { id, "aria-describedby": `${id}-why` },
    [UNSET, "never", "failure", "always"].map((value) => element("option", { value }, t(`end.${value || "unset"}`))));
  const why = element("p", { class: "dim", id: `${id}-why` });
  const error = element("p", { class: "wrong" });
  const block = element("div", { class: "end" }, element("div", { class: "field" }, element("label", { for: id }, t("end")), select), why, error);
  let session = first;
  let own = UNSET;
  let busy = false;

  const draw = () => {
    const now = session.save_on_end;
    select.value = own;
    fill(why, spans([t("end.all"), now && now.from !== "user" ? t(`end.from.${now.from}`, { what: t(`end.${now.when}`) }) : null]));
  };
  const take = (settings) => {
    own = settings.own?.save_on_end ?? UNSET;
  };
  select.addEventListener("change", async () => {
    const wanted = select.value;
    busy = true;
    await guarded(error, async () => {
      // What is set about autosaves stays.
      const { save_on_end: _, ...rest } = (await get("autosave")).own ?? {};
      const body = wanted === UNSET ? rest : { ...rest, save_on_end: wanted };
      take(await (Object.keys(body).length ? insist("PUT", "autosave", { body }) : insist("DELETE", "autosave")));
      // What applies to this session is in the next list.
      if (session.save_on_end?.from !== "pod") session = { ...session, save_on_end: null };
      announce(t("end.said"));
    });
    busy = false;
    draw();
  });

  return {
    element: block,
    load: () => block.hidden || guarded(error, async () => {
      take(await get("autosave"));
      // What is being chosen is not taken away.
      if (document.activeElement !== select) draw();
    }),
    update(now) {
      block.hidden = !now.owner || now.owner !== me.user || Boolean(now.ended);
      session = now;
      const from = now.save_on_end?.from;
      if (busy || document.activeElement === select) return;
      if (from === "user") own = now.save_on_end.when;
      if (from === "administrator") own = UNSET;
      draw();
    },
  };
}
