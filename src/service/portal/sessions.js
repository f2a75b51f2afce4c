// My sessions: what runs, what a save of it would be, one press to make it.

import { Refused, get, insist, path, pressed, repeat } from "./api.js";
import { announce, ask, element, facts, fill, follow, look, named } from "./element.js";
import { bytes, duration, left, since, when } from "./format.js";
import { sentence, t } from "./language.js";
import { changes, failure, image as imageOf, latest, outcome, over, running, take, trouble, verdict, words } from "./saves.js";

const NAME = /^[a-z0-9]+(?:[._-][a-z0-9]+|__[a-z0-9]+|-+[a-z0-9]+)*$/;
const TAG = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$/;

// A tag that the server has suggested is for one save, not for the next one.
const SUGGESTED = /^\d{4}-?\d{2}-?\d{2}-\d{4}(-[0-9a-f]{4,8})?$/;
const SAVES_EVERY = 60_000;

const title = (session) => session.pod ?? session.container ?? session.id.slice(0, 12);

export const badges = (item) => [
  item.kind && item.kind !== "other" ? element("span", { class: "badge" }, t(`kind.${item.kind}`)) : null,
  item.category ? element("span", { class: `badge ${item.category}` }, t(`category.${item.category}`)) : null,
];

/** How long it will take, from how fast the last saves were; nothing if that is unknown. */
function suggested(session, saves) {
  const { next } = session;
  const told = (all) => {
    const [read, seconds] = all.reduce(([sum, time], save) => [sum + save.progress.bytes_total - save.progress.base_total, time + save.result.seconds], [0, 0]);
    return read > 0 && seconds > 0 ? seconds / read : null;
  };
  const ended = saves.filter((save) => save.result?.seconds && save.progress?.bytes_total && save.node === session.node);
  const pace = told(ended.filter((save) => save.session === session.id)) ?? told(ended);
  if (pace !== null && typeof next?.bytes === "number") return sentence("time.suggested", { time: left(Math.max(1, pace * next.bytes)) });
  if (typeof next?.last_seconds === "number") return sentence("time.last", { time: duration(next.last_seconds) });
  return null;
}

function amount(session, saves) {
  const { next } = session;
  const size = next?.bytes ?? (next?.delta ? null : session.upper_bytes);
  const what = typeof size === "number"
    ? t(next?.delta ? "next.delta" : "next.full", { size: bytes(size) })
    : t(next?.delta ? "next.delta.unknown" : "next.full.unknown");
  const time = suggested(session, saves);
  return time ? [what, " · ", time] : what;
}

/** What stays outside, said plainly: the data first, the system's own mounts for who asks. */
function outside(session) {
  const data = session.unsaved.filter((mount) => mount.data);
  const rest = session.unsaved.filter((mount) => !mount.data);
  // Some may only be counted.
  const others = rest.length + (session.unsaved_more ?? 0);
  const lines = (mounts) => element("ul", { class: "mounts" }, mounts.map((mount) =>
    element("li", {}, element("code", {}, named(mount.path)), " ", element("span", { class: "dim" }, named(mount.kind)))));
  return [
    data.length ? [lines(data), element("p", { class: "dim" }, t("unsaved.why"))] : t("unsaved.none"),
    others ? element("details", {}, element("summary", {}, t("unsaved.rest", { n: others })), lines(rest)) : null,
  ];
}

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

function card(first, me) {
  let session = first;
  let save = null;
  let shown = null;
  const id = `s-${first.id.slice(0, 24)}`;
  const heading = element("h2", { id: `${id}-name` }, named(title(first)));
  const meta = element("p", { class: "dim" });
  const told = element("div");
  const error = element("div");

  const name = field(`${id}-n`, t("field.name"), t("field.name.hint"),
    element("input", { autocomplete: "off", spellcheck: "false", autocapitalize: "none", maxlength: "128", dir: "ltr" }));
  const tag = field(`${id}-t`, t("field.tag"), t("field.tag.hint"),
    element("input", { autocomplete: "off", spellcheck: "false", autocapitalize: "none", maxlength: "128", dir: "ltr" }));
  const message = field(`${id}-m`, t("field.message"), t("field.message.hint"),
    element("textarea", { rows: "2", maxlength: "1000", dir: "auto" }));
  const full = element("input", { type: "checkbox", id: `${id}-f` });
  const anew = element("div", { class: "check" }, full, element("label", { for: `${id}-f` }, t("field.full")));
  const more = element("details", { class: "more" }, element("summary", {}, t("more")),
    element("div", { class: "pair" }, name.element, tag.element), message.element, anew);
  const target = element("code", { dir: "ltr" });
  const button = element("button", { class: "main" }, t("save"));
  button.setAttribute("aria-label", t("save.what", { what: title(first) }));
  const again = element("button", { type: "button", class: "again", hidden: true });
  const form = element("form", { novalidate: true },
    element("div", { class: "press" }, element("p", { class: "as" }, sentence("save.as", { image: target })), again, button), more, error);
  const progress = element("div");
  const last = element("div", { class: "last" });
  const block = element("article", { class: "card", "aria-labelledby": `${id}-name` },
    element("div", { class: "badges" }, badges(first)), heading, meta, told, form, progress, last);

  const preview = () => fill(target, `${name.input.value.trim() || session.suggested_name}:${tag.input.value.trim() || session.suggested_tag}`);
  name.input.addEventListener("input", preview);
  tag.input.addEventListener("input", preview);

  const valid = () => {
    const checks = [[name, NAME, "field.name.wrong"], [tag, TAG, "field.tag.wrong"]];
    const bad = checks.filter(([{ input }, pattern]) => input.value.trim() && !pattern.test(input.value.trim()));
    for (const [{ complain }, , key] of bad) complain(t(key));
    if (bad.length) {
      more.open = true;
      bad[0][0].input.focus();
    }
    return bad.length === 0;
  };

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
    const wrong = { "image.name": name, "image.tag": tag, message }[caught.field];
    if (wrong) {
      wrong.complain(caught.message);
      more.open = true;
      wrong.input.focus();
      return;
    }
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

  const press = async (used, image, replace) => {
    if (button.getAttribute("aria-disabled") || !valid()) return;
    fill(error);
    const label = used.textContent;
    for (const one of [button, again]) one.setAttribute("aria-disabled", "true");
    fill(used, t("save.asking"));
    const body = { session: session.id, image };
    if (replace) body.replace = replace;
    if (message.input.value.trim()) body.message = message.input.value.trim();
    if (full.checked) body.options = { full: true };
    try {
      const begun = await request(body);
      if (!begun) return;
      announce(t("news.queued", { image: imageOf(take(begun)) }));
      form.reset();
      more.open = false;
    } catch (caught) {
      await refused(caught).catch((second) => fill(error, trouble(second)));
    } finally {
      for (const one of [button, again]) one.removeAttribute("aria-disabled");
      fill(used, label);
      preview();
    }
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const image = {};
    if (name.input.value.trim()) image.name = name.input.value.trim();
    if (tag.input.value.trim()) image.tag = tag.input.value.trim();
    press(button, image);
  });
  // On purpose, so without a question: the image is this session's own.
  again.addEventListener("click", () => press(again, { name: save.name, tag: save.tag }, "own"));

  /** Shows the session's last save: the bar while it runs, then what came of it. */
  const show = (next) => {
    save = next;
    const here = block.contains(document.activeElement) && document.activeElement !== document.body;
    if (save && !over(save)) {
      if (shown?.id !== save.id) {
        const bar = running(save);
        shown = { id: save.id, bar };
        progress.replaceChildren(bar.element);
        form.hidden = true;
        last.replaceChildren();
        if (here) bar.focus();
      } else shown.bar.update(save);
      return;
    }
    const hadFocus = progress.contains(document.activeElement);
    if (shown) {
      progress.replaceChildren();
      shown = null;
    }
    form.hidden = false;
    again.hidden = !(save?.state === "succeeded" && (save.image?.state ?? "tagged") === "tagged" && !SUGGESTED.test(save.tag));
    if (!again.hidden) fill(again, t("save.again", { image: imageOf(save) }));
    if (!save) return fill(last);
    const head = element("p", { class: "ended" }, verdict(save), " ", when(save.finished ?? save.created));
    fill(last, head, save.state === "failed" && since(save.finished ?? save.created) > 86400 ? failure(save) : outcome(save));
    if (hadFocus) look(last);
  };

  const update = (now, saves) => {
    session = now;
    block.session = now;
    fill(meta, sentence(now.image ? "session.meta" : "session.meta.bare", {
      node: named(now.node), time: duration(since(now.started)), image: now.image ? element("code", {}, named(now.image)) : "",
    }), me.administrator && now.owner !== me.user ? [" · ", now.owner ? named(now.owner) : t("owner.none")] : null);
    fill(told, facts([t("fact.next"), amount(now, saves)], [t("fact.unsaved"), outside(now)]));
    anew.hidden = !now.next?.delta;
    name.input.placeholder = now.suggested_name;
    tag.input.placeholder = now.suggested_tag;
    preview();
    const newest = now.save ? latest(now.save) : saves.find((one) => one.session === now.id);
    const mine = save && latest(save.id);
    // What this page was told meanwhile may be newer than the list.
    const best = [newest, mine].filter(Boolean).sort((a, b) => (a.created < b.created ? 1 : -1))[0] ?? null;
    show(best ? latest(best.id) ?? best : null);
    if (now.save && !latest(now.save)) get(path("saves", now.save)).then(take, () => {});
  };
  return { element: block, update, show, of: (one) => one.session === session.id && (!save || one.id === save.id || one.created >= save.created) };
}

/** The view. */
export function view(main, signal, me) {
  const list = element("div", { class: "cards" });
  const state = element("p", { class: "empty" }, t("loading"));
  const search = element("input", { type: "search", id: "find-session", autocomplete: "off" });
  const all = element("input", { type: "checkbox", id: "everyone" });
  const tools = element("div", { class: "tools", hidden: true },
    element("div", { class: "field grow" }, element("label", { for: "find-session" }, t("sessions.search")), search),
    me.administrator ? element("div", { class: "check" }, all, element("label", { for: "everyone" }, t("sessions.everyone"))) : null);
  const others = element("div", { class: "cards" });
  main.append(tools, others, list, state);

  let sessions = [];
  let saves = [];
  const rows = () => [...(list.kept?.values() ?? [])];
  const draw = () => {
    const mine = sessions.filter((session) => session.owner === me.user);
    const pool = me.administrator && (all.checked || mine.length === 0) ? sessions : mine.length || me.administrator ? mine : sessions;
    const word = search.value.trim().toLowerCase();
    const found = pool.filter((session) =>
      !word || [session.pod, session.namespace, session.container, session.image, session.node, session.owner].some((text) => text?.toLowerCase().includes(word)));
    tools.hidden = sessions.length < 4 && !(me.administrator && sessions.length > mine.length);
    follow(list, found, (session) => session.id, (session) => {
      const row = card(session, me);
      return { ...row, update: (now) => row.update(now, saves) };
    });
    // A save may outlive its session's place in the list: it must not vanish from sight.
    const orphans = saves.map((save) => latest(save.id) ?? save)
      .filter((save) => !over(save) && save.user === me.user && !sessions.some((session) => session.id === save.session));
    follow(others, orphans, (save) => save.id, (save) => {
      const bar = running(save);
      return { element: element("article", { class: "card" }, element("h2", {}, named(save.session_name)), bar.element), update: (now) => bar.update(now) };
    });
    state.hidden = found.length + orphans.length > 0;
    fill(state, sessions.length && word ? t("sessions.no-match") : t("sessions.none"));
  };
  // The list of saves changes only by what the stream tells; it is read again now and then in case something was missed.
  let read = -Infinity;
  const run = repeat(15_000, signal, async () => {
    try {
      const stale = Date.now() - read > SAVES_EVERY;
      const [now, before] = await Promise.all([get("sessions"), stale ? get("saves", { limit: 100 }) : null]);
      sessions = now.sessions;
      if (before) [saves, read] = [before.saves, Date.now()];
      for (const save of saves) if ((!over(save) && save.user === me.user) || latest(save.id)) take(save);
      draw();
    } catch (error) {
      if (!rows().length) {
        state.hidden = false;
        fill(state, words(error)[0]);
      }
      throw error;
    }
  });
  search.addEventListener("input", draw);
  all.addEventListener("change", draw);
  changes.addEventListener("change", ({ detail: save }) => {
    for (const row of rows()) if (row.of(save)) row.show(save);
    for (const [id, row] of others.kept ?? []) if (id === save.id) row.update(save);
  }, { signal });
  // The size of the next save is another one now.
  changes.addEventListener("ended", () => { read = -Infinity; setTimeout(() => (signal.aborted ? null : run()), 1500); }, { signal });
}
