// What happened to a sweep, the newest first, as its stream of events tells it.

import { el } from "/ui/dom.js";
import { bpb, clockTime, count, shortValue } from "/ui/format.js";

const MOST = 60;
const short = (id) => String(id).slice(0, 8);
const ended = ({ state, reason }) => `${state}${reason ? `: ${reason}` : ""}`;

const LEDGER = {
  sweep_started: ({ num_trainings: trainings, num_finals: finals }) => `started: ${count(trainings)} trainings, ${count(finals)} finals`,
  waiting: ({ reason }) => `waits: ${reason}`,
  gang_started: ({ gang, workers }) => `${gang} started with ${workers} workers`,
  trunk_finished: (event) => `trunk ${short(event.trunk)} ${ended(event)}`,
  training_started: ({ point }) => `training started: ${pointText(point)}`,
  rung: ({ step, val_bpb: score, verdict }) => `rung at step ${count(step)}: ${bpb(score)} bpb, ${verdict}`,
  training_finished: (event) => `training ${ended(event)}: ${pointText(event.point)}`,
  final_ranked: (event) => `final ${short(event.final)} ranked: ${ended(event)}`,
  final_scored: (event) => `final ${short(event.final)} ${event.result ? `${bpb(event.result.score.val_bpb)} bpb, ` : ""}${ended(event)}`,
  verdict: () => "the gate has said its verdict",
  sweep_finished: (event) => `the sweep ended ${ended(event)}`,
};
const QUEUE = {
  submitted: ({ by }) => `submitted by ${by}`,
  asked: ({ by, facts }) => `${by} asked to ${facts.verb ?? facts.want ?? "change it"}`,
  changed: ({ facts }) => `${facts.state ?? "changed"}${facts.reason ? `: ${facts.reason}` : ""}`,
};

const pointText = (point) => Object.entries(point ?? {})
  .map(([path, value]) => `${path.split(".").at(-1)} ${shortValue(value)}`).join(", ");

/** The list; `gang` is told of each gang that started. */
export class Activity {
  constructor(gang) {
    this.gang = gang;
    this.node = el("ol", { class: "activity", tabindex: "0", "aria-label": "Events, the newest first" });
  }

  clear() {
    this.node.replaceChildren();
  }

  add(name, event) {
    if (event.event === "gang_started") this.gang(event);
    const words = (name === "queue" ? QUEUE : LEDGER)[event.event];
    if (!words) return; // a summary: the tiles tell it
    this.node.prepend(el("li", {}, el("time", { class: "muted", title: new Date(event.at * 1000).toLocaleString() }, clockTime(event.at)), words(event)));
    while (this.node.children.length > MOST) this.node.lastChild.remove();
  }
}
