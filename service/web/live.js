// Server-sent events over fetch: EventSource can't send a token. A broken stream is taken up where
// it broke; a hidden tab lets go of its connection, because a browser has only six of them.

import { Problem, send } from "/ui/api.js";

const SILENCE_MS = 40_000; // the service sends a comment each 15 s: a stream so silent is dead
const MAX_PAUSE_MS = 20_000;

/** Follow a stream. onEvent(name, data), onLine("live"|"lost"|"over", problem); returns close(). */
export function follow(path, { onEvent, onLine }) {
  const stream = { lastId: null, failures: 0, isClosed: false, abort: new AbortController() };
  const hide = () => { if (document.hidden) stream.abort.abort(); };
  document.addEventListener("visibilitychange", hide);
  const close = () => {
    stream.isClosed = true;
    stream.abort.abort();
    document.removeEventListener("visibilitychange", hide);
  };
  keep(path, stream, { onEvent, onLine }).finally(close);
  return close;
}

async function keep(path, stream, { onEvent, onLine }) {
  while (!stream.isClosed) {
    await shown();
    stream.abort = new AbortController();
    let problem = new Problem(0, "The stream of events broke off; taking it up again.");
    try {
      const isOver = await read(path, stream, { onEvent, onLine });
      if (isOver) return stream.isClosed || onLine("over");
    } catch (error) {
      if (error instanceof Problem) problem = error;
      else if (error.name !== "AbortError" && !(error instanceof TypeError)) throw error;
    }
    if (stream.isClosed) return;
    if (document.hidden) continue;
    onLine("lost", problem);
    if ([401, 403, 404].includes(problem.status)) return;
    stream.failures += 1;
    await pause(stream.failures);
  }
}

async function read(path, stream, { onEvent, onLine }) {
  const headers = { Accept: "text/event-stream" };
  if (stream.lastId !== null) headers["Last-Event-ID"] = stream.lastId;
  const answer = await send(path, { headers, signal: stream.abort.signal });
  stream.failures = 0;
  onLine("live");
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let watch = 0;
  try {
    while (true) {
      clearTimeout(watch);
      watch = setTimeout(() => stream.abort.abort(), SILENCE_MS);
      const { done, value } = await reader.read();
      if (done) return false;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const message of blocks.map(parse)) {
        if (message.id !== null) stream.lastId = message.id;
        if (message.name === "end") return true;
        if (message.data && !stream.isClosed) onEvent(message.name, JSON.parse(message.data));
      }
    }
  } finally {
    clearTimeout(watch);
  }
}

function parse(block) {
  const message = { id: null, name: "message", data: "" };
  for (const line of block.split("\n")) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (field === "id") message.id = value;
    if (field === "event") message.name = value;
    if (field === "data") message.data += message.data ? `\n${value}` : value;
  }
  return message;
}

const shown = () => new Promise((resolve) => {
  if (!document.hidden) return resolve();
  document.addEventListener("visibilitychange", resolve, { once: true });
});

function pause(failures) {
  const ms = Math.min(MAX_PAUSE_MS, 500 * 2 ** failures) * (0.7 + 0.6 * Math.random());
  return new Promise((resolve) => setTimeout(resolve, ms));
}
