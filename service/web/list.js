// The list of sweeps: filters, pages by cursor, kept live by the queue's events.

import { ask } from "/ui/api.js";
import { el, fill, paced, say } from "/ui/dom.js";
import { bpb, count, headroom, since } from "/ui/format.js";
import { follow } from "/ui/live.js";
import { announce, main, notice, session, showLine, title } from "/ui/shell.js";
import { ACTIVE, ENDED, badge, pending } from "/ui/states.js";

const PAGE = 50;
const TYPING_MS = 250;
const HEALTH_MS = 30_000;
const COLUMNS = ["Sweep", "State", "Owner", "Priority", "Progress", "Best bpb", "Bytes", "Age"];
const NUMERIC = new Set(["Priority", "Best bpb", "Bytes", "Age"]);

/** Open the list; returns what closes it. */
export function openList(query) {
  title("Sweeps");
  const view = { query, cursors: [null], rows: new Map(), known: new Map(), isClosed: false };
  draw(view);
  view.refresh = paced(() => load(view));
  const stop = follow("/events", {
    onEvent: view.refresh,
    onLine: (state, problem) => {
      showLine(state);
      if (state === "live") view.refresh(); // what happened meanwhile is not told again
      else if (problem) notice(problem);
    },
  });
  view.refresh();
  checkHealth(view);
  const health = setInterval(() => checkHealth(view), HEALTH_MS);
  return () => {
    view.isClosed = true;
    view.refresh.close();
    clearInterval(health);
    stop();
  };
}

function draw(view) {
  view.body = el("tbody");
  view.empty = el("p", { class: "empty", hidden: true });
  view.trouble = el("p", { class: "strip", hidden: true });
  view.quota = el("p", { class: "muted quota" });
  view.newer = el("button", { type: "button", on: { click: () => turn(view, -1) } }, "Newer");
  view.older = el("button", { type: "button", on: { click: () => turn(view, 1) } }, "Older");
  view.place = el("span", { class: "muted" });
  const head = COLUMNS.map((name) => el("th", { scope: "col", class: NUMERIC.has(name) && "num" }, name));
  fill(main,
    el("div", { class: "headline" }, el("h1", { tabindex: "-1" }, "Sweeps"), view.quota),
    view.trouble,
    filters(view),
    el("table", { class: "sweeps" },
      el("caption", { class: "unseen" }, "Sweeps, the newest first"),
      el("thead", {}, el("tr", {}, ...head)), view.body),
    view.empty,
    view.pages = el("nav", { class: "row pages", "aria-label": "Pages" }, view.newer, view.older, view.place));
}

function filters(view) {
  const state = el("select", { name: "state" },
    el("option", { value: "" }, "any"), el("option", { value: "active" }, "under way"),
    el("option", { value: "ended" }, "ended"),
    ...[...ACTIVE, ...ENDED].map((name) => el("option", { value: name }, name)));
  const owner = el("input", { name: "owner", type: "search", size: 10, autocomplete: "off" });
  const name = el("input", { name: "name", type: "search", size: 16, autocomplete: "off" });
  let typing = 0;
  const change = () => {
    const chosen = [state, owner, name].map((field) => [field.name, field.value.trim()]);
    view.query = new URLSearchParams(chosen.filter(([, value]) => value));
    view.cursors = [null];
    const text = view.query.toString();
    history.replaceState(null, "", text ? `#/?${text}` : "#/");
    view.refresh();
  };
  for (const field of [state, owner, name]) {
    field.value = view.query.get(field.name) ?? "";
    field.addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(change, field === state ? 0 : TYPING_MS);
    });
  }
  return el("form", { class: "row filters", role: "search", "aria-label": "Filter sweeps",
    on: { submit: (event) => { event.preventDefault(); change(); } } },
    el("label", {}, "State", state), el("label", {}, "Owner", owner), el("label", {}, "Name", name));
}

function turn(view, step) {
  if (step > 0) view.cursors.push(view.next);
  else view.cursors.pop();
  view.refresh();
}

function address(view) {
  const query = new URLSearchParams({ limit: PAGE });
  const cursor = view.cursors.at(-1);
  if (cursor !== null) query.set("cursor", cursor);
  const state = view.query.get("state");
  const states = { active: ACTIVE, ended: ENDED }[state] ?? (state ? [state] : []);
  for (const each of states) query.append("state", each);
  for (const name of ["owner", "name"]) {
    if (view.query.get(name)) query.set(name, view.query.get(name));
  }
  return `/sweeps?${query}`;
}

async function load(view) {
  try {
    const page = await ask(address(view));
    if (view.isClosed) return;
    notice(null);
    show(view, page);
  } catch (problem) {
    if (!view.isClosed && problem.status !== 401) notice(problem);
  }
}

function show(view, page) {
  const rows = page.items.map((sweep) => row(view, sweep));
  const isSame = rows.length === view.body.rows.length
    && rows.every((each, index) => each === view.body.rows[index]);
  if (!isSame) {
    const focused = view.body.contains(document.activeElement) ? document.activeElement : null;
    fill(view.body, ...rows);
    focused?.focus(); // moving a row takes the focus from it
  }
  view.next = page.next_cursor;
  view.pages.hidden = view.cursors.length === 1 && page.next_cursor === null;
  view.newer.disabled = view.cursors.length === 1;
  view.older.disabled = page.next_cursor === null;
  say(view.place, view.cursors.length > 1 ? `page ${view.cursors.length}` : "");
  view.empty.hidden = rows.length > 0;
  fill(view.empty, ...nothing(view));
}

function nothing(view) {
  if (view.query.toString()) return ["No sweep is like that. Take a filter away."];
  return ["No sweep yet. Submit one with ", el("code", {}, "fairway submit sweep.yaml"), "."];
}

function row(view, sweep) {
  let known = view.rows.get(sweep.id);
  if (!known) {
    known = el("tr", {}, ...COLUMNS.map((name) =>
      el("td", { "data-name": name, class: NUMERIC.has(name) && "num" })));
    fill(known.cells[0],
      el("a", { href: `#/sweeps/${encodeURIComponent(sweep.id)}`, class: "whole" }, sweep.name),
      el("small", { class: "id" }, sweep.id.startsWith(`${sweep.name}-`) ? sweep.id.slice(sweep.name.length + 1) : sweep.id),
      el("small", {}, sweep.recipe));
    view.rows.set(sweep.id, known);
  }
  const before = view.known.get(sweep.id);
  if (before && before.state !== sweep.state) announce(`Sweep ${sweep.name} is ${sweep.state}`);
  if (JSON.stringify(before) !== JSON.stringify(sweep)) fillRow(known, sweep);
  view.known.set(sweep.id, sweep);
  return known;
}

function fillRow(node, sweep) {
  const [, state, owner, priority, progress, best, bytes, age] = node.cells;
  const why = pending(sweep) ?? sweep.reason;
  fill(state, badge(sweep.state), why && el("small", { class: "why", title: why }, why));
  fill(owner, sweep.owner);
  fill(priority, sweep.priority);
  fill(progress, ...progressOf(sweep.progress));
  fill(best, bpb(sweep.best?.val_bpb));
  fill(bytes, ...bytesOf(sweep));
  fill(age, since(sweep.submitted_at));
}

function progressOf({ trainings_total: trainings, trainings_done: trained, finals_total: finals, finals_done: scored }) {
  if (!finals) return [el("small", {}, "not started")];
  return [
    el("progress", { max: finals, value: scored, "aria-label": "finals settled" }),
    el("small", {}, `${count(scored)}/${count(finals)} finals, ${count(trained)}/${count(trainings)} trainings`),
  ];
}

function bytesOf({ best, cap_bytes: cap }) {
  if (!best) return ["–"];
  return [count(best.artifact_bytes), cap && el("small", {}, headroom(best.artifact_bytes, cap))];
}

async function checkHealth(view) {
  try {
    const [quotas, ready] = await Promise.all([ask("/quotas"), fetch("/api/v1/readyz")]);
    const parts = await ready.json();
    if (view.isClosed) return;
    const own = quotas.find((quota) => quota.user === session.me?.user);
    say(view.quota, own ? quotaText(own) : "");
    const broken = Object.entries(parts).filter(([, part]) => part.ok === false);
    view.trouble.hidden = broken.length === 0;
    say(view.trouble, broken.map(([name, part]) => `${name}: ${part.detail}`).join("; "));
  } catch {
    // the list's own request has said so already
  }
}

function quotaText(quota) {
  const gangs = quota.max_gangs === null ? `${quota.gangs_held}` : `${quota.gangs_held} of ${quota.max_gangs}`;
  const used = quota.gpu_hours_used.toFixed(1);
  const time = quota.gpu_hours === null ? used : `${used} of ${quota.gpu_hours}`;
  return `${quota.user}: ${gangs} gangs held, ${time} GPU-hours used in ${quota.window_days} days`;
}
