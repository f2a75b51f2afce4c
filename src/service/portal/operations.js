// For administrators: the nodes, what is under way for everybody, what failed for good.

import { Lost, Refused, every, get, insist, path, repeat } from "./api.js";
import { announce, element, fill, follow, named } from "./element.js";
import { number, percent, when } from "./format.js";
import { t } from "./language.js";
import { changes, image, latest, over, take, words } from "./saves.js";
import { entry } from "./history.js";

const COLUMNS = ["node", "alive", "sessions", "running", "waiting", "load", "slots", "heard"];

function node(first) {
  const line = element("tr");
  const update = (now) => {
    const state = !now.alive ? "lost" : now.draining ? "draining" : "well";
    const pressure = now.load.cpu_pressure;
    fill(line,
      element("th", { scope: "row" }, named(now.name), element("span", { class: "dim" }, named(now.version)), now.problems.length
        ? element("details", {}, element("summary", {}, t("node.problems", { n: now.problems.length })), element("ul", {}, now.problems.map((text) => element("li", { lang: "en" }, named(text)))))
        : null),
      element("td", {}, element("span", { class: `verdict ${{ lost: "failed", draining: "cancelled", well: "succeeded" }[state]}` }, t(`node.${state}`))),
      element("td", {}, number(now.sessions)), element("td", {}, number(now.running.length)), element("td", {}, number(now.waiting)),
      element("td", {}, t("node.load", { load: number(Math.round(now.load.load1 * 10) / 10), cores: now.load.cores }),
        typeof pressure === "number" ? element("span", { class: "dim" }, " ", t("node.pressure", { share: percent(pressure / 100) })) : null),
      element("td", {}, t("node.slots", { slots: now.load.slots, threads: now.load.threads })),
      element("td", {}, when(now.heard)));
  };
  return { element: line, update };
}

async function requeue(save, run) {
  try {
    const answer = await insist("POST", `${path("saves", save.id)}/requeue`, { body: {} });
    take(answer?.id ? answer : await get(path("saves", save.id)));
    announce(t("requeued", { image: image(save) }));
  } catch (error) {
    if (!(error instanceof Lost || error instanceof Refused)) throw error;
    announce(words(error).join(" "), true);
  }
  run();
}

/** The view. */
export function view(main, signal, me) {
  const body = element("tbody");
  const table = element("div", { class: "wide", tabindex: "0", role: "region", "aria-labelledby": "nodes" },
    element("table", { "aria-labelledby": "nodes" }, element("thead", {}, element("tr", {}, COLUMNS.map((name) => element("th", { scope: "col" }, t(`column.${name}`))))), body));
  const none = element("p", { class: "empty" });
  const queue = element("div", { class: "cards tight" });
  const idle = element("p", { class: "empty" });
  const dead = element("div", { class: "cards tight" });
  const fine = element("p", { class: "empty" });
  main.append(
    element("section", {}, element("h2", { id: "nodes" }, t("operations.nodes")), table, none),
    element("section", {}, element("h2", {}, t("operations.queue")), queue, idle),
    element("section", {}, element("h2", {}, t("operations.dead")), element("p", { class: "dim" }, t("operations.dead.what")), dead, fine));

  const again = (save) => element("button", { type: "button", click: () => requeue(save, run), "aria-label": t("requeue.what", { image: image(save) }) }, t("requeue"));
  const run = repeat(5_000, signal, async () => {
    const part = async (work, place) => {
      try {
        await work();
      } catch (error) {
        fill(place, words(error)[0]);
      }
    };
    await Promise.all([
      part(async () => {
        const nodes = await every("nodes", "nodes");
        follow(body, nodes, (one) => one.name, node);
        table.hidden = !nodes.length;
        fill(none, nodes.length ? "" : t("nodes.none"));
      }, none),
      part(async () => {
        const { saves } = await get("saves", { state: "open", limit: 200 });
        for (const save of saves) if (latest(save.id)) take(save);
        follow(queue, saves.map((save) => latest(save.id) ?? save).filter((save) => !over(save)), (save) => save.id, (save) => entry(save, me));
        fill(idle, saves.length ? "" : t("queue.none"));
      }, idle),
      part(async () => {
        const { saves } = await get("dead");
        follow(dead, saves, (save) => save.id, (save) => entry(save, me, again));
        fill(fine, saves.length ? "" : t("dead.none"));
      }, fine),
    ]);
  });
  changes.addEventListener("change", ({ detail: save }) => queue.kept?.get(save.id)?.update(save), { signal });
}
