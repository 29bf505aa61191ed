// One upstream in detail: facts, and plots of the last quarter of an hour.

"use strict";

const upstreamHash = (name) => `#/upstreams/${encodeURIComponent(name)}`;

const UPSTREAM_PLOTS = [
  [
    "Requests per second",
    compact,
    [
      { label: "requests", color: "--c-1", value: (past, age) => past.rate("requests", age) },
      { label: "failures", color: "--c-bad", value: (past, age) => past.rate("failures", age) },
    ],
  ],
  [
    "In flight",
    compact,
    [
      { label: "here", color: "--c-1", value: (past, age) => past.gauge("active", age) },
      { label: "waiting at the engine", color: "--c-2", value: (past, age) => past.gauge("queued", age) },
      {
        label: "from siblings",
        color: "--c-3",
        dash: [4, 3],
        value: (past, age) => past.gauge("active_elsewhere", age),
      },
    ],
    { least: 4 },
  ],
  [
    "First byte",
    milliseconds,
    [
      { label: "median", color: "--c-1", value: (past, age) => past.gauge("p50", age) },
      {
        label: "90th percentile",
        color: "--c-2",
        dash: [4, 3],
        value: (past, age) => past.gauge("p90", age),
      },
    ],
  ],
  [
    "Cached share of the prompts",
    percent,
    [
      {
        label: "reported",
        color: "--c-1",
        value: (past, age) => past.share("reported_tokens", "compared_tokens", age, 30),
      },
      {
        label: "predicted",
        color: "--c-2",
        dash: [4, 3],
        value: (past, age) => past.share("predicted_tokens", "compared_tokens", age, 30),
      },
    ],
    { most: 1 },
  ],
  [
    "Backlog of prompt tokens",
    compact,
    [{ label: "backlog", color: "--c-1", value: (past, age) => past.gauge("backlog", age) }],
    { least: 100 },
  ],
  [
    "Use of the KV cache",
    percent,
    [{ label: "in use", color: "--c-1", value: (past, age) => past.gauge("kv_usage", age) }],
    { most: 1 },
  ],
];

let upstreamPage = null;

function openUpstream(name) {
  closeUpstream();
  const page = {
    name,
    state: badge(),
    sight: badge(),
    facts: factList(),
    reason: make("p", { class: "reason" }),
    title: make("h2", { id: "upstream-title", class: "mono", text: name }),
    drain: make("button", { type: "button", click: () => askDrain(name) }),
    weight: make("button", { type: "button", text: "Weight…", click: () => askWeight(name) }),
    gone: make("p", { class: "empty", text: "This upstream is not in the fleet.", hidden: true }),
    plots: UPSTREAM_PLOTS.map(
      ([title, unit, series, options]) => new PlotPanel(title, unit, series, options),
    ),
  };
  page.body = make(
    "div",
    {},
    page.reason,
    page.facts.node,
    make("div", { class: "plots" }, ...page.plots.map((plot) => plot.node)),
  );
  byId("view-upstream").replaceChildren(
    make("p", { class: "crumbs" }, make("a", { href: "#/", text: "Fleet" })),
    make(
      "div",
      { class: "panel" },
      make(
        "div",
        { class: "panel-head" },
        page.title,
        page.state.node,
        page.sight.node,
        make("div", { class: "panel-tools" }, page.weight, page.drain),
      ),
      page.gone,
      page.body,
    ),
  );
  upstreamPage = page;
}

function closeUpstream() {
  upstreamPage?.plots.forEach((plot) => plot.remove());
  upstreamPage = null;
  byId("view-upstream").replaceChildren();
}

function renderUpstream() {
  const page = upstreamPage;
  const row = store.frame.upstreams.find((upstream) => upstream.name === page.name);
  setHidden(page.gone, Boolean(row));
  setHidden(page.body, !row);
  page.drain.disabled = !row;
  page.weight.disabled = !row;
  if (!row) return;
  showBadge(page.state, row.state, stateOf(row));
  showBadge(page.sight, row.sight, sightOf(row));
  setHidden(page.sight.node, !row.sight);
  setText(page.drain, row.drained ? "Undrain…" : "Drain…");
  const why = [];
  if (row.reason) why.push(`${stateOf(row).word}: ${row.reason}.`);
  if (row.sight) why.push(`Sight: ${sightOf(row).words}${row.sight_reason ? ` (${row.sight_reason})` : ""}.`);
  setText(page.reason, why.join(" "));
  page.facts.show({
    URL: row.url,
    Models: (row.models ?? []).join(", "),
    "In this state for": duration(row.since_seconds),
    Version: row.version,
    Weight: row.weight,
    "In flight": `${count(row.active)}${row.max_active ? ` of ${count(row.max_active)}` : ""}`,
    "From siblings": count(row.active_elsewhere),
    "Waiting at the engine": count(row.queued),
    "Other clients": count(row.foreign),
    "Tokens of context": count(row.context),
    Requests: count(row.requests),
    Failures: count(row.failures),
    "Cache size": isNumber(row.cache_tokens) ? `${compact(row.cache_tokens)} tokens` : UNKNOWN,
    "Error of the forecast": milliseconds(row.forecast_error_ms),
    "Restarts seen": count(row.incarnation),
    Source: row.source ?? "the file, or an operator",
  });
  const past = pastOf(row);
  page.plots.forEach((plot) => plot.update(past));
}
