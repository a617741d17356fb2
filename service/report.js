// What the figures share stands in the page once: the look, and the texts of the finals, which a
// trace that says so names by their place.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const shared = read("shared");

document.querySelectorAll("[data-plot]").forEach((place) => {
  const { data, layout } = read(`data-${place.dataset.plot}`);
  for (const trace of data) {
    if (trace.meta === "by place") trace.text = trace.text.map((text) => shared.texts[text]);
  }
  layout.template = shared.template;
  Plotly.newPlot(place, data, layout, { displaylogo: false, responsive: true });
});

// Numbers sort as numbers ("1,234" too), what is no number by its text; a second press turns the
// order round. The heads are buttons, so that the keyboard reaches them.
document.querySelectorAll(".sortable thead button").forEach((button) => {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table");
    const turn = head.ariaSort === "ascending" ? -1 : 1;
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.ariaSort = turn > 0 ? "ascending" : "descending";
    const key = (row) => row.cells[head.cellIndex].textContent.replaceAll(",", "");
    const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => turn * compare(key(a), key(b)));
    table.tBodies[0].append(...rows);
  });
});
