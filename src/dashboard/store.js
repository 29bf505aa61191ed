// The numbers of the last quarter of an hour, in rings of a fixed size. Counters are kept as they came;
// rates and shares are made when they are drawn.

"use strict";

const KEPT_SAMPLES = 900;
const MIN_SAMPLE_GAP = 0.75; // s: frames that come faster replace the sample before them
const MAX_SAMPLE_GAP = 5; // s: a longer gap is drawn as a gap
const RATE_WINDOW = 5; // s
const SHARE_WINDOW = 60; // s
const KEPT_DECISIONS = 200;

const TOTAL_COUNTERS = [
  "requests",
  "errors",
  "rejects",
  "retries",
  "prompt_tokens",
  "output_tokens",
  "predicted_tokens",
  "reported_tokens",
  "compared_tokens",
];
const TOTAL_GAUGES = ["in_flight", "queued", "p50", "p90"];
const UPSTREAM_COUNTERS = [
  "requests",
  "failures",
  "prompt_tokens",
  "predicted_tokens",
  "reported_tokens",
  "compared_tokens",
];
const UPSTREAM_GAUGES = ["active", "active_elsewhere", "queued", "backlog", "kv_usage", "p50", "p90"];
const MODEL_COUNTERS = ["requests", "prompt_tokens", "cached_tokens", "output_tokens"];

// The times of the samples, shared by all histories.
class Timeline {
  constructor() {
    this.times = new Float64Array(KEPT_SAMPLES).fill(NaN);
    this.length = 0;
    this.head = -1; // the place of the newest sample
  }

  // The place to write a sample of this time to, and whether the place is a new one.
  advance(time) {
    const last = this.head < 0 ? -Infinity : this.times[this.head];
    // A clock that was set back starts over.
    if (time < last - MAX_SAMPLE_GAP) this.clear();
    const isNew = this.head < 0 || time - this.times[this.head] >= MIN_SAMPLE_GAP;
    if (isNew) {
      this.head = (this.head + 1) % KEPT_SAMPLES;
      this.length = Math.min(this.length + 1, KEPT_SAMPLES);
      this.times[this.head] = time;
    }
    return { place: this.head, isNew };
  }

  clear() {
    this.times.fill(NaN);
    this.length = 0;
    this.head = -1;
  }

  // The place of the sample that is `age` samples old.
  at(age) {
    return age < this.length ? (this.head - age + KEPT_SAMPLES) % KEPT_SAMPLES : -1;
  }

  // The place of the newest sample that is at least `seconds` older than the sample at `age`.
  before(age, seconds) {
    const from = this.times[this.at(age)];
    let found = -1;
    for (let older = age + 1; older < this.length; older += 1) {
      found = this.at(older);
      if (from - this.times[found] >= seconds - 0.01) break;
    }
    return found;
  }
}

// The samples of one thing: a ring for each counter and gauge.
class History {
  constructor(timeline, counters, gauges) {
    this.timeline = timeline;
    this.columns = {};
    for (const name of counters) this.columns[name] = new Float64Array(KEPT_SAMPLES).fill(NaN);
    for (const name of gauges) this.columns[name] = new Float32Array(KEPT_SAMPLES).fill(NaN);
  }

  write(place, values) {
    for (const [name, column] of Object.entries(this.columns)) column[place] = values[name] ?? NaN;
  }

  gauge(name, age = 0) {
    const place = this.timeline.at(age);
    return place < 0 ? NaN : this.columns[name][place];
  }

  // The growth of a counter until the sample at `age`, and the seconds in which it grew.
  growth(name, age, seconds) {
    const [place, older] = [this.timeline.at(age), this.timeline.before(age, seconds)];
    if (place < 0 || older < 0) return [NaN, NaN];
    const [column, { times }] = [this.columns[name], this.timeline];
    const grown = column[place] - column[older];
    // A counter falls when the balancer restarts.
    return [grown >= 0 ? grown : NaN, times[place] - times[older]];
  }

  rate(name, age = 0, seconds = RATE_WINDOW) {
    const [grown, time] = this.growth(name, age, seconds);
    return time > 0 && time <= seconds + MAX_SAMPLE_GAP ? grown / time : NaN;
  }

  // The growth of one counter as a share of that of another.
  share(part, whole, age = 0, seconds = SHARE_WINDOW) {
    const all = this.growth(whole, age, seconds)[0];
    return all > 0 ? Math.min(this.growth(part, age, seconds)[0] / all, 1) : NaN;
  }
}

// All that the page knows of the balancer.
class Store {
  constructor() {
    this.frame = null;
    this.timeline = new Timeline();
    this.totals = new History(this.timeline, TOTAL_COUNTERS, TOTAL_GAUGES);
    this.upstreams = new Map();
    this.models = new Map();
    this.routes = new Map();
    this.decisions = [];
    this.decisionCount = 0;
  }

  // Takes the next overview.
  take(frame) {
    const before = this.frame?.balancer;
    const restarted =
      before && (before.id !== frame.balancer?.id || before.started !== frame.balancer?.started);
    if (restarted) {
      this.timeline.clear();
      for (const histories of [this.upstreams, this.models, this.routes]) histories.clear();
      this.totals = new History(this.timeline, TOTAL_COUNTERS, TOTAL_GAUGES);
    }
    this.frame = frame;
    const { place } = this.timeline.advance(frame.time);
    this.totals.write(place, withTimes(frame.totals));
    this.takeRows(this.upstreams, frame.upstreams, place, UPSTREAM_COUNTERS, UPSTREAM_GAUGES);
    this.takeRows(this.models, frame.models, place, MODEL_COUNTERS, []);
    this.takeRows(this.routes, frame.routes, place, MODEL_COUNTERS, []);
    this.takeDecisions(frame.decisions ?? []);
  }

  // Writes the rows of a list; what left the list is forgotten.
  takeRows(histories, rows, place, counters, gauges) {
    const names = new Set();
    for (const row of rows ?? []) {
      names.add(row.name);
      let history = histories.get(row.name);
      if (!history) {
        history = new History(this.timeline, counters, gauges);
        histories.set(row.name, history);
      }
      history.write(place, withTimes(row));
    }
    for (const name of histories.keys()) if (!names.has(name)) histories.delete(name);
  }

  takeDecisions(rows) {
    if (rows.length === 0) return;
    // After a reconnect the first frame repeats decisions.
    const known = new Set(this.decisions.map(decisionKey));
    const fresh = rows.filter((row) => !known.has(decisionKey(row)));
    this.decisionCount += fresh.length;
    this.decisions = [...fresh, ...this.decisions].slice(0, KEPT_DECISIONS);
  }
}

const decisionKey = (row) => `${row.id}/${row.attempt}/${row.time}`;

// The row with the percentiles of the first byte beside its other numbers.
function withTimes(row) {
  return { ...row, p50: row.first_byte_ms?.p50, p90: row.first_byte_ms?.p90 };
}

// The values of the newest samples, oldest first; `value` gets the age of a sample.
function samples(history, length, value) {
  const found = [];
  for (let age = Math.min(length, history.timeline.length) - 1; age >= 0; age -= 1) found.push(value(age));
  return found;
}

const store = new Store();
