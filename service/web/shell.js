// What stands around a view: title, connection, notice, spoken changes, the dialog, who we are.

import { fill, say } from "/ui/dom.js";

const byId = (id) => document.getElementById(id);
const LINES = { connecting: "connecting", live: "live", lost: "no connection", over: "ended" };

export const main = byId("main");

/** Who the service takes us for: user, role, is_open. Null until it has said so. */
export const session = { me: null };

/** Whether we may pause, resume, stop and cancel a sweep. */
export function mayControl(sweep) {
  const { user, role } = session.me ?? {};
  return role === "admin" || (role === "submitter" && sweep.owner === user);
}

/** Show a view's title in the tab. */
export function title(text) {
  document.title = `${text} · Fairway`;
}

/** Tell how the connection stands, in the header. */
export function showLine(state) {
  byId("line").dataset.state = state;
  say(byId("line-words"), LINES[state]);
}

/** Show a problem in one line, or none. */
export function notice(problem) {
  byId("notice").hidden = !problem;
  say(byId("notice"), problem ? problem.message : "");
}

/** Have a change read aloud by a screen reader. */
export function announce(text) {
  say(byId("spoken"), text);
}

/** Show who we are. */
export function showUser(hasToken) {
  const { user, role, is_open: isOpen } = session.me ?? {};
  say(byId("who"), user ? `${user} · ${role}${isOpen ? " · open on this machine" : ""}` : "");
  byId("sign-out").hidden = !hasToken;
}

let answer = () => {};
byId("dialog").addEventListener("close", ({ target }) => {
  if (!target.open) answer(target.returnValue === "yes");
});

/** Ask before what can't be undone; resolves to whether it was confirmed. Esc declines. */
export function confirm({ heading, text, yes, no }) {
  const dialog = byId("dialog");
  answer(dialog.returnValue === "yes"); // the question before, whose end is told later than it ends
  fill(byId("dialog-title"), heading);
  fill(byId("dialog-text"), text);
  fill(byId("dialog-yes"), yes);
  fill(byId("dialog-no"), no);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    answer = resolve;
  });
}
