// What a save of a session would put into the image, how long that takes, and what stays outside.

import { element, named } from "./element.js";
import { bytes, duration, left } from "./format.js";
import { sentence, t } from "./language.js";

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

/** What the next save reads. */
export function amount(session, saves) {
  const { next } = session;
  const size = next?.bytes ?? (next?.delta ? null : session.upper_bytes);
  const what = typeof size === "number"
    ? t(next?.delta ? "next.delta" : "next.full", { size: bytes(size) })
    : t(next?.delta ? "next.delta.unknown" : "next.full.unknown");
  const time = suggested(session, saves);
  return time ? [what, " · ", time] : what;
}

/** What stays outside, said plainly: the data first, the system's own mounts for who asks. */
export function outside(session) {
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

/** The last part of an image's name, for where there is little room. */
export const short = (image) => image.slice(image.lastIndexOf("/") + 1).replace(/(@sha256:[0-9a-f]{12})[0-9a-f]{52}$/, "$1…");
