// History: what was saved, and how it ended.

import { Lost, Refused, get, repeat } from "./api.js";
import { element, facts, fill, follow, named } from "./element.js";
import { moment, when } from "./format.js";
import { t } from "./language.js";
import { changes, image, latest, outcome, over, running, take, verdict, words } from "./saves.js";

const PAGE = 50;

/** A save as a line that opens. */
export function entry(first, me, action) {
  const line = element("summary");
  const inside = element("div", { class: "inside" });
  const block = element("details", { class: "card entry" }, line, inside);
  let bar = null;
  const update = (given) => {
    const save = latest(given.id) ?? given;
    fill(line, verdict(save), element("strong", {}, named(image(save))), when(save.finished ?? save.created),
      me.administrator ? element("span", { class: "dim" }, named(save.user)) : null);
    if (!over(save)) {
      if (!bar) inside.replaceChildren((bar = running(save)).element);
      bar.update(save);
      return;
    }
    bar = null;
    fill(inside, outcome(save), save.message ? element("p", { class: "message" }, named(save.message)) : null,
      facts([t("fact.session"), named(save.session_name)], [t("fact.node"), named(save.node)],
        [t("fact.asked"), moment(save.created)], [t("fact.ended"), save.finished && moment(save.finished)],
        [t("fact.attempts"), save.attempt > 1 && String(save.attempt)], [t("fact.id"), element("code", {}, save.id)]),
      action?.(save));
  };
  return { element: block, update };
}

/** The view. */
export function view(main, signal, me) {
  const state = element("select", { id: "state" }, ["", "succeeded", "failed", "cancelled", "running", "queued"].map((value) =>
    element("option", { value }, t(value ? `state.${value}` : "state.any"))));
  const user = element("input", { type: "search", id: "user", autocomplete: "off" });
  const list = element("div", { class: "cards tight" });
  const empty = element("p", { class: "empty", role: "status" }, t("loading"));
  const more = element("button", { type: "button", hidden: true }, t("history.more"));
  main.append(element("form", { class: "tools", submit: (event) => event.preventDefault() },
    element("div", { class: "field" }, element("label", { for: "state" }, t("outcome")), state),
    me.administrator ? element("div", { class: "field" }, element("label", { for: "user" }, t("user")), user) : null), list, empty, more);

  let saves = [];
  let next = null;
  const query = (cursor) => ({ limit: PAGE, state: state.value, user: user.value.trim(), cursor });
  const draw = () => {
    follow(list, saves, (save) => save.id, (save) => entry(save, me));
    fill(empty, saves.length ? "" : t("history.none"));
    more.hidden = !next;
  };
  const run = repeat(20_000, signal, async () => {
    try {
      const first = await get("saves", query());
      for (const save of first.saves) if ((!over(save) && save.user === me.user) || latest(save.id)) take(save);
      // Pages that were asked for stay below the first.
      const oldest = first.saves.at(-1);
      const below = first.next && saves.length > PAGE ? saves.filter((save) => save.id < oldest.id) : [];
      if (!below.length) next = first.next;
      saves = [...first.saves, ...below];
      draw();
    } catch (error) {
      if (!saves.length) fill(empty, words(error)[0]);
      throw error;
    }
  });
  const anew = () => { saves = []; run(); };
  state.addEventListener("change", anew);
  user.addEventListener("change", anew);
  more.addEventListener("click", async () => {
    try {
      const page = await get("saves", query(next));
      const seen = saves.length;
      saves = [...saves, ...page.saves];
      next = page.next;
      draw();
      list.children[seen]?.querySelector("summary")?.focus();
    } catch (error) {
      if (!(error instanceof Lost || error instanceof Refused)) throw error;
      fill(empty, words(error)[0]);
    }
  });
  changes.addEventListener("change", ({ detail: save }) => list.kept?.get(save.id)?.update(save), { signal });
}
