// The totals: numbers with sparklines, and what needs attention.

"use strict";

const tiles = [];

const TILES = [
  {
    title: "Requests",
    unit: "/s",
    value: (totals) => compact(totals.rate("requests")),
    note: (frame) => `${compact(frame.totals.requests)} so far`,
    lines: [(totals, age) => totals.rate("requests", age)],
  },
  {
    title: "Errors",
    unit: "/s",
    least: 1,
    tone: (totals) => (totals.rate("errors") > 0 ? "bad" : ""),
    value: (totals) => compact(totals.rate("errors")),
    note: (frame, totals) => {
      const share = totals.share("errors", "requests");
      return isNumber(share) ? `${percent(share)} in 1 min` : `${compact(frame.totals.errors)} so far`;
    },
    lines: [(totals, age) => totals.rate("errors", age)],
  },
  {
    title: "In flight",
    unit: "",
    least: 4,
    value: (totals) => compact(totals.gauge("in_flight")),
    note: (frame) => `${compact(frame.totals.connections)} connections`,
    lines: [(totals, age) => totals.gauge("in_flight", age)],
  },
  {
    title: "Queued",
    unit: "",
    least: 4,
    tone: (totals) => (totals.gauge("queued") > 0 ? "warn" : ""),
    value: (totals) => compact(totals.gauge("queued")),
    note: (frame, totals) => `${compact(totals.rate("rejects"))} refused /s`,
    lines: [(totals, age) => totals.gauge("queued", age)],
  },
  {
    title: "Tokens out",
    unit: "/s",
    value: (totals) => compact(totals.rate("output_tokens")),
    note: (frame) => `${compact(frame.totals.output_tokens)} so far`,
    lines: [(totals, age) => totals.rate("output_tokens", age)],
  },
  {
    title: "Tokens in",
    unit: "/s",
    value: (totals) => compact(totals.rate("prompt_tokens")),
    note: (frame) => `${compact(frame.totals.prompt_tokens)} so far`,
    lines: [(totals, age) => totals.rate("prompt_tokens", age)],
  },
  {
    title: "First byte",
    unit: "p50",
    value: (totals) => milliseconds(totals.gauge("p50")),
    note: (frame) => `p90 ${milliseconds(frame.totals.first_byte_ms?.p90)}`,
    lines: [(totals, age) => totals.gauge("p50", age), (totals, age) => totals.gauge("p90", age)],
  },
  {
    title: "Cache hits",
    unit: "reported",
    least: 1,
    value: (totals) => percent(totals.share("reported_tokens", "compared_tokens")),
    note: (frame, totals) => `predicted ${percent(totals.share("predicted_tokens", "compared_tokens"))}`,
    lines: [
      (totals, age) => totals.share("reported_tokens", "compared_tokens", age, 15),
      (totals, age) => totals.share("predicted_tokens", "compared_tokens", age, 15),
    ],
  },
];

function buildTotals() {
  for (const tile of TILES) {
    const value = make("span", { class: "tile-value num", text: UNKNOWN });
    const note = make("span", { class: "tile-note muted num" });
    const spark = new Sparkline(tile.lines.length);
    const node = make(
      "div",
      { class: "tile", role: "group", "aria-label": tile.title },
      make("span", { class: "tile-title", text: tile.title }),
      make(
        "span",
        { class: "tile-line" },
        value,
        make("span", { class: "tile-unit muted", text: tile.unit }),
      ),
      note,
      spark.node,
    );
    byId("totals").append(node);
    tiles.push({ ...tile, node, valueNode: value, noteNode: note, spark });
  }
}

function renderTotals() {
  const { frame, totals } = store;
  for (const tile of tiles) {
    setText(tile.valueNode, tile.value(totals));
    setText(tile.noteNode, tile.note(frame, totals));
    setAttribute(tile.node, "data-tone", tile.tone?.(totals) || null);
    const lists = tile.lines.map((line) => samples(totals, SPARK_SAMPLES, (age) => line(totals, age)));
    tile.spark.draw(lists, tile.least ?? 0);
  }
}

// === what needs attention ===

const MAX_NAMES_SHOWN = 3;
const noticeRows = new Map();

function listed(names) {
  const shown = names.slice(0, MAX_NAMES_SHOWN).join(", ");
  const more = names.length - MAX_NAMES_SHOWN;
  return more > 0 ? `${shown} and ${more} more` : shown;
}

// The notices of an overview: [key, tone, text, target].
function noticesOf(frame) {
  const found = [];
  const add = (key, tone, words, target) => found.push({ key, tone, words, target });
  const named = (test) => frame.upstreams.filter(test).map((row) => row.name);
  if (frame.balancer.leaving)
    add("leaving", "warn", "The balancer is shutting down: it takes no new clients.");
  else if (!frame.balancer.ready && frame.upstreams.length > 0) {
    add("ready", "bad", "No upstream is ready: requests are refused.");
  }
  for (const state of ["down", "tripped", "suspect"]) {
    const names = named((row) => row.state === state);
    if (names.length === 0) continue;
    const words = `${plural(names.length, "upstream")} ${STATES[state].words}: ${listed(names)}.`;
    add(state, STATES[state].tone, words, () => showOnlyState(state));
  }
  const blind = frame.upstreams.filter((row) => row.sight === "blind");
  if (blind.length > 0) {
    const reasons = [...new Set(blind.map((row) => row.sight_reason).filter(Boolean))];
    const why = reasons.length > 0 ? ` (${listed(reasons)})` : "";
    const names = listed(blind.map((row) => row.name));
    const words = `${plural(blind.length, "upstream")} without a view of the cache${why}: ${names}.`;
    add("blind", "warn", words, () => filterFleet("blind"));
  }
  const { siblings, traces } = frame;
  if (siblings?.enabled && siblings.redis_up === false) {
    add(
      "redis",
      "warn",
      "Redis does not answer: the balancer goes on from what it knows itself.",
      "#/balancers",
    );
  }
  if (traces?.enabled && traces.lost > 0) {
    add("traces", "warn", `${plural(traces.lost, "recorded call")} lost since the start.`, "#/balancers");
  }
  return found;
}

function renderNotices() {
  const notices = new Map(noticesOf(store.frame).map((notice) => [notice.key, notice]));
  const parent = byId("notices");
  reconcile(parent, noticeRows, [...notices.keys()], (key) => {
    const words = make("span");
    const glyph = icon(notices.get(key).tone === "bad" ? "down" : "suspect");
    const { target } = notices.get(key);
    const go = () => (typeof target === "function" ? target() : (location.hash = target));
    const button = target
      ? make("button", { type: "button", class: "quiet", text: "Show", click: go })
      : null;
    button?.setAttribute("aria-label", `Show what needs attention: ${key}`);
    return {
      node: make("div", { class: "notice", data: { tone: notices.get(key).tone } }, glyph, words, button),
      words,
    };
  });
  for (const [key, notice] of notices) setText(noticeRows.get(key).words, notice.words);
}
