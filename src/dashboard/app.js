// Starts the page: views by the fragment of the address, the header, the theme, and one rendering a frame.

"use strict";

const THEME_KEY = "vllm-lb-theme";
const ANNOUNCE_EVERY = 5000; // ms: a screen reader hears of changes no more often

const VIEWS = {
  fleet: { render: renderFleetView, title: "Fleet", scrolled: 0 },
  upstream: { render: renderUpstream, title: "Upstream", close: closeUpstream, tab: "fleet" },
  models: { render: renderModels, title: "Models" },
  decisions: { render: renderDecisions, title: "Decisions" },
  sessions: { render: () => {}, title: "Sessions", close: closeSessions },
  balancers: { render: renderBalancers, title: "Balancers" },
};

let currentView = null;
let isScheduled = false;

function renderFleetView() {
  renderTotals();
  renderFleet();
}

function closeSessions() {
  openedCount += 1;
  byId("view-sessions").replaceChildren();
}

// Renders before the next picture; what comes in between costs nothing.
function schedule() {
  if (isScheduled) return;
  isScheduled = true;
  requestAnimationFrame(() => {
    isScheduled = false;
    if (!store.frame) return;
    renderHeader();
    setHidden(byId("notices"), currentView !== "fleet");
    if (currentView === "fleet") renderNotices();
    if (currentView) VIEWS[currentView].render();
  });
}

// === views ===

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

// The view of the address: [view, argument].
function route() {
  const [, first = "", ...rest] = location.hash.split("/");
  const argument = decoded(rest.join("/"));
  if (first === "upstreams" && argument) return ["upstream", argument];
  if (first === "traces" && argument) return ["sessions", argument, openTrace];
  if (first === "sessions") return ["sessions", argument, argument ? openSession : () => openSessions()];
  return [Object.hasOwn(VIEWS, first) && first !== "upstream" ? first : "fleet", argument];
}

function openRoute() {
  const [view, argument, open] = route();
  const before = currentView;
  if (before && before !== view) {
    VIEWS[before].close?.();
    VIEWS[before].scrolled = scrollY;
  }
  for (const section of document.querySelectorAll(".view")) setHidden(section, section.id !== `view-${view}`);
  const tab = VIEWS[view].tab ?? view;
  for (const link of document.querySelectorAll(".tabs a")) {
    setAttribute(link, "aria-current", link.dataset.view === tab ? "page" : null);
  }
  document
    .querySelector(`.tabs a[data-view="${tab}"]`)
    .scrollIntoView({ block: "nearest", inline: "nearest" });
  currentView = view;
  document.title = `${view === "upstream" ? argument : VIEWS[view].title} · vllm-lb`;
  if (view === "upstream") openUpstream(argument);
  if (view === "decisions" && !decisions.knobs) loadKnobs();
  open?.(argument);
  // The fleet is where one comes back to; other views begin at their head.
  if (before) scrollTo(0, view === "fleet" ? VIEWS.fleet.scrolled : 0);
  // A link of a view that is hidden now has lost the focus.
  const isLost = document.activeElement === document.body || document.activeElement?.closest("[hidden]");
  if (before && isLost) byId("main").focus({ preventScroll: true });
  schedule();
}

// === header ===

const STREAM_WORDS = {
  connecting: ["Connecting", "none"],
  reconnecting: ["Reconnecting", "warn"],
  live: ["Live", "good"],
  lost: ["Reconnecting", "warn"],
  token: ["Token needed", "bad"],
};

let streamState = "connecting";

function showStream({ state, reason, wait }) {
  const [word, tone] = STREAM_WORDS[state];
  const pill = byId("stream");
  setText(pill, word);
  setAttribute(pill, "data-tone", tone);
  const isLive = state === "live";
  setAttribute(document.body, "data-stale", !isLive && store.frame ? "" : null);
  if (state === "lost" && streamState === "live") announce("The connection to the balancer is lost.");
  if (isLive && streamState !== "live" && streamState !== "connecting") announce("The connection is back.");
  if (state !== "reconnecting") streamState = state;
  const isFirst = state === "connecting" && !store.frame;
  setHidden(byId("connection"), isLive || isFirst);
  const words = connectionWords(state, reason, wait);
  if (words) setText(byId("connection-text"), words);
  setText(byId("connection-retry"), state === "token" ? "Enter the token" : "Try now");
  if (!store.frame) setText(byId("fleet-empty"), isFirst ? "Loading" : "There is nothing to show yet.");
  if (state === "token") needToken();
}

function connectionWords(state, reason, wait) {
  const since = store.frame ? ` The numbers are of ${clock(store.frame.time)}.` : "";
  if (state === "token") return `The balancer asks for the token of its admin listener.${since}`;
  if (state !== "lost") return "";
  return `No live numbers: ${reason}.${since} The next try follows within ${Math.ceil(wait / 1000)} s.`;
}

function renderHeader() {
  const { balancer, upstreams } = store.frame;
  setText(byId("version"), text(balancer.version));
  setText(byId("balancer"), text(balancer.name ?? balancer.id));
  setAttribute(byId("balancer"), "title", `The balancer's id: ${text(balancer.id)}`);
  const ready = upstreams.filter((row) => row.state === "ready").length;
  const word = balancer.leaving ? "Leaving" : balancer.ready ? "Ready" : "Not ready";
  const pill = byId("ready");
  setText(pill, `${word} ${ready}/${upstreams.length}`);
  setAttribute(pill, "title", `${ready} of ${upstreams.length} upstreams are ready`);
  setAttribute(pill, "data-tone", balancer.leaving ? "warn" : balancer.ready ? "good" : "bad");
}

// === announcements of changes ===

const knownStates = new Map();
let pendingWords = [];
let announceTimer = null;

function announce(words) {
  pendingWords.push(words);
  pendingWords = pendingWords.slice(-3);
  announceTimer ??= setTimeout(
    () => {
      byId("announcer").textContent = pendingWords.join(" ");
      pendingWords = [];
      announceTimer = null;
    },
    store.frame ? ANNOUNCE_EVERY / 5 : 0,
  );
}

function announceChanges(frame) {
  const changed = [];
  for (const row of frame.upstreams) {
    const known = knownStates.get(row.name);
    if (known !== undefined && known !== row.state) changed.push(`${row.name} is ${row.state}`);
    knownStates.set(row.name, row.state);
  }
  if (knownStates.size > frame.upstreams.length) {
    const names = new Set(frame.upstreams.map((row) => row.name));
    for (const name of knownStates.keys()) if (!names.has(name)) knownStates.delete(name);
  }
  if (changed.length > 0) announce(`${listed(changed)}.`);
}

// === theme ===

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  upstreamPage?.plots.forEach((plot) => plot.recolor());
}

function buildTheme() {
  const kept = localStorage.getItem(THEME_KEY) ?? "auto";
  const field = document.querySelector(`#theme input[value="${CSS.escape(kept)}"]`);
  if (field) field.checked = true;
  setTheme(field ? kept : "auto");
  byId("theme").addEventListener("change", (event) => {
    localStorage.setItem(THEME_KEY, event.target.value);
    setTheme(event.target.value);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    setTheme(document.documentElement.dataset.theme),
  );
}

// === start ===

const live = new LiveStream((frame) => {
  announceChanges(frame);
  store.take(frame);
  schedule();
}, showStream);

buildTheme();
buildTotals();
buildFleet();
buildModels();
buildBalancers();
buildDecisions();
buildActions();
buildToken();
byId("connection-retry").addEventListener("click", () =>
  streamState === "token" ? openToken("") : live.start(),
);
addEventListener("hashchange", openRoute);
addEventListener("online", () => live.start());
openRoute();
live.start();
