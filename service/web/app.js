// The page: which view the address names, who we are, the token form.
// #/ is the list of sweeps (#/?state=running&owner=alice), #/sweeps/ID one sweep.

import { ask, onRefused, token } from "/ui/api.js";
import { el, fill } from "/ui/dom.js";
import { growOld } from "/ui/format.js";
import { openList } from "/ui/list.js";
import { main, notice, session, showLine, showUser, title } from "/ui/shell.js";
import { openSweep } from "/ui/sweep.js";

const AGE_MS = 15_000;
let close = () => {};
let isAskingToken = false;

async function route() {
  const [path, query = ""] = location.hash.replace(/^#/, "").split("?");
  const [, kind, id] = path.split("/");
  leave();
  try {
    session.me ??= await ask("/me");
  } catch (problem) {
    return problem.status === 401 || retryLater(problem);
  }
  showUser(token.get() !== null);
  notice(null);
  if (kind === "sweeps") {
    close = openSweep(decodeURIComponent(id));
  } else {
    close = openList(new URLSearchParams(query));
  }
  if (route.isNotFirst) main.querySelector("h1").focus();
  route.isNotFirst = true;
}

function leave() {
  close();
  close = () => {};
  isAskingToken = false;
}

function retryLater(problem) {
  notice(problem);
  showLine("lost");
  const again = setTimeout(route, 3_000);
  close = () => clearTimeout(again);
}

function askForToken(problem) {
  if (isAskingToken) return;
  leave();
  isAskingToken = true;
  session.me = null;
  showUser(false);
  showLine("lost");
  title("Token");
  const hadOne = token.get() !== null;
  token.forget();
  const field = el("input", {
    id: "token", type: "password", name: "token", required: true, autocomplete: "off",
    spellcheck: "false", "aria-describedby": "token-help",
  });
  const form = el("form", { class: "token", on: { submit: (event) => enter(event, field) } },
    el("h1", { tabindex: "-1" }, "Token"),
    el("label", { for: "token" }, "This service asks who you are."),
    field,
    el("p", { id: "token-help", class: "muted" },
      "It begins with fwy_ and stays in this tab. An admin makes one with ",
      el("code", {}, "fairway token create"), "."),
    el("button", { class: "main" }, "Continue"));
  fill(main, form);
  notice(hadOne ? problem : null);
  field.focus();
}

function enter(event, field) {
  event.preventDefault();
  token.set(field.value.trim());
  notice(null);
  route();
}

document.getElementById("sign-out").addEventListener("click", () => {
  token.forget();
  session.me = null;
  route();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the view, not a place in it
  main.focus();
});
onRefused(askForToken);
addEventListener("hashchange", route);
setInterval(growOld, AGE_MS);
route();
