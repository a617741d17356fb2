// Pause, resume, stop, cancel: the buttons that make sense now and that our role allows.

import { Problem, ask, sweepPath } from "/ui/api.js";
import { el } from "/ui/dom.js";
import { announce, confirm, main, mayControl, notice } from "/ui/shell.js";
import { ACTIVE } from "/ui/states.js";

const ORDER = ["run", "pause", "stop", "cancel"];
const RESUMABLE = ["paused", "infeasible", "illegal", "stopped", "cancelled", "failed", "lost"];
const VERBS = {
  pause: { word: "Pause", isFor: (s) => isUnderWay(s) && s.state !== "paused" && wantsLess(s, "pause") },
  resume: { word: "Resume", isFor: (s) => RESUMABLE.includes(s.state) || s.want === "pause" },
  stop: {
    word: "Stop",
    isFor: (s) => isUnderWay(s) && wantsLess(s, "stop"),
    text: "Nothing new is started; what runs now finishes and counts. The sweep can be resumed later.",
    no: "Let it go on",
  },
  cancel: {
    word: "Cancel",
    isFor: (s) => isUnderWay(s) && wantsLess(s, "cancel"),
    text: "What runs now ends at once and is lost back to its last checkpoint; what is finished is kept. The sweep can be resumed later.",
    no: "Let it go on",
  },
};

const isUnderWay = (sweep) => ACTIVE.includes(sweep.state);
const wantsLess = (sweep, want) => ORDER.indexOf(sweep.want) < ORDER.indexOf(want);

/** The buttons of one sweep; `changed` gets the sweep as it is after a verb. */
export class Controls {
  constructor(current, changed) {
    this.current = current;
    this.changed = changed;
    this.buttons = new Map(Object.entries(VERBS).map(([verb, { word, text }]) => [verb,
      el("button", { type: "button", class: text ? "danger" : null, on: { click: () => this.press(verb) } }, word)]));
    this.node = el("div", { class: "row controls", role: "group", "aria-label": "Control the sweep" },
      ...this.buttons.values());
  }

  show(me) {
    const sweep = this.current();
    const focused = [...this.buttons.values()].find((button) => button === document.activeElement);
    for (const [verb, button] of this.buttons) {
      button.hidden = !me || !mayControl(sweep) || !VERBS[verb].isFor(sweep);
    }
    // A button that goes takes the focus with it: leave it where the news is.
    if (focused?.hidden) main.querySelector("h1").focus();
  }

  async press(verb) {
    const sweep = this.current();
    const { word, text, no } = VERBS[verb];
    if (text && !(await confirm({ heading: `${word} sweep ${sweep.name}?`, text, yes: `${word} the sweep`, no }))) return;
    try {
      const now = await ask(`${sweepPath(sweep.id)}:${verb}`, { method: "POST" });
      notice(null);
      announce(`Asked to ${verb}; the sweep is ${now.state}.`);
      this.changed(now);
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      if (problem.status !== 401) notice(problem);
    }
  }
}
