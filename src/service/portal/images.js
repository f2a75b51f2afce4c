// My images: find one, copy its reference, delete it; and how much room there is.

import { Lost, Refused, every, get, insist, path, repeat } from "./api.js";
import { badges } from "./contents.js";
import { announce, ask, copier, element, fill, follow, look, named } from "./element.js";
import { bytes, percent, when } from "./format.js";
import { plain, sentence, t } from "./language.js";
import { ofImage } from "./packages.js";
import { changes, words } from "./saves.js";

const PAGE = 50;

/** Used of what there is. */
function quotaBar(quota) {
  if (typeof quota.used !== "number") return [];
  if (typeof quota.hard !== "number") return element("p", { class: "dim" }, sentence("quota.unbounded", { used: bytes(quota.used), scope: named(quota.scope) }));
  const share = quota.hard > 0 ? quota.used / quota.hard : 1;
  const text = { used: bytes(quota.used), hard: bytes(quota.hard), free: bytes(Math.max(0, quota.hard - quota.used)) };
  const used = element("div", { class: share > 0.9 ? "full" : null });
  used.style.inlineSize = `${100 * Math.min(1, share)}%`;
  const meter = element("div", { class: "meter", role: "meter", "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": Math.round(100 * share),
    "aria-label": t("quota.label", { ...text, share: percent(share) }) }, used);
  return element("div", { class: "quota" }, element("p", {}, sentence("quota", text), " ", element("span", { class: "dim" }, named(quota.scope))), meter,
    share > 0.9 ? element("p", { class: "wrong" }, t("quota.full")) : null);
}

/** Deletes a tag, after a question. `done` is told what came of it. */
export async function remove(image, tag, me, done) {
  const last = image.tags.length === 1;
  const others = image.tags.filter((other) => other !== tag).map((other) => other.name);
  const body = [
    element("p", {}, last
      ? sentence("delete.last", { size: typeof image.size === "number" ? bytes(image.size) : t("size.unknown") })
      : sentence("delete.other", { tags: named(others.join(", ")) })),
    element("p", { class: "mono" }, named(tag.reference)),
    image.message ? element("p", { class: "message" }, named(image.message)) : null,
    element("p", {}, t("delete.forever")),
  ];
  const what = `${image.name}:${tag.name}`;
  if (!await ask(sentence("delete.title", { image: named(what) }), body, t("delete.yes"))) return;
  try {
    await insist("DELETE", path("images", image.name, "tags", tag.name), { query: { user: me.administrator ? image.user : null } });
    done(t("deleted", { image: what }));
  } catch (error) {
    if (error instanceof Refused && error.status === 404) return done(t("deleted.before", { image: what }));
    if (!(error instanceof Refused || error instanceof Lost)) throw error;
    done(null, [error.code === "conflict" ? t("delete.busy") : words(error)[0], words(error)[1]]);
  }
}

/** Gives an image another tag, in place of this one or beside it. */
async function rename(image, tag, me, done, replace) {
  const what = `${image.name}:${tag.name}`;
  const name = element("input", { id: "new-tag", autocomplete: "off", spellcheck: "false", autocapitalize: "none", maxlength: "128", dir: "ltr" });
  name.value = replace?.tag ?? tag.name;
  const keep = element("input", { type: "checkbox", id: "keep-tag", checked: replace?.keep ?? false });
  const body = [
    replace ? element("p", { class: "problem" }, named(replace.message)) : null,
    element("div", { class: "field" }, element("label", { for: "new-tag" }, t("rename.field")), name),
    element("div", { class: "check" }, keep, element("label", { for: "keep-tag" }, sentence("rename.keep", { tag: named(tag.name) })))];
  if (!await ask(sentence("rename.title", { image: named(what) }), body, t(replace ? "rename.replace" : "rename"), t("rename.not"))) return;
  const asked = { tag: name.value.trim(), keep: keep.checked };
  if (replace && replace.tag === asked.tag) asked.replace = replace.digest;
  try {
    const now = await insist("POST", path("images", image.name, "tags", tag.name), { body: asked, query: { user: me.administrator ? image.user : null } });
    done(t(now.kept && !asked.keep ? "renamed.kept" : "renamed", { image: what, tag: now.tag }));
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Lost)) throw error;
    if (error.code === "tag_exists" && error.existing) {
      return rename(image, tag, me, done, { ...asked, digest: error.existing.digest, message: error.message });
    }
    done(null, words(error));
  }
}

async function removeUntagged(image, me, done) {
  const what = `${image.name}@${image.digest.slice(0, 19)}`;
  const size = typeof image.size === "number" ? bytes(image.size) : t("size.unknown");
  const body = [element("p", {}, sentence("delete.untagged", { size })), element("p", { class: "mono" }, named(image.digest)), element("p", {}, t("delete.forever"))];
  if (!await ask(sentence("delete.title", { image: named(what) }), body, t("delete.yes"))) return;
  try {
    await insist("DELETE", path("images", image.name, "digests", image.digest), { query: { user: me.administrator ? image.user : null } });
    done(t("deleted", { image: what }));
  } catch (error) {
    if (error instanceof Refused && error.status === 404) return done(t("deleted.before", { image: what }));
    if (!(error instanceof Refused || error instanceof Lost)) throw error;
    done(null, words(error));
  }
}

/** A word of a command line. */
export const word = (text) => (/^[\w./:@+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** How an image is started by hand. */
function commands(image, reference) {
  if (reference.startsWith("oci:")) return [["Podman", `podman run -it --rm ${word(reference)}`], ["Apptainer", `apptainer run ${word(reference)}`]];
  const pod = image.name.replace(/[^a-z0-9]+/g, "-").slice(0, 60);
  return [["Docker", `docker run -it --rm ${word(reference)}`], ["Podman", `podman run -it --rm ${word(reference)}`],
    ["Apptainer", `apptainer run ${word(`docker://${reference}`)}`], ["kubectl", `kubectl run ${pod} -it --rm --image=${word(reference)}`]];
}

/** The link that starts a session from an image, where there is one. */
export const start = (me, reference) => me.start_url
  ? element("a", { class: "start", href: me.start_url.replace("{reference}", () => encodeURIComponent(reference)), rel: "noreferrer", "aria-label": t("start.what", { image: reference }) }, t("start"))
  : null;

/** Changes what is said about an image. */
export async function say(image, change, me, done, said) {
  try {
    await insist("PATCH", path("images", image.name, "digests", image.digest), { body: change, query: { user: me.administrator ? image.user : null } });
    done(said);
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Lost)) throw error;
    done(null, words(error));
  }
}

/** Takes an image that another user shares out of the list. */
async function decline(image, done) {
  const what = `${image.name}@${image.digest.slice(7, 19)}`;
  if (!await ask(sentence("decline.title", { image: named(what) }), element("p", {}, sentence("decline.body", { user: named(image.user) })), t("decline"), t("keep"))) return;
  try {
    await insist("DELETE", path("shared", image.user, image.name, "digests", image.digest), {});
    done(t("declined", { image: what }));
  } catch (error) {
    if (error instanceof Refused && error.status === 404) return done(t("declined", { image: what }));
    if (!(error instanceof Refused || error instanceof Lost)) throw error;
    done(null, words(error));
  }
}

/** Describe and share, for who opens it. */
function edit(image, me, done) {
  const id = `i-${image.digest.slice(7, 19)}`;
  const text = element("textarea", { id: `${id}-d`, rows: "2", maxlength: "1000", dir: "auto" });
  text.value = image.message ?? "";
  const people = element("input", { id: `${id}-s`, autocomplete: "off", spellcheck: "false", autocapitalize: "none", dir: "ltr" });
  people.value = (image.shared ?? []).join(", ");
  const groups = element("input", { id: `${id}-g`, autocomplete: "off", spellcheck: "false", autocapitalize: "none", dir: "ltr" });
  groups.value = (image.shared_groups ?? []).join(", ");
  const list = (input) => input.value.split(",").map((one) => one.trim()).filter(Boolean);
  return element("details", { class: "more" }, element("summary", {}, t("image.edit")),
    element("form", {
      submit: (event) => {
        event.preventDefault();
        say(image, { description: text.value.trim(), shared: list(people), shared_groups: list(groups) }, me, done, t("image.changed.said", { image: image.name }));
      },
    },
    element("div", { class: "field" }, element("label", { for: text.id }, t("field.message")), text),
    element("div", { class: "field" }, element("label", { for: people.id }, t("share")), people, element("p", { class: "dim" }, t("share.hint"))),
    element("div", { class: "field" }, element("label", { for: groups.id }, t("share.groups")), groups,
      me.groups?.length ? element("p", { class: "dim" }, sentence("share.groups.yours", { groups: named(me.groups.slice(0, 20).join(", ")) })) : null),
    element("button", {}, t("image.apply"))));
}

/** One version of an image: a save. `others`: it is another user's, who shares it. */
function version(first, me, done, others, versions) {
  const message = element("p", { class: "message" });
  const meta = element("p", { class: "dim metas" });
  const tags = element("ul", { class: "tags" });
  const bare = element("p");
  const use = element("details", { class: "commands" });
  const pin = element("button", { type: "button", class: "quiet" });
  const block = element("div", { class: "version" }, message, meta, tags, bare,
    element("div", { class: "tools-of" }, others || !first.save ? null : ofImage(first, me, versions), use,
      others ? element("button", { type: "button", class: "quiet", "aria-label": t("decline.what", { image: `${first.user}/${first.name}` }), click: () => decline(first, done) }, t("decline")) : [edit(first, me, done), pin]));
  let image = first;
  pin.addEventListener("click", () => say(image, { pinned: !image.pinned }, me, done, t(image.pinned ? "unpinned" : "pinned", { image: image.name })));
  const update = (now) => {
    image = now;
    message.hidden = !image.message;
    fill(message, image.message ? named(image.message) : "");
    const told = [
      image.pinned ? element("strong", {}, t("image.pinned")) : null,
      typeof image.size === "number" ? bytes(image.size) : null,
      image.changed ? sentence("image.changed", { time: when(image.changed) }) : null,
      image.base ? sentence("image.base", { base: named(image.base) }) : null,
      image.session_name ? sentence("image.session", { session: named(image.session_name) }) : null,
      typeof image.pulls === "number" ? t("image.pulls", { n: image.pulls }) : null,
      image.user !== me.user ? sentence("image.user", { user: named(image.user) }) : null,
      image.shared?.length ? sentence("image.shared", { users: named(image.shared.join(", ")) }) : null,
      image.shared_groups?.length ? sentence("image.shared.groups", { groups: named(image.shared_groups.join(", ")) }) : null,
      element("code", { title: image.digest, dir: "ltr" }, image.digest.replace(/^sha256:/, "").slice(0, 12)),
    ].filter(Boolean);
    fill(meta, told.map((part) => element("span", {}, part)));
    fill(pin, t(image.pinned ? "unpin" : "pin"));
    pin.setAttribute("aria-label", t(image.pinned ? "unpin.what" : "pin.what", { image: image.tags[0] ? `${image.name}:${image.tags[0].name}` : `${image.name}@${image.digest.slice(7, 19)}` }));
    bare.hidden = image.tags.length > 0;
    fill(bare, image.tags.length ? "" : [element("span", { class: "dim" }, t("untagged")), " ",
      others || image.pinned ? null : element("button", { type: "button", class: "quiet danger", "aria-label": t("delete.what", { image: `${image.name}@${image.digest}` }),
        click: () => removeUntagged(image, me, done) }, t("delete"))]);
    follow(tags, image.tags, (tag) => tag.name + tag.immutable + image.pinned, (tag) => ({
      element: element("li", {},
        element("code", { title: plain(tag.reference), dir: "ltr" }, named(tag.name)),
        start(me, tag.reference),
        copier(tag.reference),
        others ? null : element("button", { type: "button", class: "quiet", "aria-label": t("rename.what", { image: `${image.name}:${tag.name}` }),
          click: () => rename(image, tag, me, done) }, t("rename")),
        others ? null : tag.immutable || image.pinned ? element("span", { class: "dim" }, t("immutable"))
          : element("button", { type: "button", class: "quiet danger", "aria-label": t("delete.what", { image: `${image.name}:${tag.name}` }),
            click: () => remove(image, tag, me, done) }, t("delete"))),
      update() {},
    }));
    const reference = image.tags[0]?.reference ?? `${image.repository}@${image.digest}`;
    if (use.dataset.of !== reference) {
      use.dataset.of = reference;
      use.replaceChildren(element("summary", {}, t("commands")), element("ul", {}, commands(image, reference).map(([program, command]) =>
        element("li", {}, element("span", { class: "dim" }, program), element("code", { dir: "ltr" }, plain(command)), copier(command)))));
    }
  };
  return { element: block, update };
}

/** Versions of one name, the first given first. */
function grouped(images) {
  const groups = new Map();
  for (const image of images) {
    const key = `${image.user}/${image.name}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(image);
  }
  return [...groups].map(([key, versions]) => ({ key, versions }));
}

/** An image's name with its versions below. */
function row({ versions: [first] }, me, done, others) {
  const heading = element("h2");
  const list = element("div");
  const block = element("article", { class: "card image" }, heading, list);
  let now = [];
  const update = ({ versions }) => {
    now = versions;
    fill(heading, named(first.name), " ", element("span", { class: "badges" }, badges(versions[0])));
    follow(list, versions, (image) => image.digest, (image) => version(image, me, done, others, () => now));
  };
  return { element: block, update };
}

const choice = (id, label, key, values) => {
  const select = element("select", { id }, values.map((value) => element("option", { value }, t(`${key}.${value || "any"}`))));
  return { select, element: element("div", { class: "field" }, element("label", { for: id }, label), select) };
};

/** The view. */
export function view(main, signal, me, heading) {
  const room = element("div");
  const search = element("input", { type: "search", id: "find-image", autocomplete: "off", placeholder: t("images.search.hint") });
  const sort = choice("sort", t("sort"), "sort", ["updated", "name", "size"]);
  const category = choice("category", t("category"), "category", ["", "cpu", "gpu"]);
  const all = element("input", { type: "checkbox", id: "everyone", checked: !me.user });
  const error = element("div", { class: "alert" });
  const news = element("div");
  const count = element("p", { class: "dim", role: "status" });
  const list = element("div", { class: "cards" });
  const back = element("button", { type: "button" }, t("page.before"));
  const on = element("button", { type: "button" }, t("page.next"));
  const where = element("span", { class: "dim" });
  const pages = element("nav", { class: "pages", "aria-label": t("pages"), hidden: true }, back, where, on);
  const shared = element("div", { class: "cards" });
  const others = element("section", { class: "others", hidden: true }, element("h2", {}, t("images.shared")), shared);
  main.append(room, element("form", { class: "tools", role: "search", submit: (event) => event.preventDefault() },
    element("div", { class: "field grow" }, element("label", { for: "find-image" }, t("images.search")), search), sort.element, category.element,
  me.administrator && me.user ? element("div", { class: "check" }, all, element("label", { for: "everyone" }, t("images.everyone"))) : null),
  error, news, count, list, pages, others);

  // The cursors of the pages that were turned, the first of which has none.
  let cursors = [null], next = null;
  const run = repeat(30_000, signal, async () => {
    every("shared", "images").then((images) => {
      others.hidden = !images.length;
      follow(shared, grouped(images), ({ key }) => key, (group) => row(group, me, done, true));
    }, () => {});
    get("quota").then((quota) => fill(room, quotaBar(quota)), () => {});
    try {
      const query = { cursor: cursors.at(-1), limit: PAGE, search: search.value.trim(), sort: sort.select.value, category: category.select.value,
        user: me.administrator && !all.checked ? me.user : null };
      const found = await get("images", query);
      const page = cursors.length;
      if (!found.images.length && page > 1) {
        cursors = [null];
        return setTimeout(run);
      }
      follow(list, grouped(found.images), ({ key }) => key, (group) => row(group, me, done));
      const last = Math.max(1, Math.ceil(found.total / PAGE));
      pages.hidden = last === 1;
      back.disabled = page === 1;
      on.disabled = !found.next;
      next = found.next;
      fill(where, t("page", { page, last }));
      fill(count, found.total ? t("images.count", { n: found.total }) : t(query.search || query.category ? "images.no-match" : "images.none"));
    } catch (caught) {
      fill(count, words(caught)[0]);
      throw caught;
    }
  });
  const done = (said, wrong) => {
    fill(error, wrong ? element("p", { class: "problem" }, element("strong", {}, wrong[0]), " ", named(wrong[1])) : "");
    fill(news, said ? element("p", { class: "done" }, said) : "");
    announce(said ?? wrong.join(" "), !said);
    if (said) look(heading);
    run();
  };
  let typed;
  const changed = () => { cursors = [null]; clearTimeout(typed); typed = setTimeout(run, 250); };
  for (const [control, event] of [[search, "input"], [sort.select, "change"], [category.select, "change"], [all, "change"]]) control.addEventListener(event, changed);
  const turn = (to) => { cursors = to; run(); look(heading); };
  back.addEventListener("click", () => turn(cursors.slice(0, -1)));
  on.addEventListener("click", () => turn([...cursors, next]));
  changes.addEventListener("ended", ({ detail: save }) => { if (save.state === "succeeded") run(); }, { signal });
}
