// Sizes, times and rates as people write them.

import { locale, t } from "./language.js";

const unit = (name, digits, display = "short") =>
  new Intl.NumberFormat(locale, { style: "unit", unit: name, unitDisplay: display, maximumFractionDigits: digits });
const SIZES = ["byte", "kilobyte", "megabyte", "gigabyte", "terabyte"].map((name) => [unit(name, 0), unit(name, 1)]);
const [SECONDS, MINUTES, HOURS, DAYS] = ["second", "minute", "hour", "day"].map((name) => unit(name, 0));
const MILLISECONDS = unit("millisecond", 0);
const relative = new Intl.RelativeTimeFormat(locale, { numeric: "auto" });
const exact = new Intl.DateTimeFormat(locale, { dateStyle: "medium", timeStyle: "short" });
const whole = new Intl.NumberFormat(locale, { style: "percent", maximumFractionDigits: 0 });
const count = new Intl.NumberFormat(locale);

/** What the server's clock is ahead of this one, in milliseconds: ages are told by the server's. */
export const clock = { ahead: 0 };

/** 1000 and 1.2 GB. */
export function bytes(number) {
  let [size, step] = [number, 0];
  while (size >= 999.5 && step < SIZES.length - 1) {
    size /= 1000;
    step += 1;
  }
  return SIZES[step][step > 0 && size < 99.95 ? 1 : 0].format(size);
}

export const number = (value) => count.format(value);
export const percent = (share) => whole.format(share);
export const milliseconds = (value) =>
  value < 1000 ? MILLISECONDS.format(Math.max(1, Math.round(value))) : unit("second", 1).format(value / 1000);

/** 40 sec, 3 min 20 sec, 2 hr 5 min, 4 days. */
export function duration(seconds) {
  const all = Math.max(0, Math.round(seconds));
  if (all < 60) return SECONDS.format(all);
  const [minutes, hours, days] = [Math.floor(all / 60), Math.floor(all / 3600), Math.floor(all / 86400)];
  const two = (large, rest, small) => (rest ? `${large} ${small.format(rest)}` : large);
  if (minutes < 60) return two(MINUTES.format(minutes), minutes < 10 ? all % 60 : 0, SECONDS);
  if (hours < 48) return two(HOURS.format(hours), hours < 10 ? minutes % 60 : 0, MINUTES);
  return DAYS.format(days);
}

/** A time that is still to come: no finer than it can be known, so that it does not flicker. */
export function left(seconds) {
  if (seconds < 5) return t("seconds.few");
  const step = seconds < 30 ? 5 : seconds < 120 ? 10 : 60;
  return t("about", { time: duration(Math.ceil(seconds / step) * step) });
}

export const since = (instant) => (Date.now() + clock.ahead - Date.parse(instant)) / 1000;

function ago(instant) {
  if (since(instant) < -5) return relative.format(Math.round(-since(instant)), "second");
  const seconds = Math.max(0, since(instant));
  if (seconds < 45) return t("now");
  if (seconds < 3600) return relative.format(-Math.max(1, Math.round(seconds / 60)), "minute");
  if (seconds < 86400) return relative.format(-Math.round(seconds / 3600), "hour");
  if (seconds < 30 * 86400) return relative.format(-Math.round(seconds / 86400), "day");
  return new Intl.DateTimeFormat(locale, { dateStyle: "medium" }).format(new Date(instant));
}

/** An instant, told by how long ago it was; exactly for who asks. */
export function when(instant) {
  const made = document.createElement("time");
  made.dateTime = instant;
  if (Number.isNaN(Date.parse(instant))) return made;
  made.title = exact.format(new Date(instant));
  made.textContent = ago(instant);
  return made;
}

/** An instant, exactly. */
export const moment = (instant) => exact.format(new Date(instant));
