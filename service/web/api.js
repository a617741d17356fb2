// Talks to the service. The token lives in this tab's sessionStorage and goes nowhere else.

const BASE = "/api/v1";
const KEY = "fairway.token";

/** What the service says against a request, in one line that ends with what to do. */
export class Problem extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

let refused = () => {};

/** Say what to do when the service wants a token, or another one. */
export function onRefused(listener) {
  refused = listener;
}

/** Send a request; the answer is one with a good status, or a Problem is thrown. */
export async function send(path, { method = "GET", headers = {}, signal } = {}) {
  const known = token.get();
  const auth = known ? { Authorization: `Bearer ${known}` } : {};
  let answer;
  try {
    answer = await fetch(BASE + path, { method, headers: { ...headers, ...auth }, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, `The service does not answer at ${location.host}; start it with \`fairway serve\`. Trying again.`);
  }
  if (answer.ok) return answer;
  const problem = new Problem(answer.status, await explain(answer));
  if (answer.status === 401) refused(problem);
  throw problem;
}

async function explain(answer) {
  let detail = "";
  try {
    detail = (await answer.json()).detail ?? "";
  } catch {
    detail = ""; // a proxy's page, not the service's problem document
  }
  const said = String(detail || answer.statusText || `status ${answer.status}`);
  const advice = {
    401: "Give a token; `fairway token create` makes one.",
    403: "Ask the sweep's owner or an admin.",
    404: "Go back to the list of sweeps.",
    429: "Too many requests; trying again.",
  }[answer.status] ?? (answer.status >= 500 ? "Look into the service's log." : "");
  return `${said.replace(/[.\s]+$/, "")}. ${advice}`.trim();
}

/** Ask for a document. */
export async function ask(path, options) {
  return (await send(path, options)).json();
}

/** Ask for the pages of a list until `most` items are there; tells whether there are more. */
export async function askAll(path, most, options) {
  const items = [];
  let cursor = null;
  do {
    const query = cursor === null ? "limit=200" : `limit=200&cursor=${encodeURIComponent(cursor)}`;
    const page = await ask(`${path}?${query}`, options);
    items.push(...page.items);
    cursor = page.next_cursor;
  } while (cursor !== null && items.length < most);
  return { items, isCut: cursor !== null };
}

/** Where one sweep's documents are. */
export const sweepPath = (id, rest = "") => `/sweeps/${encodeURIComponent(id)}${rest}`;
