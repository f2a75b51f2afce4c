// What was installed: the packages by which a session or an image differs from its base, or from the save before. Read when
// it is opened. There may be thousands: first how many, then a list for who opens it, in pieces.

import { Lost, Refused, get, path } from "./api.js";
import { element, fill, named } from "./element.js";
import { sentence, t } from "./language.js";
import { trouble } from "./saves.js";

// Entries that are made at once.
const PIECE = 100;
// Up to so many packages, the lists are open.
const FEW = 12;
// How people call the managers; the others as in the API.
const CALLED = { r: "R", dpkg: "apt, dpkg" };

/** A package with its version, and what it was before. */
function line(one, places) {
  const told = one.change === "removed" ? [element("s", {}, named(one.previous ?? "")), " ", t("packages.gone")]
    : one.change === "changed" ? [named(one.previous ?? ""), " → ", named(one.version ?? "")]
    : named(one.version ?? "");
  return element("li", {}, element("strong", {}, named(one.name)), " ", element("span", { dir: "ltr" }, told),
    places && one.location ? element("span", { class: "dim place" }, named(`/${one.location}`)) : null);
}

/** The packages of one manager, made when they are opened. */
function group(manager, packages, open) {
  const places = new Set(packages.map((one) => one.location));
  const list = element("ul", { class: "packages" });
  const more = element("button", { type: "button", class: "quiet", hidden: true });
  let shown = 0;
  const show = () => {
    const next = packages.slice(shown, shown + PIECE);
    list.append(...next.map((one) => line(one, places.size > 1)));
    shown += next.length;
    const left = packages.length - shown;
    more.hidden = !left;
    fill(more, t("packages.show", { n: Math.min(left, PIECE) }));
  };
  more.addEventListener("click", () => {
    const first = list.children.length;
    show();
    // The button may be gone: the focus goes on with what it brought.
    list.children[first]?.setAttribute("tabindex", "-1");
    list.children[first]?.focus();
  });
  const block = element("details", { open }, element("summary", {}, `${CALLED[manager] ?? manager}: `, t("packages.count", { n: packages.length })),
    places.size === 1 && packages[0].location ? element("p", { class: "dim place" }, named(`/${packages[0].location}`)) : null, list, more);
  const once = () => { if (block.open && !shown) show(); };
  block.addEventListener("toggle", once);
  once();
  return block;
}

/** The list, counts first. */
function listed(found) {
  const count = (change) => found.packages.filter((one) => one.change === change).length;
  const counts = ["added", "changed", "removed"].map((change) => [change, count(change)]).filter(([, n]) => n)
    .map(([change, n]) => t(`packages.${change}`, { n }));
  return [
    element("p", {}, counts.length ? counts.join(" · ") : t("packages.nothing")),
    [...grouped(found.packages)].map(([manager, packages]) => group(manager, packages, found.packages.length <= FEW)),
    found.more ? element("p", { class: "dim" }, t("packages.more", { n: found.more })) : null,
    found.unread.length ? element("details", {}, element("summary", {}, t("packages.unread", { n: found.unread.length + found.unread_more })),
      element("ul", { class: "packages" }, found.unread.map((one) => element("li", { lang: "en" }, named(one.path), ": ", named(one.reason))))) : null,
    found.notes.map((note) => element("p", { class: "dim", lang: "en" }, named(note))),
  ];
}

function grouped(packages) {
  const groups = new Map();
  for (const one of packages) {
    if (!groups.has(one.manager)) groups.set(one.manager, []);
    groups.get(one.manager).push(one);
  }
  return groups;
}

/** A block that opens to packages. `load` reads them; `before`, if there is one, finds the save before as `{ save, name }`;
 *  `others` stand above them. */
function block(load, none, before, label = t("packages"), others = null) {
  const inside = element("div", { class: "inside-of" });
  const choice = element("p", { class: "choice" });
  let asked = 0;
  const show = async (since) => {
    const own = (asked += 1);
    fill(inside, element("p", { class: "dim", role: "status" }, t("loading")));
    for (const button of choice.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.value === (since ?? "")));
    let told;
    try {
      told = listed(await load(since));
    } catch (error) {
      if (!(error instanceof Lost || error instanceof Refused)) throw error;
      told = error.status === 404 ? element("p", { class: "dim" }, t(none)) : trouble(error);
    }
    // Another one was chosen meanwhile.
    if (own === asked) inside.replaceChildren(...[told].flat(Infinity).filter(Boolean));
  };
  const compare = async () => {
    const found = await before?.().catch(() => null);
    if (!found || choice.children.length) return;
    const button = (value, text) => element("button", { type: "button", class: "quiet", value, "aria-pressed": String(!value), click: () => show(value || undefined) }, text);
    choice.append(button("", t("packages.base")), button(found.save, sentence("packages.since", { image: named(found.name) })));
  };
  const details = element("details", { class: "installed" }, element("summary", {}, label), others, choice, inside);
  details.addEventListener("toggle", () => {
    if (!details.open) return;
    show();
    compare();
  });
  return details;
}

/** How the packages of two saves differ. */
export const between = (save, before, label, others) =>
  block(() => get(path("saves", save, "packages"), { since: before }), "packages.unknown.save", null, label, others);

/** What is installed in a running session. */
export const ofSession = (session) => block(() => get(path("sessions", session.id, "packages")), "packages.unknown.session");

/** Which of the versions of a name was saved before this one. IDs of saves grow with time. */
function earlier(versions, image) {
  const older = versions.filter((one) => one.save && one.user === image.user && one.name === image.name && one.save < image.save);
  const last = older.sort((a, b) => (a.save < b.save ? 1 : -1))[0];
  return last && { save: last.save, name: last.tags[0]?.name ?? last.digest.slice(7, 19) };
}

/** What is installed in an image; `versions` returns those of its name that are in the list. */
export function ofImage(image, me, versions) {
  // The one before may be on another page.
  const before = async () => earlier(versions(), image)
    ?? earlier((await get("images", { search: image.name, limit: 500, user: me.administrator ? image.user : null })).images, image);
  return block((since) => get(path("saves", image.save, "packages"), { since }), "packages.unknown.save", before);
}
