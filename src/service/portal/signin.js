// Signing in and out. A token is shown once, by a press: a link alone signs no user in, and replaces none.

import { Lost, Refused, call, forget, keep, line } from "./api.js";
import { announce, element, fill, look, named, problem } from "./element.js";
import { sentence, t } from "./language.js";
import { words } from "./saves.js";

/** The token of the link that led here. It goes out of the address and the history at once. */
export function ofLink() {
  const token = new URLSearchParams(location.search).get("token");
  if (location.search) history.replaceState(null, "", location.pathname + location.hash);
  return token;
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

/** What to do for who is not signed in. A link or a token may be put in. */
export function form(main, wrong) {
  if (document.getElementById("token")) return;
  const input = element("input", { id: "token", autocomplete: "off", spellcheck: "false", autocapitalize: "none", dir: "ltr" });
  const said = element("div", { role: "alert" }, wrong);
  const heading = element("h1", {}, t("signin"));
  main.replaceChildren(heading, element("form", {
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
  element("button", { class: "main" }, t("signin.go"))));
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
    try {
      await call("DELETE", "signin");
    } catch (error) {
      if (!(error instanceof Lost || error instanceof Refused)) throw error;
      event.target.disabled = false;
      return announce(words(error).join(" "), true);
    }
    forget();
    line.dispatchEvent(new CustomEvent("signed-out", { detail: t("signin.left") }));
  },
}, t("signout"));
