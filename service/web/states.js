// A state is told by its word and by a shape; colour only helps.

import { el, svg } from "/ui/dom.js";

export const ACTIVE = ["queued", "waiting", "starting", "running", "finalizing", "paused"];
export const ENDED = ["succeeded", "infeasible", "illegal", "stopped", "cancelled", "failed", "lost"];
export const ACTS = ["starting", "running", "finalizing"];

const RING = ["circle", { cx: 6, cy: 6, r: 4.4 }];
const line = (d) => ["path", { d }];
const solid = (d) => ["path", { d, class: "solid" }];
const SHAPES = {
  queued: [RING],
  waiting: [RING, line("M6 3.4V6l1.8 1.2")],
  starting: [line("M3.4 2.2 9.8 6 3.4 9.8Z")],
  running: [solid("M3.4 2.2 9.8 6 3.4 9.8Z")],
  finalizing: [RING, solid("M6 1.6a4.4 4.4 0 0 1 0 8.8Z")],
  paused: [solid("M3 2h2v8H3ZM7 2h2v8H7Z")],
  succeeded: [line("M2 6.6 4.8 9.4 10 3")],
  infeasible: [line("M6 1.4 10.6 6 6 10.6 1.4 6Z")],
  illegal: [RING, line("M4.2 4.2 7.8 7.8M7.8 4.2 4.2 7.8")],
  stopped: [solid("M2.6 2.6h6.8v6.8H2.6Z")],
  cancelled: [RING, line("M3 9 9 3")],
  failed: [line("M2.4 2.4 9.6 9.6M9.6 2.4 2.4 9.6")],
  lost: [["circle", { cx: 6, cy: 6, r: 4.4, "stroke-dasharray": "2 1.8" }]],
};

/** The shape of a state alone, for where its word stands beside it. */
export function shape(state) {
  const marks = (SHAPES[state] ?? [RING]).map(([name, facts]) => svg(name, facts));
  return svg("svg", { viewBox: "0 0 12 12", class: "shape", "aria-hidden": "true" }, ...marks);
}

/** A state's shape and word. */
export function badge(state) {
  return el("span", { class: "state", "data-state": state }, shape(state), state);
}

/** What a sweep has been told and has not done yet, as a word. */
export function pending(sweep) {
  return { pause: "pausing", stop: "stopping", cancel: "cancelling" }[sweep.want] ?? null;
}

/** Finals by state, as shapes with numbers: the states that have any. */
export function tally(counts) {
  const named = Object.entries(counts).filter(([, number]) => number > 0);
  return el("span", { class: "tally" }, ...named.map(([state, number]) =>
    el("span", { class: "state", "data-state": state, title: `${number} ${state}` },
      shape(state), String(number), el("span", { class: "unseen" }, ` ${state}`))));
}
