// The stage tree: trunks, the trainings that leave them, the finals of each, with their states.

import { el, fill } from "/ui/dom.js";
import { count } from "/ui/format.js";
import { badge, tally } from "/ui/states.js";

const MOST = 40; // trainings under one trunk before the rest is folded
const opened = new WeakMap();

/** Draw the tree of GET /sweeps/{id}/tree into a node. */
export function drawTree(node, tree, status) {
  const trunks = new Map(tree.trunks.map((trunk) => [trunk.id, { ...trunk, children: [], trainings: [] }]));
  const roots = { children: [], trainings: [] };
  for (const trunk of trunks.values()) (trunks.get(trunk.branch) ?? roots).children.push(trunk);
  for (const training of tree.trainings) (trunks.get(training.branch) ?? roots).trainings.push(training);
  const isEmpty = tree.trunks.length + tree.trainings.length === 0;
  fill(node, totals(tree, status), isEmpty
    ? el("p", { class: "muted" }, "No stage has begun.")
    : el("ul", {}, ...branches(node, "root", roots)));
}

function totals(tree, status) {
  if (!status) return null;
  const { trunks, trainings, finals } = status;
  const parts = [
    trunks.total && `${count(trunks.done)} of ${count(trunks.total)} trunks`,
    `${count(trainings.done)} of ${count(trainings.total)} trainings`,
    `${count(finals.done)} of ${count(finals.total)} finals`,
  ];
  return el("p", { class: "muted" }, parts.filter(Boolean).join(" → "));
}

function branches(node, key, { children, trainings }) {
  const known = opened.get(node) ?? new Set();
  opened.set(node, known);
  const isOpen = known.has(key) || trainings.length <= MOST;
  const shown = isOpen ? trainings : trainings.slice(0, MOST);
  const more = el("button", { type: "button", class: "quiet", on: { click: (event) => {
    known.add(key);
    const list = event.target.closest("ul");
    event.target.parentElement.remove();
    list.append(...trainings.slice(MOST).map(leaf));
  } } }, `${count(trainings.length - MOST)} more trainings`);
  return [
    ...children.map((trunk) => el("li", {},
      el("span", { class: "stage" }, badge(trunk.state), el("b", {}, "trunk"),
        el("code", {}, trunk.id.slice(0, 8)), trunk.steps && el("span", { class: "muted" }, `to step ${count(trunk.steps)}`)),
      el("ul", {}, ...branches(node, trunk.id, trunk)))),
    ...shown.map(leaf),
    !isOpen && el("li", {}, more),
  ];
}

function leaf(training) {
  return el("li", {}, el("span", { class: "stage" },
    badge(training.state), el("span", { class: "label" }, training.label), tally(training.finals)));
}
