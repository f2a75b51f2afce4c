// My sessions: what runs, one press to save it.

import { every, get, repeat } from "./api.js";
import { element, fill, follow, named } from "./element.js";
import { t } from "./language.js";
import { setting } from "./mail.js";
import { row } from "./row.js";
import { changes, latest, over, running, take, words } from "./saves.js";

const SAVES_EVERY = 60_000;

/** The view. */
export function view(main, signal, me) {
  const list = element("div", { class: "cards tight" });
  const state = element("p", { class: "empty" }, t("loading"));
  const search = element("input", { type: "search", id: "find-session", autocomplete: "off" });
  const all = element("input", { type: "checkbox", id: "everyone" });
  const tools = element("div", { class: "tools", hidden: true },
    element("div", { class: "field grow" }, element("label", { for: "find-session" }, t("sessions.search")), search),
    me.administrator ? element("div", { class: "check" }, all, element("label", { for: "everyone" }, t("sessions.everyone"))) : null);
  const others = element("div", { class: "cards tight" });
  main.append(tools, others, list, state, setting(me) ?? "");

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
      const one = row(session, me, signal);
      return { ...one, update: (now) => one.update(now, saves) };
    });
    // A save may outlive its session's place in the list: it must not vanish from sight.
    const orphans = saves.map((save) => latest(save.id) ?? save)
      .filter((save) => !over(save) && save.user === me.user && !sessions.some((session) => session.id === save.session));
    follow(others, orphans, (save) => save.id, (save) => {
      const bar = running(save);
      return { element: element("article", { class: "card row" }, element("h2", {}, named(save.session_name)), bar.element), update: (now) => bar.update(now) };
    });
    state.hidden = found.length + orphans.length > 0;
    fill(state, sessions.length && word ? t("sessions.no-match") : t("sessions.none"));
  };
  // The list of saves changes only by what the stream tells; it is read again now and then in case something was missed.
  let read = -Infinity;
  const run = repeat(15_000, signal, async () => {
    try {
      const stale = Date.now() - read > SAVES_EVERY;
      const [now, before] = await Promise.all([every("sessions", "sessions"), stale ? get("saves", { limit: 100 }) : null]);
      sessions = now;
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
    for (const one of rows()) if (one.of(save)) one.show(save);
    for (const [id, one] of others.kept ?? []) if (id === save.id) one.update(save);
  }, { signal });
  // The size of the next save is another one now.
  changes.addEventListener("ended", () => { read = -Infinity; setTimeout(() => (signal.aborted ? null : run()), 1500); }, { signal });
}
