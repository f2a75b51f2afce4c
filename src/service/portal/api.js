// Calls to the manager that this page came from. Addresses are relative: a gate may put the page under a prefix.

import { clock } from "./format.js";

const ROOT = new URL("api/v1/", document.baseURI);
const PATIENCE = 20_000;

/** An answer that is no success, from its problem (RFC 9457): `code`, `retryable`, perhaps `field`, `save` and `existing`. */
export class Refused extends Error {
  constructor(status, problem) {
    super(problem?.detail ?? `HTTP ${status}`);
    this.status = status;
    this.code = problem?.code ?? (status === 401 ? "unauthenticated" : status < 500 ? "invalid" : "unavailable");
    this.retryable = problem?.retryable ?? status >= 500;
    this.field = problem?.field;
    this.save = problem?.save;
    this.existing = problem?.existing;
  }
}

/** No answer: the line, or the manager, is away. */
export class Lost extends Error {}

/** Tells `lost`, `back` and `signed-out`. */
export const line = new EventTarget();
let lost = false;

function heard(yes) {
  if (lost === !yes) return;
  lost = !yes;
  line.dispatchEvent(new Event(lost ? "lost" : "back"));
}

export const address = (path) => new URL(path, ROOT);

/** Each part of a path, whatever is in it. */
export const path = (...names) => names.map(encodeURIComponent).join("/");

// What the cookie is worth nothing without. It is kept where other ports of the host read nothing; a browser that keeps
// nothing has it until the page is closed.
const PLACE = `upperdeck-page ${ROOT.pathname}`;
let pageKey = null;
try {
  pageKey = localStorage.getItem(PLACE);
} catch { /* It is forbidden. */ }

/** Keeps the key of a sign-in. */
export function keep(key) {
  pageKey = key;
  try {
    if (key) localStorage.setItem(PLACE, key);
    else localStorage.removeItem(PLACE);
  } catch { /* It is forbidden. */ }
}

export const forget = () => keep(null);

/** What a gate that knows users by a cookie of its own (JupyterHub's services) wants back with each call; the cookie with
 *  the longest path comes first. */
function gateKey() {
  const [, value] = /(?:^|; )_xsrf=([^;]*)/.exec(document.cookie) ?? [];
  return value ? { "X-XSRFToken": value } : {};
}

/** One call; the body of its answer. `key` lets the same request be sent again without being done again. `token`: instead of
 *  who is signed in. */
export async function call(method, where, { body, key, query, token } = {}) {
  const url = address(where);
  for (const [name, value] of Object.entries(query ?? {})) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(name, value);
  }
  const headers = { Accept: "application/json", ...gateKey() };
  if (method !== "GET") {
    // No form of another site can say these.
    headers["Content-Type"] = "application/json";
    headers["Upperdeck-Request"] = "1";
  }
  if (key) headers["Idempotency-Key"] = key;
  if (token) headers.Authorization = `Bearer ${token}`;
  else if (pageKey) headers["Upperdeck-Page"] = pageKey;
  let answer, text;
  try {
    // What cannot be in a header was no token: it is refused like one.
    new Headers(headers);
  } catch {
    throw new Refused(401, { code: "unauthenticated", detail: "", retryable: false });
  }
  try {
    answer = await fetch(url, {
      method,
      headers,
      body: body && JSON.stringify(body),
      cache: "no-store",
      credentials: "same-origin",
      redirect: "error",
      signal: AbortSignal.timeout(PATIENCE),
    });
    text = await answer.text();
  } catch (error) {
    heard(false);
    throw new Lost(error.message);
  }
  // A gate in front says so when the manager is away.
  const away = [502, 503, 504].includes(answer.status) && !text.startsWith("{");
  heard(!away);
  if (away) throw new Lost(`HTTP ${answer.status}`);
  const date = Date.parse(answer.headers.get("Date") ?? "");
  if (!Number.isNaN(date) && Math.abs(date - Date.now()) > 2000) clock.ahead = date - Date.now();
  let said = null;
  try {
    said = JSON.parse(text || "null");
  } catch {
    if (answer.ok) throw new Refused(500, { code: "internal", detail: "the answer is no JSON", retryable: true });
  }
  if (answer.ok) return said;
  if (answer.status === 401 && !token) line.dispatchEvent(new Event("signed-out"));
  throw new Refused(answer.status, said);
}

export const get = (where, query) => call("GET", where, { query });

/** Every entry of a list, however many pages it has; `name` is the entries' name in a page. */
export async function every(where, name, query = {}) {
  const all = [];
  for (let cursor = null; ;) {
    const page = await get(where, { ...query, cursor });
    all.push(...page[name]);
    cursor = page.next;
    if (!cursor) return all;
  }
}

/** Reads server-sent events until they end or `signal` ends them; `hear` gets the name and the data of each. Not by
 *  EventSource, which cannot send the page's key. */
export async function stream(where, query, signal, hear) {
  const url = address(where);
  for (const [name, value] of Object.entries(query)) if (value) url.searchParams.set(name, value);
  const headers = { Accept: "text/event-stream", ...gateKey() };
  if (pageKey) headers["Upperdeck-Page"] = pageKey;
  let answer;
  try {
    answer = await fetch(url, { headers, cache: "no-store", credentials: "same-origin", redirect: "error", signal });
  } catch (error) {
    if (!signal.aborted) heard(false);
    throw new Lost(error.message);
  }
  if (answer.status === 401) line.dispatchEvent(new Event("signed-out"));
  if (!answer.ok) throw new Refused(answer.status, null);
  heard(true);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw new Lost(error.message);
    }
    if (part.done) return;
    const events = (text + part.value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const fields = event.split("\n").map((field) => field.split(/: ?(.*)/s));
      const of = (name) => fields.filter(([field]) => field === name).map(([, said]) => said).join("\n");
      if (of("event")) hear(of("event"), of("data"));
    }
  }
}

/** The same, sent again while there is no answer: only for what is safe to repeat. */
export async function insist(method, where, options) {
  for (let pause = 1000; ; pause *= 2) {
    try {
      return await call(method, where, options);
    } catch (error) {
      if (!(error instanceof Lost) || pause > 8000) throw error;
      await new Promise((over) => setTimeout(over, pause));
    }
  }
}

/** A key for one press of a button. Not `randomUUID`, which is missing without TLS. */
export const pressed = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Does something now and again while the page is seen, and at once when it is seen again or the line is back. */
export function repeat(every, signal, work) {
  let timer, busy = false, again = false;
  const run = async () => {
    clearTimeout(timer);
    if (busy) { again = true; return; }
    busy = true;
    try {
      await work();
    } catch (error) {
      if (!(error instanceof Lost || error instanceof Refused)) throw error;
    } finally {
      busy = false;
      if (!signal.aborted) timer = setTimeout(() => (document.hidden ? null : run()), again ? 0 : lost ? 2000 : every);
      again = false;
    }
  };
  const seen = () => { if (!document.hidden) run(); };
  document.addEventListener("visibilitychange", seen, { signal });
  window.addEventListener("online", run, { signal });
  line.addEventListener("back", run, { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  run();
  return run;
}
