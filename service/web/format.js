// How numbers, times and knobs are written. Knobs are named as service/labels.py names them.

import { el } from "/ui/dom.js";

const GENERIC = new Set([
  "base", "beta1", "beta2", "cap", "dim", "dims", "eps", "every", "init", "kind", "level", "lr",
  "lr_scale", "momentum", "mult", "name", "progress", "ratio", "slope", "weight_decay",
  "attention", "embed", "hash", "mlp", "other", "scalar",
]);

/** Name a knob by its last component, with its part in front where that says nothing alone. */
export function knobName(path) {
  const parts = path.split(".");
  const leaf = parts.pop();
  return parts.length && GENERIC.has(leaf) ? `${parts.at(-1)}.${leaf}` : leaf;
}

/** Name several knobs; those whose short names would coincide keep their full paths. */
export function knobNames(paths) {
  const short = paths.map(knobName);
  return new Map(paths.map((path, index) => {
    const isTaken = short.filter((name) => name === short[index]).length > 1;
    return [path, isTaken ? path : short[index]];
  }));
}

/** Write a knob's value in few characters: numbers with 4 significant digits. */
export function shortValue(value) {
  if (value === null || value === undefined) return "none";
  if (typeof value === "boolean") return value ? "on" : "off";
  if (typeof value === "number") {
    return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
  }
  return typeof value === "string" ? value : JSON.stringify(value);
}

export const count = (number) => number.toLocaleString("en-US");

export const bpb = (number) => (number === null || number === undefined ? "–" : number.toFixed(4));

/** How an artifact stands to the cap: "12,345 under the cap". */
export function headroom(bytes, cap) {
  const left = cap - bytes;
  return left >= 0 ? `${count(left)} under` : `${count(-left)} over`;
}

/** Seconds as one or two units: "48 s", "3 h 05 min". */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${pad(whole % 60)} s`;
  if (whole < 172_800) return `${Math.floor(whole / 3600)} h ${pad(Math.floor((whole % 3600) / 60))} min`;
  return `${Math.floor(whole / 86_400)} d ${pad(Math.floor((whole % 86_400) / 3600))} h`;
}

/** Seconds in one unit, for what is added up: "1,234 s", "12.3 h". */
export function hours(seconds) {
  return seconds < 3600 ? `${count(Math.round(seconds))} s` : `${count(Number((seconds / 3600).toFixed(1)))} h`;
}

const pad = (number) => String(number).padStart(2, "0");

function age(at) {
  const seconds = Math.max(0, Date.now() / 1000 - at);
  const units = [[60, 1, "s"], [3600, 60, "min"], [172_800, 3600, "h"], [Infinity, 86_400, "d"]];
  const [, size, unit] = units.find(([limit]) => seconds < limit);
  return `${Math.floor(seconds / size)} ${unit}`;
}

/** An element that tells how long ago something was, and when, to the pointer. */
export function since(at) {
  const date = new Date(at * 1000);
  return el("time", { datetime: date.toISOString(), title: date.toLocaleString(), "data-at": at }, age(at));
}

/** Let every age on the page grow. */
export function growOld() {
  for (const node of document.querySelectorAll("time[data-at]")) node.textContent = age(Number(node.dataset.at));
}

export const clockTime = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");
