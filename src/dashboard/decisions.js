// The latest choices of upstreams, and why each was made: the terms of every candidate's cost as bars.

"use strict";

const MAX_LISTED_DECISIONS = 80;
const MAX_BARS_AT_FIRST = 12;
const LISTED_DECISIONS = 256; // as many as the balancer keeps

// The terms of the cost in the order of the bars: each in prompt tokens, by the knobs of `balance`.
const TERMS = [
  { id: "missing", label: "uncached tokens", of: (row, knobs) => knobs.missing * row.missing },
  { id: "backlog", label: "backlog", of: (row, knobs) => knobs.backlog * row.backlog },
  { id: "active", label: "requests in flight", of: (row, knobs) => knobs.active * row.active },
  {
    id: "stall",
    label: "answers that would stall",
    of: (row, knobs) => knobs.stall * row.active * row.missing,
  },
  { id: "context", label: "long contexts", of: (row, knobs) => knobs.context * row.context },
  { id: "session", label: "leaving the session", of: (row) => row.session_penalty ?? 0 },
];

const REASONS = {
  only: "the only candidate",
  prefix: "holds the prompt",
  session: "had the session",
  load: "least work",
  turn: "its turn",
  retry: "after a failure",
};

const decisions = {
  rows: new Map(),
  paused: null,
  pausedCount: 0,
  filter: "",
  chosen: null,
  shown: "",
  knobs: null,
};

function buildDecisions() {
  byId("decisions-pause").addEventListener("click", () => {
    decisions.paused = decisions.paused ? null : store.decisions;
    decisions.pausedCount = store.decisionCount;
    schedule();
  });
  byId("decisions-filter").addEventListener("input", (event) => {
    decisions.filter = event.target.value.trim().toLowerCase();
    schedule();
  });
  showDecision();
}

// The knobs of the cost, which the bars are made with.
async function loadKnobs() {
  try {
    decisions.knobs = (await call("GET", "admin/config")).balance;
  } catch {
    decisions.knobs = null;
  }
  decisions.shown = "";
  schedule();
}

function renderDecisions() {
  const pause = byId("decisions-pause");
  setAttribute(pause, "aria-pressed", decisions.paused !== null);
  setIcon(pause.firstElementChild, decisions.paused ? "play" : "pause");
  const missed = store.decisionCount - decisions.pausedCount;
  setText(pause.lastElementChild, decisions.paused ? `Go on (${count(missed)} new)` : "Pause");
  const found = (decisions.paused ?? store.decisions).filter(fitsFilter).slice(0, MAX_LISTED_DECISIONS);
  const byKey = new Map(found.map((row) => [decisionKey(row), row]));
  if (!decisions.chosen && found.length > 0) decisions.chosen = found[0];
  reconcile(byId("decisions-list"), decisions.rows, [...byKey.keys()], (key) => decisionRow(byKey.get(key)));
  const chosen = decisions.chosen && decisionKey(decisions.chosen);
  for (const [key, row] of decisions.rows)
    setAttribute(row.button, "aria-current", key === chosen ? "true" : null);
  const empty = byId("decisions-empty");
  setHidden(empty, found.length > 0);
  setText(empty, decisions.filter ? "No decision fits the filter." : "No request has come yet.");
  showDecision();
}

function fitsFilter(row) {
  if (decisions.filter === "") return true;
  const fields = [row.upstream, row.model, row.reason, row.id, REASONS[row.reason]];
  return fields.some((field) => text(field).toLowerCase().includes(decisions.filter));
}

function decisionRow(decision) {
  const choose = () => {
    decisions.chosen = decision;
    schedule();
    if (matchMedia("(max-width: 899px)").matches) byId("decision").focus();
  };
  const button = make(
    "button",
    { type: "button", class: "pick", click: choose },
    make(
      "span",
      { class: "pick-line" },
      make("b", { class: "mono", text: text(decision.upstream) }),
      make("span", {
        class: "tag",
        data: { reason: decision.reason },
        text: REASONS[decision.reason] ?? decision.reason,
      }),
    ),
    make(
      "span",
      { class: "pick-line muted" },
      make("span", { text: `${text(decision.model)} · ${compact(decision.prompt_tokens)} tokens` }),
      make("span", { class: "num", text: clock(decision.time) }),
    ),
  );
  return { node: make("li", {}, button), button };
}

// === one decision ===

function showDecision() {
  const row = decisions.chosen;
  const key = row ? `${decisionKey(row)} ${decisions.knobs === null} ${row.isWhole}` : "none";
  if (decisions.shown === key) return;
  decisions.shown = key;
  const place = byId("decision");
  if (!row) {
    place.replaceChildren(make("p", { class: "empty", text: "The explanation of a choice stands here." }));
    return;
  }
  const knobs = decisions.knobs;
  const candidates = [...row.candidates].sort((a, b) => a.cost - b.cost);
  const facts = factList();
  facts.show({
    Time: clock(row.time),
    Model: row.model,
    ...(row.route ? { Route: row.route, "Client's model": row.client_model } : {}),
    Prompt: `${count(row.prompt_tokens)} tokens`,
    Blocks: count(row.blocks),
    Attempt: row.attempt,
    "Session named by": row.session,
    Candidates: candidates.length < row.of ? `${candidates.length} of ${row.of} compared` : count(row.of),
    Request: row.id,
  });
  place.replaceChildren(
    make(
      "div",
      { class: "panel-head" },
      make("h3", {}, make("span", { class: "mono", text: text(row.upstream) }), " was chosen"),
    ),
    ...explanation(row, candidates, knobs).map((words) => make("p", { class: "why", text: words })),
    facts.node,
    ...(knobs ? bars(row, candidates, knobs) : []),
    candidates.length < row.of && !row.isWhole ? othersButton(row) : "",
    numbers(row, candidates),
  );
}

// Frames have the best candidates alone; the list of decisions has all that were compared.
function othersButton(row) {
  const load = async () => {
    try {
      const rows = await call("GET", `admin/decisions?limit=${LISTED_DECISIONS}`);
      const found = rows.find((one) => decisionKey(one) === decisionKey(row));
      if (!found) toast("bad", `The choice is not among the latest ${LISTED_DECISIONS} any more.`);
      else if (decisions.chosen === row) decisions.chosen = { ...found, isWhole: true };
      schedule();
    } catch (error) {
      toast("bad", `The candidates cannot be loaded: ${error.message}`);
    }
  };
  return make("button", { type: "button", class: "more", text: "Load the other candidates", click: load });
}

// The reason in sentences.
function explanation(row, candidates, knobs) {
  const chosen = candidates.find((candidate) => candidate.upstream === row.upstream);
  const other = candidates.find((candidate) => candidate.upstream !== row.upstream);
  if (!chosen) return ["The chosen upstream is not among the recorded candidates."];
  const sentences = [];
  const held =
    chosen.hit > 0
      ? `It holds ${count(chosen.hit)} of ${plural(row.blocks, "block")} of the prompt, so ` +
        `${count(chosen.uncached)} of ${plural(row.prompt_tokens, "token")} are left to read.`
      : `It holds nothing of the prompt: all ${plural(row.prompt_tokens, "token")} are to be read.`;
  const first = {
    only: "There was no other candidate.",
    prefix: `${held} Without this cache another upstream would have won.`,
    session:
      `It had the request's session last (named by ${text(row.session)}). Without the session another ` +
      "upstream would have won.",
    load: "It had the least work before the first token.",
    turn: "The preset takes the upstreams in turn; the costs did not decide.",
    retry: `Attempt ${row.attempt}: an earlier attempt of this request failed on another upstream.`,
  };
  sentences.push(first[row.reason] ?? `Reason: ${text(row.reason)}.`);
  if (row.reason === "load" && chosen.hit > 0) sentences.push(held);
  if (other) sentences.push(comparison(chosen, other, knobs));
  return sentences;
}

function comparison(chosen, other, knobs) {
  const difference = other.cost - chosen.cost;
  if (Math.abs(difference) <= 0.0101 * Math.min(chosen.cost, other.cost)) {
    return (
      `${other.upstream} would have cost the same within 1 %: ` +
      "between equals the balancer draws at random."
    );
  }
  const words =
    `${other.upstream} would have cost ${compact(Math.abs(difference))} ` +
    `${difference > 0 ? "more" : "less"}`;
  if (!knobs) return `${words}.`;
  const apart = (term) => term.of(other, knobs) / other.weight - term.of(chosen, knobs) / chosen.weight;
  const main = TERMS.reduce((best, term) =>
    apart(term) * Math.sign(difference) > apart(best) * Math.sign(difference) ? term : best,
  );
  return `${words}, most of it for ${main.label}.`;
}

function bars(row, candidates, knobs) {
  const most = Math.max(...candidates.map((candidate) => candidate.cost), 1e-9);
  const list = make("ul", { class: "bars" });
  const add = (candidate) => list.append(bar(candidate, candidate.upstream === row.upstream, knobs, most));
  const rank = candidates.findIndex((candidate) => candidate.upstream === row.upstream);
  const first = candidates.filter((_, at) => at < MAX_BARS_AT_FIRST || at === rank);
  first.forEach(add);
  const legend = make(
    "ul",
    { class: "legend", "aria-label": "Terms of the cost" },
    ...TERMS.map((term) =>
      make("li", {}, make("i", { class: `swatch t-${term.id}` }), make("span", { text: term.label })),
    ),
  );
  const parts = [
    legend,
    make("p", { class: "muted small", text: "Cost in prompt tokens; the smallest wins." }),
    list,
  ];
  if (first.length < candidates.length) {
    const more = make("button", { type: "button", class: "more", text: `Show all ${candidates.length}` });
    more.addEventListener(
      "click",
      () => {
        candidates.filter((candidate) => !first.includes(candidate)).forEach(add);
        more.remove();
      },
      { once: true },
    );
    parts.push(more);
  }
  return parts;
}

function bar(candidate, isChosen, knobs, most) {
  const parts = TERMS.map((term) => ({ term, cost: term.of(candidate, knobs) / candidate.weight }));
  const sum = parts.reduce((total, part) => total + part.cost, 0);
  const track = make("span", {
    class: "track",
    role: "img",
    "aria-label":
      parts
        .filter((part) => part.cost > 0)
        .map((part) => `${part.term.label} ${compact(part.cost)}`)
        .join(", ") || "no cost",
  });
  // The knobs of now may differ from those of the choice: then the bar would not be its cost.
  const isTrue = Math.abs(sum - candidate.cost) <= Math.max(1, candidate.cost * 0.01);
  for (const part of isTrue ? parts : []) {
    if (part.cost <= 0) continue;
    const piece = make("i", {
      class: `t-${part.term.id}`,
      title: `${part.term.label}: ${compact(part.cost)}`,
    });
    piece.style.width = `${(part.cost / most) * 100}%`;
    track.append(piece);
  }
  if (!isTrue) {
    const whole = make("i", { class: "t-whole", title: "the knobs have changed since" });
    whole.style.width = `${(candidate.cost / most) * 100}%`;
    track.append(whole);
  }
  const forecast = isNumber(candidate.forecast_ms) ? `forecast ${milliseconds(candidate.forecast_ms)}` : "";
  const weight = candidate.weight === 1 ? "" : `weight ${candidate.weight}`;
  return make(
    "li",
    { class: isChosen ? "chosen" : null },
    make(
      "span",
      { class: "bar-name" },
      isChosen ? icon("ready") : null,
      make("span", { class: "mono", text: candidate.upstream }),
      isChosen ? make("span", { class: "hidden", text: "(chosen)" }) : null,
    ),
    track,
    make(
      "span",
      { class: "bar-cost num" },
      make("b", { text: compact(candidate.cost) }),
      make("span", { class: "muted", text: [forecast, weight].filter(Boolean).join(" · ") }),
    ),
  );
}

const NUMBER_COLUMNS = [
  ["Upstream", "mono", (row) => row.upstream],
  ["Cost", "num", (row) => count(row.cost)],
  ["Blocks held", "num", (row) => count(row.hit)],
  ["Uncached", "num", (row) => count(row.uncached)],
  ["Missing", "num", (row) => count(row.missing)],
  ["Backlog", "num", (row) => count(row.backlog)],
  ["In flight", "num", (row) => count(row.active)],
  ["Context", "num", (row) => count(row.context)],
  ["Session", "num", (row) => count(row.session_penalty)],
  ["Weight", "num", (row) => text(row.weight)],
  ["Forecast", "num", (row) => milliseconds(row.forecast_ms)],
];

function numbers(row, candidates) {
  const table = plainTable(
    "The terms as numbers",
    NUMBER_COLUMNS.map(([title, kind]) => [title, kind]),
  );
  table.show(
    candidates,
    (candidate) => candidate.upstream,
    (candidate) => NUMBER_COLUMNS.map(([, , value]) => value(candidate)),
  );
  return make(
    "details",
    { open: decisions.knobs === null },
    make("summary", { text: "The terms as numbers" }),
    table.node,
  );
}
