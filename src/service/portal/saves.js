// Saves and how far they are: read once, then followed by one event stream; by asking where there is none.

import { Lost, Refused, call, get, insist, line, path, stream } from "./api.js";
import { announce, ask, element, facts, fill, look, named, problem, reference } from "./element.js";
import { bytes, duration, left, milliseconds, percent, since, when } from "./format.js";
import { has, sentence, t } from "./language.js";

// The stream says something every 8 s. When it does not, it has been cut, and the browser does not know.
const CUT = 20_000;
// A clock that jumps: the machine has slept.
const SLEPT = 8_000;
// Without a stream, one call asks for all saves that are not over; less often in a tab that is not seen.
const ASK_EVERY = 3_000;
const ASK_UNSEEN = 20_000;
// A stream that ended at once is not opened again at once.
const OPEN_EVERY = 3_000;

export const over = (save) => ["succeeded", "failed", "cancelled"].includes(save.state);
/** Made without being asked for: worth no interruption. */
export const byItself = (save) => save.made_by === "autosave";
export const image = (save) => `${save.name}:${save.tag}`;

const known = new Map();
/** Tells `change` with a save that is not as it was, and `ended` once with one that is over. */
export const changes = new EventTarget();

/** Takes a save, whoever told it; an older one than is known changes nothing, and the same one tells nothing. */
export function take(save) {
  const before = known.get(save.id);
  if (before && save.version < before.version) return before;
  const now = before && save.version === before.version ? settled(before, save) : save;
  if (before && JSON.stringify(before) === JSON.stringify(now)) return before;
  known.set(save.id, now);
  if (before) tell(before, now);
  changes.dispatchEvent(new CustomEvent("change", { detail: now }));
  if (before && !over(before) && over(now)) changes.dispatchEvent(new CustomEvent("ended", { detail: now }));
  return now;
}

/** Of the same version: an answer that was overtaken by an event does not turn the bar back. */
function settled(before, save) {
  const { progress } = before;
  const overtaken = progress && progress.bytes_total === save.progress?.bytes_total && progress.bytes_done > save.progress.bytes_done;
  return { ...save, image: save.image ?? before.image, progress: overtaken ? progress : save.progress, place: save.state === "queued" ? save.place ?? before.place : save.place };
}

export const latest = (id) => known.get(id);
const going = () => [...known.values()].filter((save) => !over(save));

/** Announces what is worth an interruption: the beginning of the transfer, quarters of it, the end. */
function tell(before, save) {
  if (byItself(save)) return;
  const of = { image: image(save) };
  if (save.state !== before.state) {
    if (over(save)) announce(t(`news.${save.state}`, of), save.state === "failed");
    else if (save.state === "running") announce(t("news.running", of));
    return;
  }
  const quarter = (at) => (at.progress?.bytes_total ? Math.floor((4 * at.progress.bytes_done) / at.progress.bytes_total) : 0);
  if (quarter(save) > quarter(before) && quarter(save) < 4) announce(t("news.progress", { ...of, share: percent(quarter(save) / 4) }));
}

let whose = null;
let open = null;
let opened = 0;
let heard = 0;
let asked = 0;

/** Follows the saves of a user from now on, until the sign-in ends. */
export function follow(me) {
  whose = me;
  listen();
}

function close() {
  open?.abort();
  open = null;
}

async function listen() {
  if (open || !whose || document.hidden) return;
  const own = new AbortController();
  open = own;
  opened = heard = Date.now();
  try {
    await stream("events", { user: whose.user }, own.signal, (event, data) => {
      if (open !== own) return;
      heard = Date.now();
      if (event === "open") missing(new Set(JSON.parse(data).saves));
      else if (event === "save" || event === "progress") take(JSON.parse(data));
    });
  } catch (error) {
    if (!(error instanceof Lost || error instanceof Refused)) throw error;
  } finally {
    if (open === own) open = null;
  }
}

/** Asks for those that are not among the open ones any more: they have ended, and that was not heard. */
function missing(there) {
  for (const save of going()) {
    if (!there.has(save.id) && (!whose.user || save.user === whose.user)) lookAgain(save.id);
  }
}

const looking = new Set();
async function lookAgain(id) {
  if (looking.has(id)) return;
  looking.add(id);
  try {
    take(await get(path("saves", id)));
  } catch (error) {
    if (error instanceof Refused && error.status === 404) known.delete(id);
    else if (!(error instanceof Lost || error instanceof Refused)) throw error;
  } finally {
    looking.delete(id);
  }
}

/** One call for all that are not over. */
async function askAll() {
  asked = Date.now();
  try {
    const page = await get("saves", { user: whose.user, state: "open", limit: 200 });
    for (const save of page.saves) take(save);
    if (!page.next) missing(new Set(page.saves.map((save) => save.id)));
  } catch (error) {
    if (!(error instanceof Lost || error instanceof Refused)) throw error;
  }
}

let ticked = Date.now();
setInterval(() => {
  const now = Date.now();
  const slept = now - ticked > SLEPT;
  ticked = now;
  title();
  if (!whose) return;
  if (open && (slept || now - heard > CUT)) close();
  if (!open && !document.hidden && now - opened > OPEN_EVERY) listen();
  const silent = !open || now - heard > CUT / 2;
  if (silent && going().length && now - asked > (document.hidden ? ASK_UNSEEN : ASK_EVERY)) askAll();
}, 1000);

// After a closed lid or a lost line nothing that is shown may be old: a new stream begins with all that is open.
function refresh() {
  close();
  listen();
}
document.addEventListener("visibilitychange", refresh);
window.addEventListener("online", refresh);
window.addEventListener("pageshow", (event) => { if (event.persisted) refresh(); });
line.addEventListener("back", () => { if (!open) listen(); });
line.addEventListener("signed-out", () => {
  whose = null;
  close();
  known.clear();
});

let finished = null;
changes.addEventListener("ended", ({ detail: save }) => {
  if (document.hidden && !byItself(save)) finished = save;
});
document.addEventListener("visibilitychange", () => { finished = null; title(); });

/** The tab's title says how far it is, for who looks at another tab. */
function title() {
  const running = going().filter((save) => save.progress?.bytes_total && !byItself(save));
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

/** Has a save run at normal priority. */
async function hurry(save) {
  try {
    take(await insist("POST", path("saves", save.id, "hurry"), { body: {} }));
    announce(t("hurry.said", { image: image(save) }));
  } catch (error) {
    announce(words(error).join(" "), true);
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

/** What became of the image, if it cannot be started by its name any more. */
export function fate({ image: now }) {
  if (!now || now.state === "tagged") return null;
  const time = now.at ? when(now.at) : "";
  if (now.state === "replaced") return sentence("fate.replaced", { session: named(now.session_name ?? ""), time });
  if (now.state === "renamed") return sentence("fate.renamed", { tag: named(now.renamed_to), time });
  return sentence("fate.deleted", { time });
}

/** What came of a save. */
export function outcome(save) {
  const { result } = save;
  if (save.state === "failed") return [failure(save), remarks(save)];
  if (save.state === "cancelled") return [element("p", {}, t("cancelled.body"))];
  const pause = result?.pause_ms ?? save.pause_ms;
  const gone = fate(save);
  return [
    gone ? element("p", { class: "fate" }, element("s", {}, named(image(save))), " ", gone) : reference(save.target),
    facts(
      [t("fact.size"), result && t(result.delta ? "size.delta" : "size.full", { whole: bytes(result.image_bytes), layer: bytes(result.layer_bytes) })],
      [t("fact.pause"), pause !== null && pause !== undefined && milliseconds(pause)],
      [t("fact.took"), result && duration(result.seconds)],
      [t("fact.base"), result?.base_name && named(result.base_name)]),
    remarks(save)];
}

const NOTIFY = "upperdeck-notify";
let notifying = false;
try {
  notifying = localStorage.getItem(NOTIFY) === "yes";
} catch { /* It is forbidden. */ }
const canNotify = () => "Notification" in window && window.isSecureContext;

/** A switch for a notification of the browser at the end of saves; none where the browser has none. */
function notifier() {
  if (!canNotify()) return null;
  const button = element("button", { type: "button", class: "quiet bell", "aria-pressed": String(notifying && Notification.permission === "granted") }, t("notify"));
  button.addEventListener("click", async () => {
    const wanted = button.getAttribute("aria-pressed") !== "true";
    notifying = wanted && await Notification.requestPermission() === "granted";
    try {
      localStorage.setItem(NOTIFY, notifying ? "yes" : "no");
    } catch { /* It is forbidden. */ }
    for (const one of document.querySelectorAll(".bell")) one.setAttribute("aria-pressed", String(notifying));
    announce(t(notifying ? "notify.on" : wanted ? "notify.denied" : "notify.off"), wanted && !notifying);
  });
  return button;
}

changes.addEventListener("ended", ({ detail: save }) => {
  if (byItself(save) || !notifying || !canNotify() || Notification.permission !== "granted" || (whose?.user && save.user !== whose.user)) return;
  const note = new Notification(t(`news.${save.state}`, { image: image(save) }), { body: save.session_name, tag: save.id });
  note.addEventListener("click", () => { window.focus(); note.close(); });
});

/** A save that is not over, as a block that keeps itself true: phase, bar, numbers, cancel. */
export function running(first) {
  const phase = element("strong", { class: "phase" });
  const portion = element("span", { class: "portion" });
  const bar = element("progress", { max: "1" });
  const numbers = element("p", { class: "numbers" });
  const stop = element("button", { type: "button", click: () => (latest(first.id)?.cancelling ? null : cancel(latest(first.id) ?? first)) }, t("cancel"));
  stop.setAttribute("aria-label", t("cancel.what", { image: image(first) }));
  const label = element("div", { class: "over-bar" }, phase, element("span", { class: "of" }, named(image(first))), portion);
  const reason = element("span");
  const faster = element("button", { type: "button", class: "quiet", hidden: true, "aria-label": t("hurry.what", { image: image(first) }), click: () => hurry(latest(first.id) ?? first) }, t("hurry"));
  const why = element("p", { class: "why" }, reason, " ", faster);
  const bell = notifier();
  const block = element("section", { class: "running", "aria-label": t("saving.what", { image: image(first) }) },
    label, bar, element("div", { class: "under-bar" }, numbers, stop, bell), why);
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
    if (save.since) said.push(t("since", { time: duration(since(save.since)) }));
    if (save.attempt > 1) said.push(t("attempt", { count: save.attempt }));
    fill(numbers, said.join(" · "));
    const told = { node: named(save.waiting?.node ?? save.node), time: save.waiting?.until ? when(save.waiting.until) : "" };
    fill(reason, save.waiting ? sentence(`waiting.${save.waiting.reason}`, told) : save.hurried ? sentence("hurried", told) : "");
    const focused = faster === document.activeElement;
    faster.hidden = !(save.can_hurry && save.waiting?.reason === "cores");
    if (focused && faster.hidden) look(block);
    why.hidden = !save.waiting && !save.hurried;
    // Not `disabled`, which would drop the focus.
    if (save.cancelling) stop.setAttribute("aria-disabled", "true");
  };
  update(first);
  // How long it has been, also where nothing else changes.
  const clock = setInterval(() => {
    const save = latest(first.id);
    if (save && over(save)) clearInterval(clock);
    else if (block.isConnected && save) update(save);
  }, 1000);
  return { element: block, update, focus: () => look(block) };
}

/** One line that says how a save ended, with an icon that is not only a colour. */
export const verdict = (save) =>
  element("span", { class: `verdict ${save.state}` },
    element("span", { "aria-hidden": "true" }, { succeeded: "✓", failed: "!", cancelled: "–" }[save.state] ?? "…"), " ",
    t(save.image && save.image.state !== "tagged" ? `state.${save.image.state}` : `state.${save.state}`));
