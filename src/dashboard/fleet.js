// The fleet: one row for each upstream. Rows are kept and only what changed is set, so that 200 upstreams
// cost little; sparklines are drawn for rows in view alone.

"use strict";

const ROW_SPARK_SAMPLES = SPARK_SAMPLES;
const RESORT_EVERY = 5000; // ms: rows that are sorted by a moving number keep still in between

// Order, word and tone of the states; the symbols differ in shape.
const STATES = {
  down: { order: 0, word: "Down", tone: "bad", words: "down" },
  tripped: { order: 1, word: "Tripped", tone: "bad", words: "tripped by failed requests" },
  suspect: { order: 2, word: "Suspect", tone: "warn", words: "suspect after a failed probe" },
  unknown: { order: 3, word: "Unknown", tone: "none", words: "not probed yet" },
  draining: { order: 4, word: "Draining", tone: "calm", words: "draining" },
  ready: { order: 5, word: "Ready", tone: "good", words: "ready" },
};
const SIGHTS = {
  exact: { order: 2, word: "Exact", tone: "good", words: "the engine confirms the predictions of its cache" },
  learnt: { order: 1, word: "Learnt", tone: "none", words: "predictions that the engine does not confirm" },
  blind: { order: 0, word: "Blind", tone: "warn", words: "the balancer does not know what the cache holds" },
};
const unknownState = (name) => ({ order: 3, word: text(name), tone: "none", words: text(name) });
const stateOf = (row) => STATES[row.state] ?? unknownState(row.state);
const sightOf = (row) => SIGHTS[row.sight] ?? unknownState(row.sight);

const worst = (value) => (isNumber(value) ? -value : Infinity);
const pastOf = (row) => store.upstreams.get(row.name);
const hitShare = (row) => pastOf(row)?.share("reported_tokens", "compared_tokens") ?? NaN;

// The columns: title, class, the key to sort by, and whether the key moves all the time.
const COLUMNS = [
  { id: "name", title: "Upstream", key: (row) => row.name },
  { id: "state", title: "State", key: (row) => stateOf(row).order },
  { id: "sight", title: "Sight", key: (row) => sightOf(row).order },
  { id: "active", title: "In flight", number: true, moves: true, key: (row) => worst(row.active) },
  { id: "queued", title: "Waiting", number: true, moves: true, key: (row) => worst(row.queued) },
  { id: "backlog", title: "Backlog", number: true, moves: true, key: (row) => worst(row.backlog) },
  { id: "cache", title: "Cache use", moves: true, key: (row) => worst(row.kv_usage) },
  { id: "hits", title: "Hits", number: true, moves: true, key: (row) => worst(hitShare(row)) },
  {
    id: "first",
    title: "First byte",
    number: true,
    moves: true,
    key: (row) => worst(row.first_byte_ms?.p50),
  },
  { id: "rate", title: "Requests/s", moves: true, key: (row) => worst(pastOf(row)?.rate("requests")) },
];

const fleet = {
  rows: new Map(),
  order: [],
  places: new Set(),
  sort: "state",
  descending: false,
  sortedAt: 0,
  filter: "",
  states: new Set(),
  chips: new Map(),
  visible: null,
};

function buildFleet() {
  for (const column of COLUMNS) {
    const button = make(
      "button",
      { type: "button", class: "head", click: () => sortFleet(column.id) },
      make("span", { text: column.title }),
      make("span", { class: "arrow", "aria-hidden": "true" }),
    );
    byId("fleet-columns").append(
      make(
        "th",
        {
          scope: "col",
          role: "columnheader",
          class: column.number ? "num" : null,
          data: { column: column.id },
        },
        button,
      ),
    );
    byId("fleet-sort").append(make("option", { value: column.id, text: column.title }));
  }
  byId("fleet-columns").append(
    make(
      "th",
      { scope: "col", role: "columnheader", class: "acts" },
      make("span", { class: "hidden", text: "Action" }),
    ),
  );
  byId("fleet-sort").addEventListener("change", (event) => sortFleet(event.target.value));
  byId("fleet-filter").addEventListener("input", (event) => filterFleet(event.target.value));
  fleet.visible = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const row = fleet.rows.get(entry.target.dataset.name);
        if (row) row.isVisible = entry.isIntersecting;
      }
      schedule();
    },
    { rootMargin: "200px" },
  );
  showSort();
}

function sortFleet(column) {
  fleet.descending = fleet.sort === column ? !fleet.descending : false;
  fleet.sort = column;
  fleet.sortedAt = 0;
  showSort();
  schedule();
}

function showSort() {
  // Numbers begin with the largest one.
  const { moves = false } = COLUMNS.find((column) => column.id === fleet.sort);
  const order = fleet.descending !== moves ? "descending" : "ascending";
  for (const head of byId("fleet-columns").children) {
    setAttribute(head, "aria-sort", head.dataset.column === fleet.sort ? order : null);
  }
  byId("fleet-sort").value = fleet.sort;
}

function filterFleet(words) {
  fleet.filter = words.trim().toLowerCase();
  const field = byId("fleet-filter");
  if (field.value.trim().toLowerCase() !== fleet.filter) field.value = words;
  fleet.sortedAt = 0;
  location.hash = "#/";
  schedule();
}

function showOnlyState(state) {
  fleet.states = new Set([state]);
  filterFleet("");
}

function matches(row) {
  if (fleet.states.size > 0 && !fleet.states.has(row.state)) return false;
  if (fleet.filter === "") return true;
  const fields = [row.name, row.url, row.state, row.sight, ...(row.models ?? [])];
  return fields.some((field) => text(field).toLowerCase().includes(fleet.filter));
}

// The names of the rows to show, in order. A filter never waits; an order by a moving number does.
function fleetOrder(upstreams) {
  const column = COLUMNS.find((one) => one.id === fleet.sort);
  const found = upstreams.filter(matches);
  const isSame = found.length === fleet.order.length && found.every((row) => fleet.places.has(row.name));
  const now = performance.now();
  if (column.moves && isSame && now - fleet.sortedAt < RESORT_EVERY) return fleet.order;
  const keys = new Map(found.map((row) => [row.name, column.key(row)]));
  const sign = fleet.descending ? -1 : 1;
  const byKey = (one, other) => {
    const [a, b] = [keys.get(one.name), keys.get(other.name)];
    const byValue = typeof a === "string" ? collator.compare(a, b) : a === b ? 0 : a < b ? -1 : 1;
    return sign * byValue || collator.compare(one.name, other.name);
  };
  fleet.order = found.sort(byKey).map((row) => row.name);
  fleet.places = new Set(fleet.order);
  fleet.sortedAt = now;
  return fleet.order;
}

const collator = new Intl.Collator("en", { numeric: true });

function renderFleet() {
  const { upstreams } = store.frame;
  const byName = new Map(upstreams.map((row) => [row.name, row]));
  renderChips(upstreams);
  const order = fleetOrder(upstreams);
  reconcile(byId("fleet-rows"), fleet.rows, order, createRow);
  const most = Math.max(4, ...upstreams.map((row) => row.active ?? 0));
  for (const name of order) renderRow(fleet.rows.get(name), byName.get(name), most);
  const empty = byId("fleet-empty");
  setHidden(empty, order.length > 0);
  setText(
    empty,
    upstreams.length === 0
      ? "There are no upstreams yet. Add them to the file, or with POST /admin/upstreams."
      : "No upstream fits the filter.",
  );
  const shown = order.length === upstreams.length ? "" : ` of ${upstreams.length}`;
  setText(
    byId("fleet-count"),
    `${count(order.length)}${shown} upstreams. ` +
      "First byte: median and 90th percentile of the last minute. " +
      "Hits: cached share of the prompts, as reported and as predicted.",
  );
}

function renderChips(upstreams) {
  const counts = new Map();
  for (const row of upstreams) counts.set(row.state, (counts.get(row.state) ?? 0) + 1);
  for (const state of fleet.states) if (!counts.has(state)) counts.set(state, 0);
  const states = [...counts.keys()].sort((a, b) => stateOf({ state: b }).order - stateOf({ state: a }).order);
  reconcile(byId("fleet-states"), fleet.chips, states, (state) => {
    const number = make("b", { class: "num" });
    const { word, tone } = stateOf({ state });
    const click = () => {
      if (!fleet.states.delete(state)) fleet.states.add(state);
      schedule();
    };
    const glyph = icon(STATES[state] ? state : "unknown");
    const node = make(
      "button",
      { type: "button", class: "chip", data: { tone }, click },
      glyph,
      number,
      make("span", { text: word }),
    );
    return { node, number };
  });
  for (const [state, chip] of fleet.chips) {
    setText(chip.number, count(counts.get(state)));
    setAttribute(chip.node, "aria-pressed", fleet.states.has(state));
  }
}

// === one row ===

const cell = (id, title, ...content) =>
  make("td", { role: "cell", class: `c-${id}`, data: { label: title } }, ...content);

function badge() {
  const glyph = icon("unknown");
  const word = make("span");
  return { node: make("span", { class: "badge" }, glyph, word), glyph, word };
}

function showBadge(shown, name, { word, tone }) {
  setIcon(shown.glyph, byId(`i-${name}`) ? name : "unknown");
  setText(shown.word, word);
  setAttribute(shown.node, "data-tone", tone);
}

function meter() {
  const bar = make("i");
  return { node: make("span", { class: "meter", "aria-hidden": "true" }, bar), bar };
}

// `canFill`: a share near 1 is a limit that is near.
function showMeter(shown, share, canFill = true) {
  const width = `${(Math.min(Math.max(isNumber(share) ? share : 0, 0), 1) * 100).toFixed(0)}%`;
  if (shown.bar.style.width !== width) shown.bar.style.width = width;
  setAttribute(shown.node, "data-full", canFill && share > 0.9 ? "" : null);
}

function createRow(name) {
  const span = (kind) => make("span", { class: kind });
  const row = {
    link: make("a", { class: "name mono", href: upstreamHash(name), text: name }),
    note: span("note"),
    state: badge(),
    sight: badge(),
    active: span("num"),
    elsewhere: span("muted num"),
    load: meter(),
    queued: span("num"),
    backlog: span("num"),
    cache: meter(),
    cacheText: span("num"),
    hits: span("num"),
    predicted: span("muted num"),
    p50: span("num"),
    p90: span("muted num"),
    rate: span("num"),
    spark: new Sparkline(1),
    act: make("button", { type: "button", class: "icon small" }, icon("drain")),
    isVisible: true,
  };
  row.act.addEventListener("click", () => askDrain(name));
  const titled = (id, ...content) => cell(id, COLUMNS.find((column) => column.id === id).title, ...content);
  row.node = make(
    "tr",
    { role: "row", data: { name } },
    make("th", { role: "rowheader", scope: "row", class: "c-name" }, row.link, row.note),
    titled("state", row.state.node),
    titled("sight", row.sight.node),
    titled("active", row.load.node, row.active, row.elsewhere),
    titled("queued", row.queued),
    titled("backlog", row.backlog),
    titled("cache", row.cache.node, row.cacheText),
    titled("hits", row.hits, row.predicted),
    titled("first", row.p50, row.p90),
    titled("rate", row.spark.node, row.rate),
    cell("acts", "", row.act),
  );
  fleet.visible.observe(row.node);
  row.removed = () => fleet.visible.unobserve(row.node);
  return row;
}

// The sentence below a name: only where something is wrong.
function noteOf(row) {
  if (row.reason) return row.reason;
  if (row.sight === "blind" && row.sight_reason) return row.sight_reason;
  return "";
}

function renderRow(row, upstream, most) {
  const past = pastOf(upstream);
  setText(row.note, noteOf(upstream));
  setHidden(row.note, row.note.textContent === "");
  showBadge(row.state, upstream.state, stateOf(upstream));
  showBadge(row.sight, upstream.sight, sightOf(upstream));
  setAttribute(row.sight.node, "title", upstream.sight_reason ?? sightOf(upstream).words);
  setAttribute(row.state.node, "title", upstream.reason ?? stateOf(upstream).words);
  const limit = upstream.max_active;
  setText(row.active, limit ? `${compact(upstream.active)}/${compact(limit)}` : compact(upstream.active));
  setText(row.elsewhere, upstream.active_elsewhere > 0 ? `+${compact(upstream.active_elsewhere)}` : "");
  setAttribute(
    row.elsewhere,
    "title",
    upstream.active_elsewhere > 0 ? "in flight from other balancers" : null,
  );
  showMeter(row.load, upstream.active / (limit || most), Boolean(limit));
  setText(row.queued, compact(upstream.queued));
  setText(row.backlog, compact(upstream.backlog));
  showMeter(row.cache, upstream.kv_usage);
  setText(row.cacheText, percent(upstream.kv_usage));
  setText(row.hits, percent(hitShare(upstream)));
  setText(row.predicted, `/ ${percent(past.share("predicted_tokens", "compared_tokens"))}`);
  setAttribute(row.predicted, "title", "as predicted");
  setText(row.p50, milliseconds(upstream.first_byte_ms?.p50));
  setText(
    row.p90,
    isNumber(upstream.first_byte_ms?.p90) ? `/ ${milliseconds(upstream.first_byte_ms.p90)}` : "",
  );
  setText(row.rate, compact(past.rate("requests")));
  if (row.isVisible) {
    row.spark.draw([samples(past, ROW_SPARK_SAMPLES, (age) => past.rate("requests", age))], 0.2);
  }
  setIcon(row.act.firstChild, upstream.drained ? "undrain" : "drain");
  const verb = upstream.drained ? "Undrain" : "Drain";
  setAttribute(row.act, "aria-label", `${verb} ${upstream.name}`);
  setAttribute(row.act, "title", verb);
  setAttribute(row.node, "data-tone", stateOf(upstream).tone);
}
