// The end of a log, as it grows: the driver's or that of a training.

import { Problem, ask, sweepPath } from "/ui/api.js";
import { el, fill, say } from "/ui/dom.js";

const CHUNK = 65_536;
const KEPT = 100_000; // characters; the whole log is what `fairway logs` prints
const POLL_MS = 2_000;

export class LogTail {
  constructor(id) {
    this.id = id;
    this.restart();
    this.source = el("select", { "aria-label": "Whose log", on: { change: () => this.restart() } },
      el("option", { value: "driver" }, "driver"));
    this.text = el("pre", { class: "log", tabindex: "0", "aria-label": "Log" });
    this.hint = el("p", { class: "muted" });
    this.node = el("div", {}, el("div", { class: "row" }, this.source), this.text, this.hint);
    this.timer = setInterval(() => this.read(), POLL_MS);
    this.read();
  }

  close() {
    clearInterval(this.timer);
  }

  restart() {
    Object.assign(this, { offset: 0, held: "", isOver: false, turn: (this.turn ?? 0) + 1 });
    if (this.text) {
      say(this.text, "");
      this.read();
    }
  }

  /** Offer the logs of the trainings that are known now; read on, should it have been over. */
  refresh(sweep, tree) {
    const labels = tree.trainings.map((training) => `${training.id}\n${training.label}`).join("\n");
    if (labels !== this.labels) {
      this.labels = labels;
      const chosen = this.source.value;
      fill(this.source, el("option", { value: "driver" }, "driver"),
        ...tree.trainings.map((training) => el("option", { value: training.id }, training.label)));
      this.source.value = chosen;
    }
    if (sweep.ended_at === null) this.isOver = false;
  }

  async read() {
    if (this.isReading || this.isOver || document.hidden || !this.source) return;
    this.isReading = true;
    const { turn } = this;
    try {
      let isMore = true;
      while (isMore && turn === this.turn) isMore = await this.chunk(turn);
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      say(this.hint, problem.status === 404 ? "No log yet." : problem.message);
    } finally {
      this.isReading = false;
      if (turn !== this.turn) this.read();
    }
  }

  async chunk(turn) {
    const query = new URLSearchParams({ source: this.source.value, offset: this.offset, limit: CHUNK });
    const part = await ask(`${sweepPath(this.id, "/logs")}?${query}`);
    if (turn !== this.turn) return false;
    const isMore = part.next_offset > this.offset;
    this.offset = part.next_offset;
    if (part.text) this.append(part.text);
    this.isOver = part.is_over && !isMore;
    say(this.hint, this.held ? "" : "Nothing is written yet.");
    return isMore;
  }

  append(text) {
    const isAtEnd = this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 8;
    this.held = (this.held + text).slice(-KEPT);
    say(this.text, this.held);
    if (isAtEnd) this.text.scrollTop = this.text.scrollHeight;
  }
}
