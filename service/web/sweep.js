// One sweep, live: it listens to the sweep's events and asks anew for what they change.

import { Problem, ask, askAll, send, sweepPath, token } from "/ui/api.js";
import { Activity } from "/ui/activity.js";
import { Controls } from "/ui/controls.js";
import { el, fill, paced, say, webAddress } from "/ui/dom.js";
import { factsOf, headOf } from "/ui/facts.js";
import { FinalsTable, MOST_FINALS } from "/ui/finals.js";
import { LogTail } from "/ui/log.js";
import { follow } from "/ui/live.js";
import { drawParallel } from "/ui/parallel.js";
import { drawPlane } from "/ui/plane.js";
import { announce, main, notice, session, showLine, title } from "/ui/shell.js";
import { drawTree } from "/ui/tree.js";

/** Open a sweep's view; returns what closes it. */
export function openSweep(id) {
  title(id);
  const view = { id, sweep: null, isClosed: false, stop: () => {} };
  fill(main, el("h1", { tabindex: "-1" }, id), el("p", { class: "muted" }, "Asking for the sweep …"));
  begin(view);
  return () => {
    view.isClosed = true;
    view.refresh?.close();
    view.log?.close();
    view.unwatch?.();
    view.stop();
  };
}

async function begin(view) {
  showLine("connecting");
  try {
    view.sweep = await ask(sweepPath(view.id));
  } catch (problem) {
    return view.isClosed || failed(view, problem);
  }
  if (view.isClosed) return;
  view.id = view.sweep.id;
  draw(view);
  view.refresh = paced(() => load(view));
  view.refresh();
  listen(view);
}

/** Follow the sweep from its first event on: what happened is told from the beginning. */
function listen(view) {
  view.stop();
  view.activity.clear();
  view.isOver = false;
  view.stop = follow(sweepPath(view.id, "/events"), {
    onEvent: (name, event) => {
      view.activity.add(name, event);
      view.refresh();
    },
    onLine: (state, problem) => {
      showLine(state);
      view.isOver = state === "over";
      if (problem) notice(problem);
      else view.refresh();
    },
  });
}

function failed(view, problem) {
  if (!(problem instanceof Problem)) throw problem;
  notice(problem);
  showLine("lost");
  if (problem.status === 0 || problem.status >= 429) {
    const again = setTimeout(() => begin(view), 3_000);
    view.stop = () => clearTimeout(again);
  } else {
    put(el("h1", { tabindex: "-1" }, "No such sweep"), el("p", {}, el("a", { href: "#/" }, "All sweeps")));
  }
}

function draw(view) {
  const { sweep } = view;
  title(sweep.name);
  view.controls = new Controls(() => view.sweep, (sweep) => changed(view, sweep));
  view.head = headOf();
  view.facts = factsOf();
  view.tree = el("div", { class: "tree" });
  view.plane = el("div", { class: "plot", id: "plane" });
  view.parallel = el("div", { class: "plot", id: "parallel" });
  view.finals = new FinalsTable();
  view.log = new LogTail(sweep.id);
  view.activity = new Activity(view.facts.gang);
  put(
    el("nav", { "aria-label": "Place" }, el("a", { href: "#/" }, "← All sweeps")),
    el("div", { class: "headline" },
      el("div", {}, el("h1", { tabindex: "-1" }, sweep.name), view.head.node), view.controls.node),
    view.head.strip,
    el("ul", { class: "row links", "aria-label": "Elsewhere" }, ...links(view)),
    view.facts.node,
    el("div", { class: "pair" },
      section("Stage tree", view.tree),
      section("bpb × bytes", view.plane)),
    view.knobs = section("Knobs and result", scroller("Parallel coordinates", view.parallel),
      el("p", { class: "muted" }, "One line per scored final, coloured by val bpb. Grey and dotted: infeasible or illegal. Thick: the best.")),
    section("Finals", view.finals.node),
    el("div", { class: "pair" },
      section("Log", view.log.node), section("What happened", view.activity.node)));
  view.unwatch = onScheme(() => drawPlots(view));
  show(view);
}

/** Show a view in place of the one that waited for it; the focus stays with the title. */
function put(...children) {
  const hadFocus = main.contains(document.activeElement);
  fill(main, ...children);
  if (hadFocus) main.querySelector("h1").focus();
}

/** Take a sweep up as a verb left it; one that had ended may go on. */
function changed(view, sweep) {
  view.sweep = sweep;
  show(view);
  if (view.isOver) listen(view);
}

function section(heading, ...children) {
  return el("section", {}, el("h2", {}, heading), ...children);
}

/** A part that is wider than a phone scrolls by itself, by keyboard too. */
function scroller(label, ...children) {
  return el("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": label }, ...children);
}

function onScheme(listener) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", listener);
  return () => dark.removeEventListener("change", listener);
}

function links({ sweep }) {
  const report = `/api/v1${sweepPath(sweep.id, "/report")}`;
  const addresses = [
    ["MLflow charts", webAddress(sweep.links.mlflow)],
    ["MLflow table", webAddress(sweep.links.mlflow_table)],
    ["Report", report],
    ["Spec", `/api/v1${sweepPath(sweep.id, "/spec")}`],
  ];
  return addresses.filter(([, href]) => href).map(([name, href]) => {
    const isOurs = href.startsWith("/");
    const open = (event) => download(event, href, sweep, name);
    return el("li", {}, el("a", { href, target: "_blank", rel: "noopener",
      on: isOurs && token.get() ? { click: open } : {} }, name));
  });
}

/** A link can't carry the token: what needs one is fetched with it and saved as a file. */
async function download(event, href, sweep, name) {
  event.preventDefault();
  try {
    const answer = await send(href.slice("/api/v1".length));
    const address = URL.createObjectURL(await answer.blob());
    el("a", { href: address, download: `${sweep.id}.${name === "Report" ? "html" : "yaml"}` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  } catch (problem) {
    notice(problem);
  }
}

async function load(view) {
  try {
    const [sweep, tree, pareto, finals] = await Promise.all([
      ask(sweepPath(view.id)),
      ask(sweepPath(view.id, "/tree")),
      ask(sweepPath(view.id, "/pareto")),
      askAll(sweepPath(view.id, "/finals"), MOST_FINALS),
    ]);
    if (view.isClosed) return;
    notice(null);
    tell(view.sweep, sweep);
    Object.assign(view, { sweep, pareto });
    show(view);
    drawTree(view.tree, tree, sweep.status);
    view.finals.show(finals, sweep);
    view.log.refresh(sweep, tree);
    await drawPlots(view);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (!view.isClosed && problem.status !== 401) notice(problem);
  }
}

function show(view) {
  const { sweep } = view;
  view.head.show(sweep);
  view.facts.show(sweep);
  view.controls.show(session.me);
}

/** Have read aloud what a person who looks away would miss. */
function tell(before, now) {
  const news = [];
  if (before.state !== now.state) news.push(`The sweep is ${now.state}`);
  if (before.waiting !== now.waiting && now.waiting) news.push(`Waiting: ${now.waiting}`);
  if (before.best?.final !== now.best?.final && now.best) news.push(`New best: ${now.best.val_bpb.toFixed(4)} bpb`);
  if (news.length) announce(`${news.join(". ")}.`);
}

async function drawPlots(view) {
  if (!view.pareto) return;
  const { pareto, sweep } = view;
  const scored = pareto.points.filter((point) => point.val_bpb !== null && point.artifact_bytes !== null);
  view.knobs.hidden = scored.length === 0;
  if (scored.length === 0) {
    say(view.plane, "No final is scored yet.");
    return;
  }
  const facts = { points: scored, cap: pareto.cap_bytes, varying: sweep.varying, best: sweep.best };
  await drawPlane(view.plane, facts);
  if (!view.isClosed) await drawParallel(view.parallel, facts);
}
