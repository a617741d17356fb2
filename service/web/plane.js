// The plane of bpb and bytes: what is feasible, the cap, the Pareto front, the best.

import { colour, draw, hover, plain } from "/ui/charts.js";
import { knobNames } from "/ui/format.js";

const MB = 1e6;

/** Draw the scored finals; `cap` in bytes or null, `best` {final, val_bpb, artifact_bytes} or null. */
export async function drawPlane(node, { points, cap, varying, best }) {
  const names = knobNames(varying);
  const traces = [];
  const add = (state, marker) => {
    const rows = points.filter((point) => point.state === state);
    if (rows.length === 0) return;
    traces.push({ ...place(rows), mode: "markers", name: state === "succeeded" ? "feasible" : state,
      marker: { size: 8, ...marker }, text: rows.map((row) => hover(row, names)), hoverinfo: "text" });
  };
  add("succeeded", { color: colour("--blue"), opacity: 0.85 });
  add("infeasible", { color: colour("--quiet"), symbol: "circle-open" });
  add("illegal", { color: colour("--quiet"), symbol: "x-thin-open" });
  const front = points.filter((point) => point.is_front).sort((a, b) => a.artifact_bytes - b.artifact_bytes);
  traces.push({ ...place(front), mode: "lines", name: "Pareto front", hoverinfo: "skip",
    line: { color: colour("--ink"), width: 1.2, shape: "hv" } });
  if (best) {
    traces.push({ ...place([best]), mode: "markers", name: "best", hoverinfo: "skip",
      marker: { size: 16, symbol: "circle-open", color: colour("--ink"), line: { width: 2 } } });
  }
  const label = `Scatter of ${points.length} scored finals, artifact bytes against val bpb`
    + (best ? `; the best is ${best.val_bpb.toFixed(4)} bpb in ${best.artifact_bytes} bytes` : "");
  await draw(node, traces, layout(points, cap), label);
}

function place(rows) {
  return { type: "scatter", x: rows.map((row) => row.artifact_bytes / MB), y: rows.map((row) => row.val_bpb) };
}

function layout(points, cap) {
  const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true };
  return {
    height: 380, margin: { t: 24, r: 12, b: 64, l: 8 },
    xaxis: { ...axis, title: { text: "artifact, MB (10⁶ bytes)", standoff: 8 } },
    yaxis: { ...axis, title: { text: "val bpb, lower is better", standoff: 8 }, tickformat: ".4f" },
    legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom" },
    ...capMark(points, cap),
  };
}

/** The cap as a line, or only told where a line would squeeze the points together. */
function capMark(points, cap) {
  if (cap === null) return {};
  const sizes = points.map((point) => point.artifact_bytes / MB);
  const [least, most] = [Math.min(...sizes), Math.max(...sizes)];
  const reach = Math.max(most - least, 0.03 * most);
  const at = cap / MB;
  const isFar = at < least - reach || at > most + reach;
  const ink = colour("--red");
  const text = plain(`cap ${cap.toLocaleString("en-US")} bytes`);
  const note = { showarrow: false, font: { color: ink, size: 12 }, yref: "paper", y: 1, yanchor: "bottom" };
  if (isFar) {
    return { annotations: [{ ...note, text: at > most ? `${text} →` : `← ${text}`, xref: "paper", x: 1, xanchor: "right" }] };
  }
  const line = { type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, line: { color: ink, width: 1.5, dash: "dash" } };
  return { shapes: [line], annotations: [{ ...note, text, x: at, xanchor: at > (least + most) / 2 ? "right" : "left" }] };
}
