// Saves and how far they are: read once, then followed by the event stream; by asking where there is none.

import { Lost, Refused, address, call, get, insist, line, path } from "./api.js";
import { announce, ask, element, facts, fill, look, named, problem, reference } from "./element.js";
import { bytes, duration, left, milliseconds, percent } from "./format.js";
import { has, t } from "./language.js";

// Browsers open six connections to a host over HTTP/1.1, for all tabs: streams must leave room for calls.
const STREAMS = 2;
// A stream says something every 8 s. When it does not, the page asks; when it stays silent, it has been cut, and the browser
// does not know.
const QUIET = 10_000;
const CUT = 20_000;
// A clock that jumps: the machine has slept.
const SLEPT = 8_000;
const ASK_EVERY = 3_000;
const ASK_UNSEEN = 20_000;
const ASK_AT_ONCE = 3;

export const over = (save) => ["succeeded", "failed", "cancelled"].includes(save.state);
export const image = (save) => `${save.name}:${save.tag}`;

const known = new Map();
/** Tells `change` with a save. */
export const changes = new EventTarget();

/** Takes a save, whoever told it; an older one than is known changes nothing. */
export function take(save) {
  let entry = known.get(save.id);
  if (!entry) known.set(save.id, (entry = { save, heard: 0, asked: Date.now() }));
  else if (save.version < entry.save.version) return entry.save;
  else {
    const before = entry.save;
    entry.save = save.version === before.version ? settled(before, save) : save;
    tell(before, entry.save);
  }
  changes.dispatchEvent(new CustomEvent("change", { detail: entry.save }));
  follow();
  return entry.save;
}

/** Of the same version: an answer that was overtaken by an event does not turn the bar back. */
function settled(before, save) {
  const { progress } = before;
  const overtaken = progress && progress.bytes_total === save.progress?.bytes_total && progress.bytes_done > save.progress.bytes_done;
  return { ...save, progress: overtaken ? progress : save.progress, place: save.state === "queued" ? save.place ?? before.place : save.place };
}

export const latest = (id) => known.get(id)?.save;

/** Announces what is worth an interruption: the beginning of the transfer, quarters of it, the end. */
function tell(before, save) {
  const of = { image: image(save) };
  if (save.state !== before.state) {
    if (over(save)) announce(t(`news.${save.state}`, of), save.state === "failed");
    else if (save.state === "running") announce(t("news.running", of));
    return;
  }
  const quarter = (at) => (at.progress?.bytes_total ? Math.floor((4 * at.progress.bytes_done) / at.progress.bytes_total) : 0);
  if (quarter(save) > quarter(before) && quarter(save) < 4) announce(t("news.progress", { ...of, share: percent(quarter(save) / 4) }));
}

function close(entry) {
  entry.source?.close();
  entry.source = null;
}

function open(entry) {
  const { id } = entry.save;
  const source = new EventSource(address(`${path("saves", id)}/events`));
  entry.source = source;
  source.addEventListener("save", (event) => {
    entry.heard = Date.now();
    take(JSON.parse(event.data));
  });
  source.addEventListener("progress", (event) => {
    entry.heard = Date.now();
    take(JSON.parse(event.data));
  });
  source.addEventListener("error", () => {
    // The browser tries again by itself, from the last event on; it gives up when the answer is no stream.
    if (source.readyState === EventSource.CLOSED && entry.source === source) close(entry);
    if (Date.now() - entry.asked > 1000) lookAgain(entry);
  });
}

async function lookAgain(entry) {
  entry.asked = Date.now();
  try {
    take(await get(path("saves", entry.save.id)));
  } catch (error) {
    if (error instanceof Refused && error.status === 404) {
      close(entry);
      known.delete(entry.save.id);
    } else if (!(error instanceof Lost || error instanceof Refused)) throw error;
  }
}

/** Streams for those that are not over, as many as may be; for the others the clock below asks. */
function follow() {
  const going = [...known.values()].filter((entry) => {
    if (document.hidden || over(entry.save)) close(entry);
    return !over(entry.save);
  });
  let room = STREAMS - going.filter((entry) => entry.source).length;
  for (const entry of going) {
    if (document.hidden || room <= 0) break;
    if (!entry.source && Date.now() - (entry.opened ?? 0) > ASK_EVERY) {
      entry.opened = Date.now();
      open(entry);
      room -= 1;
    }
  }
}

let ticked = Date.now();
setInterval(() => {
  const now = Date.now();
  if (now - ticked > SLEPT) refresh();
  ticked = now;
  const every = document.hidden ? ASK_UNSEEN : ASK_EVERY;
  const due = [...known.values()].filter((entry) => {
    if (over(entry.save) || now - entry.heard <= QUIET) return false;
    if (entry.source && now - entry.opened > CUT) close(entry);
    return now - entry.asked > every;
  });
  // However many there are: the service has more to do than to answer one page.
  due.sort((a, b) => a.asked - b.asked).slice(0, ASK_AT_ONCE).forEach(lookAgain);
  follow();
  title();
}, 1000);

// After a closed lid or a lost line nothing that is shown may be old.
function refresh() {
  if (document.hidden) return follow();
  for (const entry of known.values()) {
    if (over(entry.save)) continue;
    close(entry);
    entry.opened = entry.asked = entry.heard = 0;
  }
  [...known.values()].filter((entry) => !over(entry.save)).slice(0, ASK_AT_ONCE).forEach(lookAgain);
}
document.addEventListener("visibilitychange", refresh);
window.addEventListener("online", refresh);
window.addEventListener("pageshow", (event) => { if (event.persisted) refresh(); });
line.addEventListener("back", refresh);
line.addEventListener("signed-out", () => {
  for (const entry of known.values()) close(entry);
  known.clear();
});

let finished = null;
changes.addEventListener("change", ({ detail: save }) => {
  if (document.hidden && over(save)) finished = save;
});
document.addEventListener("visibilitychange", () => { finished = null; title(); });

/** The tab's title says how far it is, for who looks at another tab. */
function title() {
  const running = [...known.values()].map((entry) => entry.save).filter((save) => !over(save) && save.progress?.bytes_total);
  const mark = finished ? { succeeded: "✓ ", failed: "✗ " }[finished.state] ?? "" :
    running.length === 1 ? `${percent(share(running[0]))} ` : "";
  const bare = document.body.dataset.title ?? "upperdeck";
  if (document.title !== mark + bare) document.title = mark + bare;
}

function share({ progress }) {
  return progress?.bytes_total ? Math.min(1, progress.bytes_done / progress.bytes_total) : 0;
}

async function cancel(save) {
  const yes = await ask(t("cancel.title", { image: image(save) }), element("p", {}, t("cancel.body")), t("cancel.yes"), t("cancel.no"));
  if (!yes) return;
  try {
    const answer = await insist("DELETE", path("saves", save.id));
    take(answer?.id ? answer : await get(path("saves", save.id)));
  } catch (error) {
    announce(error instanceof Refused && ["too_late", "conflict"].includes(error.code) ? t("cancel.late") : words(error).join(" "), true);
    await get(path("saves", save.id)).then(take, () => {});
  }
}

/** An error of a call, for people. */
export function words(error) {
  if (error instanceof Refused) {
    return [has(`error.${error.code}`) ? t(`error.${error.code}`) : t("error.internal"), error.message];
  }
  if (error instanceof Lost) return [t("error.lost"), ""];
  throw error;
}

export const trouble = (error) => problem(words(error)[0], "", words(error)[1]);

/** Why a save failed and what a researcher can do. */
export function failure(save) {
  const code = save.error?.code ?? "internal";
  const told = has(`failed.${code}`) ? code : "internal";
  return problem(t(`failed.${told}`), t(`advice.${told}`), save.error?.message);
}

/** What the user should know of a save that succeeded. */
const remarks = (save) => save.warnings?.length
  ? element("details", { class: "remarks" },
    element("summary", {}, t("warnings", { n: save.warnings.length })),
    element("ul", {}, save.warnings.map((warning) => element("li", { lang: "en" }, named(warning.message)))))
  : null;

/** What came of a save. */
export function outcome(save) {
  const { result } = save;
  if (save.state === "failed") return [failure(save), remarks(save)];
  if (save.state === "cancelled") return [element("p", {}, t("cancelled.body"))];
  const pause = result?.pause_ms ?? save.pause_ms;
  return [
    reference(save.target),
    facts(
      [t("fact.size"), result && t(result.delta ? "size.delta" : "size.full", { whole: bytes(result.image_bytes), layer: bytes(result.layer_bytes) })],
      [t("fact.pause"), pause !== null && pause !== undefined && milliseconds(pause)],
      [t("fact.took"), result && duration(result.seconds)],
      [t("fact.base"), result?.base_name && named(result.base_name)]),
    remarks(save)];
}

/** A save that is not over, as a block that keeps itself true: phase, bar, numbers, cancel. */
export function running(first) {
  const phase = element("strong", { class: "phase" });
  const portion = element("span", { class: "portion" });
  const label = element("div", { class: "over-bar" }, phase, portion);
  const bar = element("progress", { max: "1" });
  const numbers = element("p", { class: "numbers" });
  const stop = element("button", { type: "button", click: () => (latest(first.id)?.cancelling ? null : cancel(latest(first.id) ?? first)) }, t("cancel"));
  stop.setAttribute("aria-label", t("cancel.what", { image: image(first) }));
  const block = element("section", { class: "running", "aria-label": t("saving.what", { image: image(first) }) },
    label, bar, element("div", { class: "under-bar" }, numbers, stop));
  const update = (save) => {
    const { progress } = save;
    const moving = save.state === "running" && progress?.bytes_total > 0;
    fill(phase, t(save.cancelling ? "phase.cancelling" :
      save.state === "running" ? `phase.${save.phase ?? "locating"}` : `phase.${save.state}`));
    fill(portion, moving ? percent(share(save)) : "");
    bar.setAttribute("aria-label", t("saving.what", { image: image(save) }));
    if (moving) bar.value = share(save);
    else if (save.state === "running") bar.removeAttribute("value");
    else bar.value = 0;
    const said = [];
    if (save.state === "queued" && typeof save.place === "number") said.push(save.place ? t("place", { n: save.place }) : t("place.next"));
    if (moving) {
      said.push(t("of", { done: bytes(progress.bytes_done), all: bytes(progress.bytes_total) }));
      if (progress.rate) said.push(t("rate", { rate: bytes(progress.rate) }));
      if (progress.seconds_left !== null && progress.seconds_left !== undefined && share(save) < 1) said.push(t("left", { time: left(progress.seconds_left) }));
    }
    if (save.attempt > 1) said.push(t("attempt", { count: save.attempt }));
    fill(numbers, said.join(" · "));
    // Not `disabled`, which would drop the focus.
    if (save.cancelling) stop.setAttribute("aria-disabled", "true");
  };
  update(first);
  return { element: block, update, focus: () => look(block) };
}

/** One line that says how a save ended, with an icon that is not only a colour. */
export const verdict = (save) =>
  element("span", { class: `verdict ${save.state}` },
    element("span", { "aria-hidden": "true" }, { succeeded: "✓", failed: "!", cancelled: "–" }[save.state] ?? "…"), " ",
    t(`state.${save.state}`));
