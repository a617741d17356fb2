// Builds elements. Data goes in as text nodes and attributes only, so markup in it stays text.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element: `on` holds listeners, a fact of null or false is left out. */
export function el(name, facts = {}, ...children) {
  return dress(document.createElement(name), facts, children);
}

/** Make an SVG element. */
export function svg(name, facts = {}, ...children) {
  return dress(document.createElementNS(SVG, name), facts, children);
}

function dress(node, facts, children) {
  for (const [key, value] of Object.entries(facts)) {
    if (key === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(key, value === true ? "" : String(value));
    }
  }
  fill(node, ...children);
  return node;
}

/** Replace what a node holds; null and false are left out. */
export function fill(node, ...children) {
  const kept = children.flat().filter((child) => child !== null && child !== undefined && child !== false);
  node.replaceChildren(...kept.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

/** Set a node's text where it differs: an untouched node keeps selection and is not read aloud. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A link's address, or null where it leads anywhere but to a web page. */
export function webAddress(address) {
  if (!address) return null;
  try {
    const url = new URL(address, location.href);
    return ["http:", "https:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/** Run `work` when called, never twice at once, and rest between: at least `leastMs`, and four
 * times as long as the work took, so that a slow service is asked less often. */
export function paced(work, leastMs = 700) {
  let isBusy = false;
  let isWanted = false;
  let isClosed = false;
  async function run() {
    isBusy = true;
    isWanted = false;
    const began = performance.now();
    await work();
    const rest = Math.max(leastMs, 4 * (performance.now() - began));
    setTimeout(() => {
      isBusy = false;
      if (isWanted && !isClosed) run();
    }, rest);
  }
  const ask = () => {
    isWanted = true;
    if (!isBusy && !isClosed) run();
  };
  ask.close = () => { isClosed = true; };
  return ask;
}
