// Plotly, loaded when the first plot is drawn. Only traces that are drawn as SVG are used: its
// WebGL ones compile code from text, which the page's content policy forbids.

import { el } from "/ui/dom.js";

let library = null;

function load() {
  library ??= new Promise((resolve, reject) => {
    const script = el("script", { src: "/ui/plotly.min.js", on: {
      load: () => resolve(window.Plotly),
      error: () => { library = null; reject(new Error("plotly.min.js did not load")); },
    } });
    document.head.append(script);
  });
  return library;
}

/** Draw a figure into a node, or move the one there to new data. */
export async function draw(node, traces, layout, label) {
  const plotly = await load();
  if (!node.isConnected) return;
  if (!node.classList.contains("js-plotly-plot")) node.replaceChildren();
  node.style.height = `${layout.height}px`; // what a resize takes the height from
  const isTouched = matchMedia("(pointer: coarse)").matches;
  await plotly.react(node, traces, {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", hovermode: "closest",
    font: { family: "system-ui, sans-serif", size: 12, color: colour("--ink") },
    hoverlabel: { align: "left", bgcolor: colour("--paper"), bordercolor: colour("--quiet"),
      font: { color: colour("--ink"), size: 12 } },
    dragmode: isTouched ? false : "zoom", // a finger on the plot scrolls the page
    ...layout,
  }, {
    displaylogo: false, responsive: true, displayModeBar: false, showTips: false,
  });
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", label);
}

/** A colour of app.css, as it is in the present scheme. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A text for Plotly, which reads some markup in its labels: none in ours. */
export const plain = (text) =>
  String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** What a final's point says when it is pointed at. */
export function hover(point, names) {
  const knobs = Object.entries(point.point).map(([path, value]) => [names.get(path) ?? path, value]);
  const facts = [
    ["bpb", point.val_bpb.toFixed(5)], ["bytes", point.artifact_bytes.toLocaleString("en-US")],
    ["state", point.state], ["final", point.final.slice(0, 12)],
  ];
  return [...knobs, ...facts].map(([name, value]) => `${plain(name)}: ${plain(value)}`).join("<br>");
}
