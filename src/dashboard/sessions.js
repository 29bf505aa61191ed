// Sessions and their recorded calls. They are read when a view is opened, not live.

"use strict";

const SESSIONS_AT_ONCE = 200;
const MAX_SESSIONS_LISTED = 3200;
const TRACES_AT_ONCE = 25;
const MAX_TRACES_LISTED = 800;

const sessionHash = (id) => `#/sessions/${encodeURIComponent(id)}`;
const traceHash = (id) => `#/traces/${encodeURIComponent(id)}`;

// The number of the latest thing that was opened: an answer that comes after the next one is dropped.
let openedCount = 0;

// Shows what a call answers in the view of sessions: `build(answer)` makes its content.
async function openCalled(crumbs, path, build) {
  openedCount += 1;
  const opened = openedCount;
  const place = byId("view-sessions");
  place.replaceChildren(crumbs, make("p", { class: "empty loading", text: "Loading" }));
  let content;
  try {
    content = build(await call("GET", path));
  } catch (error) {
    content = [failure(error)];
  }
  if (opened === openedCount) place.replaceChildren(crumbs, ...content);
}

function failure(error) {
  const off = error.status === 501;
  const title = off ? "No calls are recorded" : "That cannot be shown";
  const words = off ? "Set traces.store in the configuration, and restart the balancer." : error.message;
  return make(
    "div",
    { class: "panel" },
    make("div", { class: "panel-head" }, make("h2", { id: "sessions-title", text: title })),
    make("p", { class: "empty", text: words }),
  );
}

function crumbs(...steps) {
  return make(
    "p",
    { class: "crumbs" },
    ...steps.map(([label, href]) =>
      href ? make("a", { href, text: label }) : make("span", { class: "mono", text: label }),
    ),
  );
}

const linkCell = (href, label) => (node) => {
  if (!node.firstChild) node.append(make("a", { class: "mono", href, text: label }));
};

// === the list of sessions ===

function openSessions(limit = SESSIONS_AT_ONCE) {
  return openCalled(crumbs(), `sessions?limit=${limit}`, (sessions) => {
    const table = plainTable("Sessions", [
      ["Session", ""],
      ["Calls", "num"],
      ["Began", "num"],
      ["Metadata", "wide mono"],
    ]);
    const empty = make("p", {
      class: "empty",
      hidden: sessions.length > 0,
      text: "No call has been recorded yet.",
    });
    const show = (filter) =>
      table.show(
        sessions.filter((row) => row.session_id.toLowerCase().includes(filter)),
        (row) => row.session_id,
        (row) => [
          linkCell(sessionHash(row.session_id), row.session_id),
          count(row.trace_count),
          date(row.created_at),
          metadataText(row.metadata),
        ],
      );
    show("");
    const filter = make("input", {
      type: "search",
      placeholder: "Id of a session",
      autocomplete: "off",
      "aria-label": "Filter sessions; Enter opens the one with this id",
      spellcheck: "false",
      input: (event) => show(event.target.value.trim().toLowerCase()),
      keydown: (event) => {
        const id = event.target.value.trim();
        if (event.key === "Enter" && id !== "") location.hash = sessionHash(id);
      },
    });
    const refresh = make("button", { type: "button", text: "Refresh", click: () => openSessions(limit) });
    const view = panel("Sessions", "sessions-title", table.node, empty);
    view.firstChild.append(make("div", { class: "panel-tools" }, filter, refresh));
    setHidden(table.node, sessions.length === 0);
    if (sessions.length === limit && limit < MAX_SESSIONS_LISTED) {
      view.append(
        make("button", {
          type: "button",
          class: "more",
          text: "Show more sessions",
          click: () => openSessions(limit * 2),
        }),
      );
    }
    return [view];
  });
}

function metadataText(metadata) {
  const shown = metadata && Object.keys(metadata).length > 0 ? JSON.stringify(metadata) : "";
  return shown.length > 120 ? `${shown.slice(0, 120)}…` : shown;
}

// === the calls of a session ===

function openSession(id, limit = TRACES_AT_ONCE) {
  const steps = crumbs(["Sessions", "#/sessions"], [id]);
  return openCalled(steps, `sessions/${encodeURIComponent(id)}/traces?limit=${limit}`, (traces) => {
    // Only what the list shows is kept: the calls themselves may be large.
    const rows = traces.map(traceSummary);
    const longest = Math.max(...rows.map((row) => row.latency), 1);
    const table = plainTable("Recorded calls, oldest first", [
      ["Time", ""],
      ["Model", "mono"],
      ["API", ""],
      ["Result", ""],
      ["Upstream", "mono"],
      ["Prompt", "num"],
      ["Cached", "num"],
      ["Output", "num"],
      ["Timing", "timing"],
      ["Latency", "num"],
    ]);
    table.show(
      rows,
      (row) => row.id,
      (row) => [
        linkCell(traceHash(row.id), clock(row.time)),
        row.model,
        row.stream ? `${row.api}, stream` : row.api,
        row.result,
        row.upstream,
        count(row.prompt),
        count(row.cached),
        count(row.output),
        timingCell(row, longest),
        milliseconds(row.latency),
      ],
    );
    const view = panel(
      `Calls of ${id}`,
      "sessions-title",
      table.node,
      make("p", { class: "empty", hidden: rows.length > 0, text: "This session has no recorded call." }),
    );
    view.firstChild.append(
      make(
        "div",
        { class: "panel-tools" },
        make("button", { type: "button", text: "Refresh", click: () => openSession(id, limit) }),
      ),
    );
    setHidden(table.node, rows.length === 0);
    if (rows.length === limit && limit < MAX_TRACES_LISTED) {
      view.append(
        make("button", {
          type: "button",
          class: "more",
          text: "Show more calls",
          click: () => openSession(id, limit * 2),
        }),
      );
    }
    return [view];
  });
}

function traceSummary(trace) {
  const tokens = trace.token_counts ?? {};
  return {
    id: trace.trace_id,
    time: trace.timestamp,
    model: trace.model,
    api: trace.api,
    stream: trace.stream,
    result: resultText(trace),
    upstream: trace.upstream,
    prompt: tokens.prompt,
    cached: tokens.cached,
    output: tokens.completion,
    latency: trace.latency_ms,
    queue: trace.queue_ms,
    first: trace.ttft_ms,
  };
}

function resultText(trace) {
  const parts = [trace.error ? `${trace.status} ${trace.error}` : text(trace.finish_reason ?? trace.status)];
  if (trace.partial) parts.push("cut off");
  return parts.join(", ");
}

// The pieces of a call's time: [class, label, milliseconds].
function timePieces({ queue, first, latency }) {
  const [waited, begun] = [queue ?? 0, first ?? latency];
  return [
    ["p-queue", "before the first attempt", Math.min(waited, latency)],
    ["p-first", "to the first piece of the answer", Math.max(begun - waited, 0)],
    ["p-answer", "answer", Math.max(latency - begun, 0)],
  ];
}

function timingBar(row, longest) {
  const pieces = timePieces(row);
  const words = pieces.map(([, label, time]) => `${label} ${milliseconds(time)}`).join(", ");
  const bar = make("span", { class: "track", role: "img", "aria-label": words });
  for (const [kind, label, time] of pieces) {
    const piece = make("i", { class: kind, title: `${label}: ${milliseconds(time)}` });
    piece.style.width = `${(time / longest) * 100}%`;
    bar.append(piece);
  }
  return bar;
}

const timingCell = (row, longest) => (node) => {
  if (!node.firstChild) node.append(timingBar(row, longest));
};
