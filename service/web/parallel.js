// Parallel coordinates over the knobs that vary, drawn as plain lines on axes of our own.

import { colour, draw, plain } from "/ui/charts.js";
import { bpb, knobNames, shortValue } from "/ui/format.js";

const MOST_LINES = 1_500;
const FEW = 8; // values that each get a tick
const BINS = 7;
const PER_AXIS = 110;
// Viridis without its pale end; the first is the lowest bpb.
const LIGHT = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#9fd34b"];
const DARK = ["#fde725", "#c2df23", "#86d549", "#3dbc74", "#24868e", "#34618d", "#4b4a8f"];

/** Draw one line per scored final, coloured by bpb. */
export async function drawParallel(node, { points, varying, best }) {
  const shown = points.slice().sort((a, b) => a.val_bpb - b.val_bpb).slice(0, MOST_LINES);
  const names = knobNames(varying);
  const axes = [
    ...varying.map((path) => axisOf(names.get(path), shown.map((point) => point.point[path]))),
    axisOf("artifact MB", shown.map((point) => point.artifact_bytes / 1e6)),
    axisOf("val bpb", shown.map((point) => point.val_bpb), bpb),
  ];
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const able = indices(shown, (point) => point.state === "succeeded");
  const rest = indices(shown, (point) => point.state !== "succeeded");
  const ramp = isDark ? DARK : LIGHT;
  const traces = [lines(axes, rest, { color: colour("--quiet"), width: 0.8, dash: "dot" })];
  for (let bin = BINS - 1; bin >= 0; bin -= 1) {
    const held = able.filter((_, place) => Math.floor((place * BINS) / able.length) === bin);
    traces.push(lines(axes, held, { color: ramp[bin], width: 1.3 }));
  }
  const top = indices(shown, (point) => best !== null && point.final === best.final);
  traces.push(lines(axes, top, { color: colour("--ink"), width: 3.2 }));
  node.style.minWidth = `${PER_AXIS * axes.length}px`;
  const label = `Parallel coordinates of ${shown.length} finals over ${varying.map((path) => names.get(path)).join(", ")}`;
  await draw(node, traces.filter((trace) => trace.x.length), layout(axes), label);
}

const indices = (rows, keep) => rows.flatMap((row, index) => (keep(row) ? [index] : []));

/** An axis: `at` holds each row's place on it, 0 to 1 or null, `ticks` places with texts. */
function axisOf(name, values, write = shortValue) {
  const isNumber = values.every((value) => typeof value === "number" || value === undefined);
  const known = values.filter((value) => value !== undefined);
  const distinct = [...new Set(known.map((value) => (isNumber ? value : shortValue(value))))];
  distinct.sort((a, b) => (isNumber ? a - b : a.localeCompare(b)));
  const position = isNumber ? scale(distinct) : (value) => spread(distinct.indexOf(shortValue(value)), distinct.length);
  const marked = isNumber && distinct.length > FEW ? [distinct[0], distinct[distinct.length >> 1], distinct.at(-1)] : distinct;
  return {
    name,
    at: values.map((value) => (value === undefined ? null : position(value))),
    ticks: apart(marked.map((value) => ({ at: position(value), text: isNumber ? write(value) : value }))),
  };
}

const spread = (index, number) => (number === 1 ? 0.5 : index / (number - 1));

/** Numbers keep their distances; those that span decades are placed by their logarithm. */
function scale(ascending) {
  const [low, high] = [ascending[0], ascending.at(-1)];
  if (low === high) return () => 0.5;
  if (low > 0 && high / low > 50) return (value) => Math.log(value / low) / Math.log(high / low);
  return (value) => (value - low) / (high - low);
}

/** Leave out ticks that would be written over the one below them; both ends stay. */
function apart(ticks) {
  const kept = [];
  for (const tick of ticks) {
    if (kept.length === 0 || tick.at - kept.at(-1).at >= 0.07) kept.push(tick);
    else if (tick === ticks.at(-1)) kept.splice(-1, 1, tick);
  }
  return kept;
}

function lines(axes, rows, line) {
  const x = [];
  const y = [];
  for (const row of rows) {
    axes.forEach((axis, index) => { x.push(index); y.push(axis.at[row]); });
    x.push(null);
    y.push(null);
  }
  return { type: "scatter", mode: "lines", x, y, line, opacity: 0.85, hoverinfo: "skip", showlegend: false };
}

function layout(axes) {
  const quiet = { showgrid: false, zeroline: false, showticklabels: false, fixedrange: true };
  const ticks = axes.flatMap((axis, index) => axis.ticks.map((tick) => ({
    x: index, y: tick.at, text: plain(tick.text), showarrow: false,
    ...(index === axes.length - 1 ? { xanchor: "left", xshift: 5 } : { xanchor: "right", xshift: -4 }),
    font: { size: 11, color: colour("--muted") }, bgcolor: colour("--veil") })));
  const heads = axes.map((axis, index) => ({
    x: index, y: 1.06, text: `<b>${plain(axis.name)}</b>`, yanchor: "bottom", showarrow: false }));
  return {
    height: 340, margin: { t: 30, r: 58, b: 14, l: 56 }, hovermode: false, dragmode: false,
    xaxis: { ...quiet, range: [0, axes.length - 1] }, yaxis: { ...quiet, range: [-0.03, 1.06] },
    shapes: axes.map((_, index) => ({ type: "line", layer: "above", x0: index, x1: index, y0: 0, y1: 1,
      line: { color: colour("--muted"), width: 1 } })),
    annotations: [...ticks, ...heads],
  };
}
