// A session as a row: what it is, how it was saved last, a button that saves it. It opens to what would be saved.

import { Refused, get, insist, path, pressed } from "./api.js";
import { atEnd, autosave } from "./autosave.js";
import { amount, badges, outside, short } from "./contents.js";
import { announce, ask, element, facts, fill, look, named, reference } from "./element.js";
import { bytes, duration, since, when } from "./format.js";
import { sentence, t } from "./language.js";
import { box } from "./mail.js";
import { ofSession } from "./packages.js";
import { byItself, changes, failure, image as imageOf, latest, outcome, over, running, take, trouble, verdict, words } from "./saves.js";
import { timeline } from "./timeline.js";

const NAME = /^[a-z0-9]+(?:[._-][a-z0-9]+|__[a-z0-9]+|-+[a-z0-9]+)*$/;
const TAG = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$/;

// A tag that the server has suggested is for one save, not for the next one.
const SUGGESTED = /^(?:auto-|ended-)?\d{4}-?\d{2}-?\d{2}-\d{4}(-[0-9a-f]{4,8})?$/;
const DAY = 86_400;

const title = (session) => session.pod ?? session.container ?? session.id.slice(0, 12);

function field(id, label, hint, input) {
  input.id = id;
  input.setAttribute("aria-describedby", `${id}-hint ${id}-wrong`);
  const wrong = element("p", { id: `${id}-wrong`, class: "wrong" });
  const complain = (text) => {
    fill(wrong, text ?? "");
    if (text) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  };
  input.addEventListener("input", () => complain(null));
  return { input, complain, element: element("div", { class: "field" }, element("label", { for: id }, label), input, wrong, element("p", { id: `${id}-hint`, class: "dim" }, hint)) };
}

/** Asks whether an image may be replaced: who saved it, when, from which session. */
function replace(existing, session) {
  const what = `${existing.name}:${existing.tag}`;
  const own = existing.session === session.id;
  const told = existing.saved
    ? sentence(own ? "replace.own" : "replace.by", { user: named(existing.user), session: named(existing.session_name), time: when(existing.saved) })
    : t("replace.unknown");
  return ask(sentence("replace.title", { image: named(what) }), [
    element("p", {}, told),
    existing.message ? element("p", { class: "message" }, named(existing.message)) : null,
    element("p", {}, t("replace.lost")),
  ], t("replace.yes"), t("replace.no"));
}

/** Name, tag, description: what a save is called. `shown` opens the row that has the form. */
function saveForm(id, shown, me, signal) {
  const plain = { autocomplete: "off", spellcheck: "false", autocapitalize: "none", maxlength: "128", dir: "ltr" };
  const name = field(`${id}-n`, t("field.name"), t("field.name.hint"), element("input", plain));
  const tag = field(`${id}-t`, t("field.tag"), t("field.tag.hint"), element("input", plain));
  const message = field(`${id}-m`, t("field.message"), t("field.message.hint"), element("textarea", { rows: "2", maxlength: "1000", dir: "auto" }));
  const full = element("input", { type: "checkbox", id: `${id}-f` });
  const anew = element("div", { class: "check" }, full, element("label", { for: `${id}-f` }, t("field.full")));
  const mail = box(`${id}-e`, me, signal);
  const target = element("code", { dir: "ltr" });
  const form = element("form", { id: `${id}-form`, novalidate: true },
    element("p", { class: "as" }, sentence("save.as", { image: target })),
    element("div", { class: "pair" }, name.element, tag.element), message.element, mail.element, anew);
  const typed = ({ input }) => input.value.trim();
  let session = null;
  const preview = () => fill(target, `${typed(name) || session.suggested_name}:${typed(tag) || session.suggested_tag}`);
  name.input.addEventListener("input", preview);
  tag.input.addEventListener("input", preview);
  const wrong = (one, text) => {
    one.complain(text);
    shown();
    one.input.focus();
  };
  return {
    element: form,
    update(now) {
      session = now;
      anew.hidden = !now.next?.delta;
      name.input.placeholder = now.suggested_name;
      tag.input.placeholder = now.suggested_tag;
      preview();
    },
    reset() {
      form.reset();
      mail.reset();
      preview();
    },
    image: () => ({ ...(typed(name) && { name: typed(name) }), ...(typed(tag) && { tag: typed(tag) }) }),
    rest: () => ({ ...(typed(message) && { message: typed(message) }), ...(full.checked && { options: { full: true } }), ...mail.rest() }),
    valid() {
      const bad = [[name, NAME, "field.name.wrong"], [tag, TAG, "field.tag.wrong"]].filter(([one, pattern]) => typed(one) && !pattern.test(typed(one)));
      for (const [one, , key] of bad.reverse()) wrong(one, t(key));
      return bad.length === 0;
    },
    /** Shows what the server said at the field that it named; false if it named none. */
    refused(error) {
      const one = { "image.name": name, "image.tag": tag, message }[error.field];
      if (one) wrong(one, error.message);
      return Boolean(one);
    },
  };
}

/** Under the row when it is closed: what came of the save that was seen here, or a failure of today. */
function brief(save, seen) {
  if (save.state === "failed") return since(save.finished ?? save.created) < DAY ? failure(save) : null;
  if (!seen) return null;
  if (save.state === "cancelled") return element("p", {}, t("cancelled.body"));
  return (save.image?.state ?? "tagged") === "tagged" ? reference(save.target) : null;
}

/** When and why a session ended. */
function ending(end) {
  const key = end.out_of_memory ? "ended.memory" : typeof end.exit_code === "number" ? "ended.code" : "ended.bare";
  return element("strong", {}, sentence(key, { time: end.at ? when(end.at) : t("ended.before"), code: end.exit_code }));
}

/** Another save can be asked for while an autosave is under way. */
const counts = (save) => over(save) || !byItself(save);

/** The row of a session. */
export function row(first, me, signal) {
  let session = first;
  let save = null;
  let shown = null;
  let seen = null;
  const id = `s-${first.id}`;
  const opener = element("button", { type: "button", class: "opener", "aria-expanded": "false", "aria-controls": `${id}-in` }, named(title(first)));
  const about = element("p", { class: "about dim" });
  const size = element("p", { class: "amount dim" });
  const state = element("p", { class: "state" });
  const told = element("div");
  const error = element("div");
  const panel = element("div", { id: `${id}-in`, class: "inside", hidden: true });
  const past = timeline(first, me);
  const own = autosave(first);
  const end = atEnd(first, me);
  const toggle = (open = panel.hidden) => {
    if (open && panel.hidden) {
      past.load();
      end.load();
    }
    panel.hidden = !open;
    opener.setAttribute("aria-expanded", String(open));
    came();
  };
  const form = saveForm(id, () => toggle(true), me, signal);
  const button = element("button", { class: "main", form: `${id}-form` }, t("save"));
  button.setAttribute("aria-label", t("save.what", { what: title(first) }));
  const again = element("button", { type: "button", class: "again", hidden: true });
  const progress = element("div");
  const last = element("div", { class: "last" });
  const meta = element("p", { class: "dim" });
  panel.append(meta, told, ofSession(first), form.element, own.element, end.element, past.element);
  const line = element("div", { class: "line" },
    element("div", { class: "what" }, element("h2", { id: `${id}-name` }, opener, element("span", { class: "badges" }, badges(first))), about),
    element("div", { class: "sides" }, size, state), element("div", { class: "press" }, again, button));
  const block = element("article", { class: "card row", "aria-labelledby": `${id}-name` }, line, progress, error, last, panel);

  opener.addEventListener("click", () => toggle());
  changes.addEventListener("ended", ({ detail: ended }) => { if (ended.session === session.id && !panel.hidden) past.load(); }, { signal });
  // The pointer may open the row anywhere where nothing else is to be pressed or marked.
  line.addEventListener("click", (event) => {
    if (!event.target.closest("button, a") && !String(getSelection())) toggle();
  });

  const refused = async (caught) => {
    if (caught instanceof Refused && caught.code === "conflict" && caught.save) {
      const other = await get(path("saves", caught.save));
      if (other.session === session.id) {
        // Another tab was first: that save is as good.
        take(other);
        announce(t("save.already"));
        return;
      }
    }
    if (form.refused(caught)) return;
    fill(error, trouble(caught));
    announce(words(caught).join(" "), true);
  };

  /** Sends the request; where another image has the tag, it asks. */
  const request = async (body) => {
    try {
      return await insist("POST", "saves", { body, key: pressed() });
    } catch (caught) {
      if (!(caught instanceof Refused && caught.code === "tag_exists" && caught.existing)) throw caught;
      if (!await replace(caught.existing, session)) return null;
      return request({ ...body, replace: caught.existing.digest });
    }
  };

  const press = async (used, image, rest) => {
    if (button.getAttribute("aria-disabled") || !form.valid()) return;
    fill(error);
    const label = used.textContent;
    for (const one of [button, again]) one.setAttribute("aria-disabled", "true");
    fill(used, t("save.asking"));
    try {
      const begun = await request({ session: session.id, image, ...form.rest(), ...rest });
      if (!begun) return;
      announce(t("news.queued", { image: imageOf(take(begun)) }));
      form.reset();
    } catch (caught) {
      await refused(caught).catch((second) => fill(error, trouble(second)));
    } finally {
      for (const one of [button, again]) one.removeAttribute("aria-disabled");
      fill(used, label);
    }
  };
  form.element.addEventListener("submit", (event) => {
    event.preventDefault();
    press(button, form.image());
  });
  // On purpose, so without a question: the image is this session's own.
  again.addEventListener("click", () => press(again, { name: save.name, tag: save.tag }, { replace: "own" }));

  /** What came of the last save: all of it in an open row. */
  const came = () => {
    if (!save || !over(save)) return fill(last);
    if (panel.hidden) return fill(last, brief(save, seen === save.id));
    fill(last, save.state === "failed" && since(save.finished ?? save.created) > DAY ? failure(save) : outcome(save));
  };

  /** Shows the session's last save: the bar while it runs, then what came of it. */
  const show = (next) => {
    save = next;
    const here = block.contains(document.activeElement) && document.activeElement !== document.body;
    const open = Boolean(save) && !over(save);
    if (open && shown?.id === save.id) return shown.bar.update(save);
    const hadFocus = progress.contains(document.activeElement);
    if (open) {
      const bar = running(save);
      shown = { id: save.id, bar };
      seen = save.id;
      progress.replaceChildren(bar.element);
    } else if (shown) {
      progress.replaceChildren();
      shown = null;
    }
    form.element.hidden = button.hidden = open;
    again.hidden = open || !(save?.state === "succeeded" && (save.image?.state ?? "tagged") === "tagged" && !SUGGESTED.test(save.tag));
    if (!again.hidden) fill(again, t("save.again", { image: imageOf(save) }));
    fill(state, save && !open ? [verdict(save), " ", when(save.finished ?? save.created)] : "");
    came();
    if (open && here) shown.bar.focus();
    if (hadFocus && !open) look(last.hasChildNodes() ? last : opener);
  };

  const update = (now, saves) => {
    session = now;
    block.session = now;
    const owner = me.administrator && now.owner !== me.user ? (now.owner ? named(now.owner) : t("owner.none")) : null;
    fill(about, [now.ended && ending(now.ended), now.image ? element("code", { title: now.image }, named(short(now.image))) : null, named(now.node), owner]
      .filter(Boolean).map((part) => element("span", {}, part)));
    fill(size, typeof now.upper_bytes === "number" ? t("session.size", { size: bytes(now.upper_bytes) }) : "");
    const place = now.ended ? "session.meta.ended" : now.image ? "session.meta" : "session.meta.bare";
    fill(meta, sentence(place, {
      node: named(now.node), runtime: now.runtime, time: duration(since(now.started)), image: now.image ? element("code", {}, named(now.image)) : "",
    }));
    fill(told, facts([t("fact.next"), amount(now, saves)], [t("fact.unsaved"), outside(now)],
      [t("fact.problem"), now.problem && element("span", { lang: "en" }, named(now.problem))]));
    form.update(now);
    own.update(now);
    end.update(now);
    const newest = now.save ? latest(now.save) : saves.find((one) => one.session === now.id && counts(one));
    const mine = save && latest(save.id);
    // What this page was told meanwhile may be newer than the list.
    const best = [newest, mine].filter(Boolean).sort((a, b) => (a.created < b.created ? 1 : -1))[0] ?? null;
    show(best ? latest(best.id) ?? best : null);
    if (now.save && !latest(now.save)) get(path("saves", now.save)).then(take, () => {});
  };
  return { element: block, update, show, of: (one) => one.session === session.id && counts(one) && (!save || one.id === save.id || one.created >= save.created) };
}
