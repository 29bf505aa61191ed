// Changes to the fleet and to the balancer: each behind a confirmation, its result announced.

"use strict";

const TOAST_TIME = 6000; // ms
const MAX_TOASTS = 4;
const MIN_WEIGHT = 0.001;

function toast(tone, words) {
  const node = make(
    "div",
    { class: "toast", data: { tone } },
    icon(tone === "bad" ? "down" : "ready"),
    make("span", { text: words }),
    make("button", { type: "button", class: "quiet", text: "Close", click: () => node.remove() }),
  );
  const toasts = byId("toasts");
  toasts.append(node);
  while (toasts.children.length > MAX_TOASTS) toasts.firstElementChild.remove();
  setTimeout(() => node.remove(), TOAST_TIME);
}

let action = null;

function buildActions() {
  const dialog = byId("action-dialog");
  byId("action-cancel").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => (action = null));
  dialog.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    confirmAction();
  });
}

// Opens the confirmation. `asked` is {title, words, verb, field, value, danger, run(value), done(answer)}.
function ask(asked) {
  action = asked;
  setText(byId("action-title"), asked.title);
  setText(byId("action-text"), asked.words);
  setText(byId("action-confirm"), asked.verb);
  setText(byId("action-error"), "");
  byId("action-confirm").disabled = false;
  setAttribute(byId("action-confirm"), "data-tone", asked.danger ? "bad" : null);
  setHidden(byId("action-field"), !asked.field);
  if (asked.field) {
    setText(byId("action-field").firstElementChild, asked.field);
    byId("action-input").value = asked.value;
  }
  byId("action-dialog").showModal();
  (asked.field ? byId("action-input") : byId("action-confirm")).focus();
}

async function confirmAction() {
  const asked = action;
  const button = byId("action-confirm");
  if (!asked || button.disabled) return;
  button.disabled = true;
  try {
    const answer = await asked.run(byId("action-input").value);
    toast("good", asked.done(answer));
    if (action === asked) byId("action-dialog").close();
  } catch (error) {
    const problems = error.problems?.length > 0 ? `: ${error.problems.join("; ")}` : "";
    const words = `That did not work: ${error.message}${problems}`;
    if (action === asked) setText(byId("action-error"), words);
    else toast("bad", words);
    button.disabled = false;
  }
}

const upstreamPath = (name) => `admin/upstreams/${encodeURIComponent(name)}`;
const findUpstream = (name) => store.frame?.upstreams.find((row) => row.name === name);

function askDrain(name) {
  const row = findUpstream(name);
  if (!row) return;
  const drain = !row.drained;
  const words = drain
    ? `${name} gets no new requests. Requests in flight there (${count(row.active)}) go on to their end.`
    : `${name} gets requests again as soon as its probes are good.`;
  ask({
    title: drain ? `Drain ${name}?` : `Undrain ${name}?`,
    words,
    verb: drain ? "Drain" : "Undrain",
    danger: drain,
    run: () => call("PATCH", upstreamPath(name), { drain }),
    done: (answer) => `${name} is ${drain ? "draining" : `back: ${answer?.state ?? "changed"}`}.`,
  });
}

function askWeight(name) {
  const row = findUpstream(name);
  if (!row) return;
  ask({
    title: `Weight of ${name}`,
    field: "Weight",
    value: row.weight,
    verb: "Set the weight",
    words:
      "How much the upstream can do beside the others: with 2 it gets about twice the work of one with 1.",
    run: (value) => {
      const weight = Number(value);
      if (!(weight >= MIN_WEIGHT)) throw new Error("the weight must be a number above 0");
      return call("PATCH", upstreamPath(name), { weight });
    },
    done: (answer) => `The weight of ${name} is ${text(answer?.weight)}.`,
  });
}

function askReload() {
  ask({
    title: "Reload the configuration?",
    verb: "Reload",
    words: "The balancer reads its file again. Requests go on; a file with problems changes nothing.",
    run: () => call("POST", "admin/reload"),
    done: (answer) => {
      loadKnobs();
      const changed = answer?.changed ?? [];
      const restart = answer?.needs_restart ?? [];
      const later = restart.length > 0 ? ` Only a restart applies: ${restart.join(", ")}.` : "";
      const what = changed.length > 0 ? `changed ${changed.join(", ")}` : "nothing has changed";
      return `Reloaded: ${what}.${later}`;
    },
  });
}

// === the token ===

function buildToken() {
  const dialog = byId("token-dialog");
  byId("token-button").addEventListener("click", () => openToken(""));
  byId("token-cancel").addEventListener("click", () => dialog.close());
  byId("token-forget").addEventListener("click", () => {
    token.forget();
    dialog.close();
    live.start();
  });
  dialog.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = byId("token-input").value.trim();
    if (given === "") return setText(byId("token-error"), "Enter the token.");
    token.set(given);
    dialog.close();
    live.start();
    loadKnobs();
    openRoute();
  });
}

function openToken(error) {
  const dialog = byId("token-dialog");
  setText(byId("token-error"), error);
  byId("token-input").value = "";
  if (!dialog.open) dialog.showModal();
  byId("token-input").focus();
}

// Asks for the token once; a dialog that was closed comes back by the button alone.
function needToken() {
  if (byId("token-dialog").open) return;
  openToken(token.get() ? "The balancer does not accept this token." : "");
}
