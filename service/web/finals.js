// The table of finals: sorted by any column, a page at a time.

import { el, fill, say } from "/ui/dom.js";
import { bpb, count, headroom, knobNames, shortValue } from "/ui/format.js";
import { badge } from "/ui/states.js";

export const MOST_FINALS = 2_000;
const PAGE = 25;

/** Rows as GET /sweeps/{id}/finals gives them; without a chosen column in the service's order. */
export class FinalsTable {
  constructor() {
    this.page = 0;
    this.sort = null;
    this.turn = 1;
    this.items = [];
    this.columns = [];
    this.head = el("tr");
    this.body = el("tbody");
    this.place = el("span", { class: "muted" });
    this.back = el("button", { type: "button", on: { click: () => this.go(-1) } }, "Previous");
    this.next = el("button", { type: "button", on: { click: () => this.go(1) } }, "Next");
    this.node = el("div", {},
      el("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "Table of finals" },
        el("table", { class: "finals" },
          el("caption", { class: "unseen" }, "Finals, the best first; a column's button sorts by it"),
          el("thead", {}, this.head), this.body)),
      el("nav", { class: "row pages", "aria-label": "Pages of finals" }, this.back, this.next, this.place));
  }

  show({ items, isCut }, sweep) {
    this.items = items;
    this.isCut = isCut;
    this.best = sweep.best?.final;
    const columns = columnsOf(items, sweep);
    if (columns.map((c) => c.name).join("\n") !== this.columns.map((c) => c.name).join("\n")) {
      this.columns = columns;
      this.drawHead();
    }
    this.columns = columns;
    this.draw();
  }

  drawHead() {
    fill(this.head, ...this.columns.map((column, index) => {
      const button = el("button", { type: "button", class: "sort", on: { click: () => this.by(index) } }, column.name);
      return el("th", { scope: "col", class: column.isNumeric && "num", title: column.title }, button);
    }));
  }

  by(index) {
    this.turn = this.sort === index ? -this.turn : 1;
    this.sort = index;
    this.page = 0;
    [...this.head.cells].forEach((cell, place) => {
      if (place === index) cell.setAttribute("aria-sort", this.turn > 0 ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
    });
    this.draw();
  }

  go(step) {
    this.page += step;
    this.draw();
  }

  draw() {
    const rows = this.sort === null ? this.items : sorted(this.items, this.columns[this.sort].key, this.turn);
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    this.page = Math.min(this.page, pages - 1);
    const first = this.page * PAGE;
    fill(this.body, ...rows.slice(first, first + PAGE).map((row) =>
      el("tr", { class: row.final === this.best ? "best" : row.state },
        ...this.columns.map((column) => el("td", { class: column.isNumeric && "num" }, column.cell(row, this.best))))));
    this.back.disabled = this.page === 0;
    this.next.disabled = this.page >= pages - 1;
    const cut = this.isCut ? `the best ${count(MOST_FINALS)}; the report has all` : count(rows.length);
    say(this.place, rows.length ? `${first + 1}–${Math.min(first + PAGE, rows.length)} of ${cut}` : "No final has ended yet.");
  }
}

function columnsOf(items, { varying, cap_bytes: cap }) {
  const knobs = [...knobNames(varying)].map(([path, name]) => ({
    name, title: path, key: (row) => row.point[path], isNumeric: true,
    cell: (row) => (path in row.point ? shortValue(row.point[path]) : "–"),
  }));
  const hasSeeds = new Set(items.map((row) => row.seed)).size > 1;
  const seed = { name: "seed", key: (row) => row.seed, isNumeric: true, cell: (row) => String(row.seed) };
  const room = {
    name: "headroom", title: "bytes under the cap, or over it", isNumeric: true,
    key: (row) => (row.artifact_bytes === null ? null : cap - row.artifact_bytes),
    cell: (row) => (row.artifact_bytes === null ? "–" : headroom(row.artifact_bytes, cap)),
  };
  return [
    ...knobs, ...(hasSeeds ? [seed] : []),
    { name: "val_bpb", key: (row) => row.val_bpb, isNumeric: true, cell: (row) => bpb(row.val_bpb) },
    { name: "bytes", key: (row) => row.artifact_bytes, isNumeric: true,
      cell: (row) => (row.artifact_bytes === null ? "–" : count(row.artifact_bytes)) },
    ...(cap === null ? [] : [room]),
    { name: "state", key: (row) => row.state, cell: stateCell },
    { name: "final", key: (row) => row.final, cell: (row) => el("code", { title: row.final }, row.final.slice(0, 12)) },
  ];
}

function stateCell(row, best) {
  return el("span", {}, badge(row.state), row.final === best && el("b", {}, " best"),
    row.reason && el("small", { class: "why", title: row.reason }, row.reason));
}

/** Missing values come last, whichever way the rest is sorted. */
function sorted(rows, key, turn) {
  const isMissing = (value) => value === null || value === undefined;
  return rows.map((row) => [key(row), row]).sort(([a], [b]) => {
    if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b);
    if (typeof a === "number" && typeof b === "number") return turn * (a - b);
    return turn * shortValue(a).localeCompare(shortValue(b));
  }).map(([, row]) => row);
}
