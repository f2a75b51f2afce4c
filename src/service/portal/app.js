// The frame: who is signed in, which view is shown, whether the line is there.

import { Lost, Refused, get, line } from "./api.js";
import { element, fill, look, named } from "./element.js";
import { language, t } from "./language.js";
import { view as history } from "./history.js";
import { view as images } from "./images.js";
import { view as operations } from "./operations.js";
import { view as sessions } from "./sessions.js";
import { complete, form, leave as out, ofLink, offer } from "./signin.js";
import { follow, words } from "./saves.js";

const VIEWS = { sessions, images, history, operations };

document.documentElement.lang = language;

const SVG = "http://www.w3.org/2000/svg";
function mark() {
  const drawing = document.createElementNS(SVG, "svg");
  for (const [name, value] of Object.entries({ viewBox: "0 0 32 32", width: "24", height: "24", "aria-hidden": "true" })) drawing.setAttribute(name, value);
  for (const [shape, d] of [["deck", "M16 3 30 10 16 17 2 10z"], ["under", "m3 16 13 6.500 13-6.500M3 22l13 6.500 13-6.500"]]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    path.setAttribute("class", shape);
    drawing.append(path);
  }
  return drawing;
}

const links = element("ul");
const who = element("p", { class: "who" });
const lostLine = element("p", { class: "lost", role: "status" });
const main = element("main", { id: "main" });
document.body.replaceChildren(
  element("a", { href: "#main", class: "skip", click: (event) => { event.preventDefault(); look(main); } }, t("skip")),
  element("header", {}, element("div", { class: "frame" },
    element("p", { class: "brand" }, mark(), "upperdeck"),
    element("nav", { "aria-label": t("nav") }, links), who)),
  lostLine, main,
  element("p", { id: "news", class: "unseen", role: "status" }),
  element("p", { id: "alerts", class: "unseen", role: "alert" }));

let me = null;
let current = null;
let leave = new AbortController();

/** Shows the view that the address names; the first time the focus stays where the browser has it. */
function show(moved) {
  if (!me) return;
  const allowed = Object.keys(VIEWS).filter((name) => name !== "operations" || me.administrator);
  const asked = location.hash.replace(/^#\/?/, "");
  const name = allowed.includes(asked) ? asked : "sessions";
  if (name === current && moved) return;
  current = name;
  leave.abort();
  leave = new AbortController();
  const heading = element("h1", {}, t(`view.${name}`));
  main.replaceChildren(heading);
  links.replaceChildren(...allowed.map((one) =>
    element("li", {}, element("a", { href: `#/${one}`, "aria-current": one === name ? "page" : null }, t(`view.${one}`)))));
  document.body.dataset.title = `${t(`view.${name}`)} – upperdeck`;
  document.title = document.body.dataset.title;
  VIEWS[name](main, leave.signal, me, heading);
  if (moved) look(heading);
}

/** Who is not signed in, or not any more; `said` is why, `wrong` what went wrong. */
function signIn(said, wrong) {
  leave.abort();
  me = current = null;
  links.replaceChildren();
  fill(who);
  form(main, wrong ?? (said && element("p", { class: "done" }, said)));
}

/** Returns who is signed in, as soon as the server answers; nothing if no user is. */
async function whoIs() {
  for (;;) {
    try {
      return await get("me");
    } catch (error) {
      if (error instanceof Refused && error.status === 401) return null;
      if (!(error instanceof Lost || error instanceof Refused)) throw error;
      main.replaceChildren(element("h1", {}, "upperdeck"), element("p", { class: "empty" }, words(error)[0]));
      await new Promise((over) => setTimeout(over, 3000));
    }
  }
}

async function start() {
  const { token, answer } = ofLink();
  const wrong = answer ? await complete(answer) : null;
  const found = await whoIs();
  if (token && !await offer(main, token, found)) return;
  if (!found) return signIn(null, wrong);
  me = found;
  follow(me);
  line.addEventListener("signed-out", ({ detail }) => signIn(detail ?? t("signin.over")));
  fill(who, me.user ? named(me.user) : null, me.administrator ? element("span", { class: "badge" }, t("administrator")) : null, out(me));
  show(false);
}

line.addEventListener("lost", () => fill(lostLine, t("line.lost")));
line.addEventListener("back", () => fill(lostLine));
window.addEventListener("hashchange", () => show(true));
start();
