// The head of a sweep's view and its tiles: best, progress, gangs, cost, times.

import { el, fill, say } from "/ui/dom.js";
import { bpb, count, duration, headroom, hours, knobNames, shortValue, since } from "/ui/format.js";
import { ACTS, badge, pending } from "/ui/states.js";

/** The lines under the name: state, id, recipe, owner; and the strip that says why it waits. */
export function headOf() {
  const node = el("p", { class: "row sub" });
  const strip = el("p", { class: "strip", hidden: true });
  return { node, strip, show: (sweep) => {
    fill(node, badge(sweep.state), pending(sweep) && el("em", {}, `${pending(sweep)} …`),
      el("code", {}, sweep.id), el("span", {}, `recipe ${sweep.recipe}`),
      el("span", {}, `owner ${sweep.owner}`), el("span", {}, `priority ${sweep.priority}`));
    const why = sweep.waiting ? `Waiting: ${sweep.waiting}` : sweep.reason;
    strip.hidden = !why;
    say(strip, why ?? "");
  } };
}

/** The tiles, and `gang(event)`, which takes what a gang_started event of the ledger tells. */
export function factsOf() {
  const tiles = new Map();
  const node = el("div", { class: "tiles" }, ...["Best so far", "Progress", "Gangs", "Cost", "Time"].map((name) => {
    const body = el("div");
    tiles.set(name, body);
    return el("section", { class: "tile" }, el("h2", {}, name), body);
  }));
  const gangs = new Map();
  let last = null;
  const show = (sweep) => {
    last = sweep;
    fill(tiles.get("Best so far"), ...bestOf(sweep));
    fill(tiles.get("Progress"), ...progressOf(sweep));
    fill(tiles.get("Gangs"), ...gangsOf(sweep, gangs));
    fill(tiles.get("Cost"), ...costOf(sweep));
    fill(tiles.get("Time"), ...timesOf(sweep));
  };
  const gang = (event) => {
    gangs.set(event.gang, event);
    if (last) fill(tiles.get("Gangs"), ...gangsOf(last, gangs));
  };
  return { node, show, gang };
}

const big = (text) => el("p", { class: "big" }, text);
const small = (...text) => el("p", { class: "muted" }, ...text);

function bestOf({ best, cap_bytes: cap, status, varying }) {
  if (!best) return [big("–"), small("no final is feasible and legal yet")];
  const names = knobNames(varying);
  const point = Object.entries(status?.best?.params ?? {});
  return [
    big(`${bpb(best.val_bpb)} bpb`),
    small(`${count(best.artifact_bytes)} bytes`, cap !== null && `, ${headroom(best.artifact_bytes, cap)} the cap`),
    el("p", { class: "knobs" }, ...point.map(([path, value]) =>
      el("span", {}, `${names.get(path) ?? path} `, el("b", {}, shortValue(value))))),
    ...confirmedOf(status),
  ];
}

function confirmedOf(status) {
  const mean = status?.confirmed;
  if (!mean) return [];
  return [small(`confirmed over ${mean.n} seeds: ${bpb(mean.mean_bpb)} ± ${bpb(mean.sd_bpb)}`)];
}

function meter(name, value, max, words) {
  return el("div", { class: "meter" },
    el("span", {}, name), el("progress", { value: Math.min(value, max), max, "aria-label": `${name}: ${words}` }),
    el("span", { class: "num" }, words));
}

function progressOf({ progress, status }) {
  if (!progress.finals_total) return [big("–"), small("not started")];
  const share = Math.round((100 * progress.finals_done) / progress.finals_total);
  const of = (done, total) => `${count(done)} of ${count(total)}`;
  const odd = [
    ["running", status?.trainings.running, "trainings"], ["stopped", status?.trainings.stopped, "trainings"],
    ["failed", status?.trainings.failed, "trainings"], ["infeasible", status?.finals.infeasible, "finals"],
    ["illegal", status?.finals.illegal, "finals"], ["failed", status?.finals.failed, "finals"],
  ].filter(([, number]) => number);
  return [
    big(`${share} %`),
    meter("trainings", progress.trainings_done, progress.trainings_total, of(progress.trainings_done, progress.trainings_total)),
    meter("finals", progress.finals_done, progress.finals_total, of(progress.finals_done, progress.finals_total)),
    odd.length > 0 && small(odd.map(([state, number, what]) => `${count(number)} ${number === 1 ? what.slice(0, -1) : what} ${state}`).join(", ")),
    ...deadOf(status),
  ];
}

function deadOf(status) {
  return (status?.dead_knobs ?? []).map(({ knob }) => el("p", { class: "warn" }, `${knob} changed nothing`));
}

function gangsOf(sweep, gangs) {
  const isActing = ACTS.includes(sweep.state) || sweep.gangs_held > 0;
  const told = isActing ? [...gangs.values()].slice(-sweep.gangs_held || undefined) : [];
  return [
    big(`${sweep.gangs_held} of ${sweep.gangs}`),
    small(isActing ? `held by attempt ${sweep.attempt}` : `asked for; ${attempts(sweep)}`),
    el("ul", { class: "plain" }, ...told.map((gang) => el("li", {}, gangText(gang)))),
  ];
}

const attempts = ({ attempt }) => (attempt === 0 ? "never started" : attempt === 1 ? "1 attempt" : `${attempt} attempts`);

function gangText({ gang, workers, nodes, probe }) {
  const hosts = [...new Set((nodes ?? []).map((node) => node.node).filter(Boolean))];
  const devices = [...new Set((nodes ?? []).map((node) => node.device).filter(Boolean))];
  const where = `${devices.length ? ` on ${devices.join(", ")}` : ""}${hosts.length ? ` of node ${hosts.join(", ")}` : ""}`;
  const doubts = probe?.warnings?.length ? `; ${probe.warnings.join("; ")}` : "";
  return `${gang}: ${workers} workers${where}${doubts}`;
}

function costOf({ gpu_seconds: gpu, worker_seconds: worker, budget, status }) {
  const usd = status?.usd;
  const lines = [big(gpu ? `${hours(gpu)} of GPU` : `${hours(worker)} of worker`)];
  if (budget && budget.limit_worker_s !== null) {
    const { spent_worker_s: spent, limit_worker_s: limit } = budget;
    lines.push(meter("budget", spent, limit, `${hours(spent)} of ${hours(limit)}`));
  }
  lines.push(small(`${count(Math.round(gpu))} GPU-seconds, ${count(Math.round(worker))} worker-seconds`));
  if (usd !== null && usd !== undefined) lines.push(small(`${usd.toFixed(2)} USD`));
  const phases = Object.entries(status?.worker_seconds_by_phase ?? {}).filter(([, seconds]) => seconds);
  if (phases.length) lines.push(small(phases.map(([phase, seconds]) => `${phase} ${hours(seconds)}`).join(", ")));
  return lines;
}

function timesOf({ submitted_at: submitted, started_at: started, ended_at: ended, status }) {
  const now = Date.now() / 1000;
  return [
    big(started ? duration((ended ?? now) - started) : "–"),
    small("submitted ", since(submitted), " ago", started && [", started ", since(started), " ago"]),
    ended && small("ended ", since(ended), " ago"),
    status?.cache_hits > 0 && small(`${count(status.cache_hits)} stages found done in the store`),
  ];
}
