// Signing in and out. A token is shown once, by a press: a link alone signs no user in, and replaces none.

import { Lost, Refused, address, call, forget, get, keep, line } from "./api.js";
import { announce, element, fill, look, named, problem } from "./element.js";
import { sentence, t } from "./language.js";
import { words } from "./saves.js";

// What a sign-in at the identity provider needs at its end, and the view it began in. It is kept for this tab alone.
const FLOW = `upperdeck-signin ${address("").pathname}`;

/** The token of the link that led here, or the answer of the identity provider. They go out of the address and the history
 *  at once. */
export function ofLink() {
  const query = new URLSearchParams(location.search);
  if (location.search) history.replaceState(null, "", location.pathname + location.hash);
  const names = ["state", "code", "iss", "error", "error_description"].filter((name) => query.has(name));
  const answered = query.has("state") && (query.has("code") || query.has("error"));
  return {
    token: query.get("token"),
    answer: answered ? Object.fromEntries(names.map((name) => [name, query.get(name)])) : null,
  };
}

/** Goes to the identity provider; what went wrong comes back. */
async function begin() {
  try {
    const { url, key } = await call("POST", "signin/oidc", { body: {} });
    sessionStorage.setItem(FLOW, JSON.stringify({ key, view: location.hash }));
    location.assign(url);
    return null;
  } catch (error) {
    if (error instanceof DOMException) return problem(t("signin.cookies"), "", "");
    return trouble(error);
  }
}

/** Completes a sign-in at the identity provider; what went wrong comes back. */
export async function complete(answer) {
  let begun = null;
  try {
    begun = JSON.parse(sessionStorage.getItem(FLOW));
    sessionStorage.removeItem(FLOW);
  } catch { /* It is forbidden, or was not begun here: the manager says so. */ }
  let good = false;
  try {
    keep((await call("POST", "signin/oidc/answer", { body: { ...answer, key: begun?.key ?? "" } })).key);
    good = true;
    await call("GET", "me");
  } catch (error) {
    if (good && error.status === 401) return problem(t("signin.cookies"), "", error.message);
    return trouble(error);
  }
  history.replaceState(null, "", location.pathname + (begun.view.startsWith("#") ? begun.view : ""));
  return null;
}

const name = (me) => named(me.user || t("administrator"));

function trouble(error) {
  if (!(error instanceof Refused || error instanceof Lost)) throw error;
  if (error.status === 401) return problem(t("signin.wrong"), t("signin.wrong.advice"), error.message);
  return problem(words(error)[0], "", words(error)[1]);
}

/** Signs in and begins anew; what went wrong comes back. */
async function enter(token) {
  let good = false;
  try {
    keep((await call("POST", "signin", { body: { replace: true }, token })).key);
    good = true;
    await call("GET", "me");
    location.reload();
    return null;
  } catch (error) {
    // The token was good, and then the browser sent no cookie.
    if (good && error.status === 401) return problem(t("signin.cookies"), "", error.message);
    return trouble(error);
  }
}

/** What to do for who is not signed in: the identity provider, where there is one, or a link or a token. */
export async function form(main, wrong) {
  if (main.dataset.signin || document.getElementById("token") || document.getElementById("provider")) return;
  main.dataset.signin = "asked";
  main.replaceChildren();
  const ways = await get("signin/ways").catch((error) => {
    if (!(error instanceof Lost || error instanceof Refused)) throw error;
    return { token: true };
  });
  delete main.dataset.signin;
  const input = element("input", { id: "token", autocomplete: "off", spellcheck: "false", autocapitalize: "none", dir: "ltr" });
  const said = element("div", { role: "alert" }, wrong);
  const heading = element("h1", {}, t("signin"));
  const provider = ways.provider ? element("div", { class: "card" }, ways.token ? null : said,
    element("p", {}, t("signin.provider.how")),
    element("button", {
      type: "button", class: "main", id: "provider",
      click: async (event) => {
        event.target.disabled = true;
        fill(said, await begin());
        event.target.disabled = false;
      },
    }, sentence("signin.provider", { name: named(ways.provider) }))) : null;
  const tokens = ways.token ? element("form", {
    class: "card",
    submit: async (event) => {
      event.preventDefault();
      const text = input.value.trim();
      const token = text.includes("?") ? new URLSearchParams(text.slice(text.indexOf("?")).split("#")[0]).get("token") : text;
      if (!token) return input.focus();
      fill(said);
      fill(said, await enter(token));
      input.focus();
    },
  },
  said, element("p", {}, t("signin.how")),
  element("div", { class: "field" }, element("label", { for: "token" }, t("signin.field")), input),
  element("button", { class: ways.provider ? null : "main" }, t("signin.go"))) : null;
  main.replaceChildren(...[heading, provider, tokens].filter(Boolean));
  document.title = `${t("signin")} – upperdeck`;
  look(heading);
}

/** Asks about the token of a link; goes on when nothing is to be asked, or it is answered with no. */
export async function offer(main, token, me) {
  let other = null, wrong = null;
  try {
    other = await call("GET", "me", { token });
  } catch (error) {
    wrong = trouble(error);
  }
  if (!me && !other) {
    form(main, wrong);
    return false;
  }
  const same = me && other && me.user === other.user && me.administrator === other.administrator;
  if (same) return true;
  if (me?.via === "proxy") wrong = problem(t("signin.gate"), "", "");
  const said = element("div", { role: "alert" }, wrong);
  const heading = element("h1", {}, t("signin.offer"));
  return new Promise((answer) => {
    const go = element("button", { type: "button", class: "main", id: "enter", click: async () => fill(said, await enter(token)) }, t("signin.go"));
    const stay = element("button", { type: "button", id: "stay", click: () => answer(true) }, me ? sentence("signin.stay", { user: name(me) }) : t("signin.not"));
    main.replaceChildren(heading, element("div", { class: "card" }, said,
      wrong ? null : element("p", {}, sentence("signin.as", { user: name(other) })),
      me ? element("p", {}, sentence("signin.now", { user: name(me) })) : null,
      element("div", { class: "answers" }, wrong ? null : go, stay)));
    document.title = `${t("signin.offer")} – upperdeck`;
    look(heading);
  });
}

/** A button that signs out; none where a gate says who the user is. */
export const leave = (me) => me.via !== "sign_in" ? null : element("button", {
  type: "button", class: "quiet", id: "leave",
  click: async (event) => {
    event.target.disabled = true;
    let left = null;
    try {
      left = await call("DELETE", "signin");
    } catch (error) {
      if (!(error instanceof Lost || error instanceof Refused)) throw error;
      event.target.disabled = false;
      return announce(words(error).join(" "), true);
    }
    forget();
    // The identity provider ends its own session, and comes back.
    if (left?.provider) return location.assign(left.provider);
    line.dispatchEvent(new CustomEvent("signed-out", { detail: t("signin.left") }));
  },
}, t("signout"));
