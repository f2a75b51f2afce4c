// The timeline of a session: what was saved when, what each save changed, and what can be done with it. Read when its row
// is opened, and again when a save of it ends.

import { Lost, Refused, get, path } from "./api.js";
import { announce, copier, element, fill, follow, look, named } from "./element.js";
import { bytes, when } from "./format.js";
import { remove, say, start, word } from "./images.js";
import { plain, sentence, t } from "./language.js";
import { between } from "./packages.js";
import { fate, words } from "./saves.js";

const PAGE = 20;

const called = (entry) => `${entry.name}:${entry.tag}`;
const there = (entry) => entry.fate.state === "tagged";

/** What a save changed: files, sizes, packages. */
function changed({ changes, packages, layer_bytes: layer }) {
  const told = [];
  if (!changes) told.push(t("timeline.unknown", { size: bytes(layer) }));
  else if (!changes.entries && !changes.removed) told.push(t("timeline.nothing"));
  else {
    const counts = [t("timeline.files", { n: changes.files }), changes.removed ? t("timeline.removed", { n: changes.removed }) : null, bytes(changes.bytes)];
    const [largest] = changes.largest;
    told.push(counts.filter(Boolean).join(", "), largest ? sentence("timeline.largest", { path: element("code", { dir: "ltr" }, named(largest.path)), size: bytes(largest.bytes) }) : null);
    if (changes.since === "base") told.push(t("timeline.base"));
  }
  if (packages?.some.length) {
    const more = packages.added + packages.removed + packages.changed - packages.some.length;
    told.push([packages.some.map((one, at) => [at ? ", " : "", named(one, { dir: "ltr" })]), more > 0 ? [", ", t("timeline.packages", { n: more })] : null]);
  }
  return told.filter(Boolean).map((part) => element("span", {}, part));
}

/** A command to copy. */
const command = (text) => element("ul", {}, element("li", {}, element("code", { dir: "ltr" }, plain(text)), copier(text)));

/** A save in the list. `before` is the next older one. */
function moment(first, me, done) {
  const head = element("p", { class: "moment" });
  const told = element("p", { class: "dim metas" });
  const message = element("p", { class: "message" });
  const tools = element("div", { class: "tools-of" });
  let entry = first.entry;
  let tooled = null;
  const own = { user: me.administrator ? entry.user : null };
  const erase = async () => {
    // The image may have other tags by now, with which it would stay.
    try {
      const image = await get(path("images", entry.name, "digests", entry.digest), own);
      const tag = image.tags.find((one) => one.name === entry.tag);
      if (tag) return await remove(image, tag, me, done);
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Lost)) throw error;
      if (error.status !== 404) return done(null, words(error));
    }
    done(t("deleted.before", { image: called(entry) }));
  };
  const pin = () => say(entry, { pinned: !entry.pinned }, me, done, t(entry.pinned ? "unpinned" : "pinned", { image: called(entry) }));
  const update = ({ entry: now, before }) => {
    entry = now;
    const image = element("code", { title: plain(now.reference), dir: "ltr" }, named(called(now)));
    fill(head, when(now.at), element("span", { class: "badge" }, t(`made.${now.made_by}`)), there(now) ? image : element("s", {}, image),
      now.pinned ? element("strong", {}, t("image.pinned")) : null, there(now) ? null : element("span", { class: "dim" }, fate({ image: now.fate })));
    fill(told, changed(now));
    message.hidden = !now.message;
    fill(message, now.message ? named(now.message) : "");
    tools.hidden = !there(now);
    const earlier = before && there(before) ? before : null;
    // Made anew only where something else can be done: what was opened stays open.
    const can = JSON.stringify([there(now), now.pinned, before?.save, earlier?.reference]);
    if (can === tooled) return;
    tooled = can;
    const what = { image: called(now) };
    const reference = word(now.reference);
    tools.replaceChildren(...[
      start(me, now.reference),
      element("details", { class: "commands" }, element("summary", {}, t("timeline.copy")),
        command(`upperdeck image cp ${reference}:/PATH .`), element("p", { class: "dim" }, t("timeline.copy.hint"))),
      before ? between(now.save, before.save, t("timeline.compare"),
        earlier && element("div", { class: "commands" }, command(`upperdeck image diff ${word(earlier.reference)} ${reference}`))) : null,
      element("button", { type: "button", class: "quiet", "aria-label": t(now.pinned ? "unpin.what" : "pin.what", what), click: pin }, t(now.pinned ? "unpin" : "pin")),
      now.pinned ? element("span", { class: "dim" }, t("immutable"))
        : element("button", { type: "button", class: "quiet danger", "aria-label": t("delete.what", what), click: erase }, t("delete")),
    ].filter(Boolean));
  };
  return { element: element("li", {}, head, told, message, tools), update };
}

/** The timeline of a session; `load` reads it. */
export function timeline(session, me) {
  const id = `s-${session.id}-t`;
  const heading = element("h3", { id }, t("timeline"));
  const error = element("div", { class: "alert" });
  const list = element("ol", { class: "moments" });
  const empty = element("p", { class: "dim", role: "status" });
  const more = element("button", { type: "button", class: "quiet", hidden: true }, t("timeline.more"));
  let entries = [];
  let next = null;
  let asked = 0;
  const draw = () => {
    const pairs = entries.map((entry, at) => ({ entry, before: entries[at + 1] ?? null }));
    follow(list, pairs, ({ entry }) => entry.save, (pair) => moment(pair, me, done));
    more.hidden = !next;
    fill(empty, entries.length ? "" : t("timeline.none"));
  };
  const read = async (cursor) => {
    const own = (asked += 1);
    try {
      const page = await get(path("sessions", session.id, "timeline"), { limit: PAGE, cursor });
      // Another answer is on its way.
      if (own !== asked) return;
      entries = cursor ? [...entries, ...page.entries] : page.entries;
      next = page.next ?? null;
      fill(error);
      draw();
    } catch (caught) {
      if (!(caught instanceof Lost || caught instanceof Refused)) throw caught;
      if (own === asked) fill(entries.length ? error : empty, words(caught)[0]);
    }
  };
  const load = () => {
    if (!entries.length) fill(empty, t("loading"));
    return read();
  };
  const done = async (said, wrong) => {
    announce(said ?? wrong.join(" "), !said);
    if (said) look(heading);
    await read();
    fill(error, wrong ? element("p", { class: "problem" }, element("strong", {}, wrong[0]), " ", named(wrong[1])) : "");
  };
  more.addEventListener("click", async () => {
    const seen = entries.length;
    await read(next);
    // The button may be gone: the focus goes on with what it brought.
    const first = list.children[seen];
    if (first) look(first);
  });
  return { element: element("section", { class: "timeline", "aria-labelledby": id }, heading, error, list, empty, more), load };
}
