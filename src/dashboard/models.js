// Models and routes; the balancer itself and its siblings.

"use strict";

let modelsPage = null;
let balancersPage = null;

function usageCell(value, share) {
  return (node) => {
    node.bar ??= meter();
    node.words ??= make("span", { class: "num" });
    if (!node.firstChild) node.append(node.bar.node, node.words);
    showMeter(node.bar, share, false);
    setText(node.words, value);
  };
}

function buildModels() {
  const usage = [
    ["Requests", "num"],
    ["/s", "num"],
    ["Prompt tokens", "num"],
    ["Cached", "share"],
    ["Output tokens", "num"],
    ["Tokens out /s", "num"],
  ];
  modelsPage = {
    models: plainTable("Models", [["Model", "mono"], ["Upstreams ready", "num"], ...usage]),
    routes: plainTable("Routes", [["Route", "mono"], ["Model", "mono"], ...usage]),
    noModels: make("p", { class: "empty", text: "No upstream has reported a model yet." }),
    noRoutes: make("p", {
      class: "empty",
      text: "There are no routes: requests go by the name of their model.",
    }),
  };
  byId("view-models").append(
    panel("Models", "models-title", modelsPage.models.node, modelsPage.noModels),
    panel("Routes", "routes-title", modelsPage.routes.node, modelsPage.noRoutes),
  );
}

function usageTexts(row, past) {
  const share = row.prompt_tokens > 0 ? row.cached_tokens / row.prompt_tokens : NaN;
  return [
    count(row.requests),
    compact(past?.rate("requests")),
    compact(row.prompt_tokens),
    usageCell(percent(share), share),
    compact(row.output_tokens),
    compact(past?.rate("output_tokens")),
  ];
}

function renderModels() {
  const { frame } = store;
  const [models, routes] = [frame.models ?? [], frame.routes ?? []];
  modelsPage.models.show(
    models,
    (row) => row.name,
    (row) => [
      row.name,
      `${count(row.ready)} of ${count(row.upstreams)}`,
      ...usageTexts(row, store.models.get(row.name)),
    ],
  );
  modelsPage.routes.show(
    routes,
    (row) => row.name,
    (row) => [row.name, row.model, ...usageTexts(row, store.routes.get(row.name))],
  );
  setHidden(modelsPage.models.node, models.length === 0);
  setHidden(modelsPage.routes.node, routes.length === 0);
  setHidden(modelsPage.noModels, models.length > 0);
  setHidden(modelsPage.noRoutes, routes.length > 0);
}

function buildBalancers() {
  const page = {
    own: factList(),
    memory: factList(),
    traces: factList(),
    siblings: plainTable("Siblings", [
      ["Balancer", "mono"],
      ["Name", ""],
      ["Address", "mono"],
      ["Last message", "num"],
      ["In flight", "num"],
      ["Backlog", "num"],
      ["Context", "num"],
      ["Shares upstreams", ""],
    ]),
    empty: make("p", { class: "empty" }),
    reload: make("button", { type: "button", text: "Reload the configuration…", click: askReload }),
  };
  const own = panel("This balancer", "balancers-title", page.own.node);
  own.firstChild.append(make("div", { class: "panel-tools" }, page.reload));
  byId("view-balancers").append(
    own,
    panel("Siblings", "siblings-title", page.siblings.node, page.empty),
    make(
      "div",
      { class: "pair" },
      panel("Memory", "memory-title", page.memory.node),
      panel("Recorded calls", "recorded-title", page.traces.node),
    ),
  );
  balancersPage = page;
}

const yesOrNo = (value) => (value === true ? "yes" : value === false ? "no" : UNKNOWN);

function siblingTexts(row) {
  const age = isNumber(row.age_ms) ? row.age_ms : row.age_seconds * 1000;
  return [
    row.id ?? row.balancer,
    row.name,
    row.address,
    milliseconds(age),
    count(row.in_flight ?? row.active),
    compact(row.backlog_tokens ?? row.backlog),
    compact(row.context_tokens ?? row.context),
    yesOrNo(row.shares_upstreams),
  ];
}

function renderBalancers() {
  const { balancer, totals, siblings, traces, time } = store.frame;
  const page = balancersPage;
  page.own.show({
    Name: balancer.name,
    Id: balancer.id,
    Version: balancer.version,
    Started: date(balancer.started),
    Up: duration(time - balancer.started),
    State: balancer.leaving ? "shutting down" : balancer.ready ? "ready" : "not ready",
    Connections: count(totals.connections),
    Retries: count(totals.retries),
    Refused: count(totals.rejects),
    "Broken streams": count(totals.broken_streams),
  });
  page.memory.show({
    Process: bytes(totals.memory_bytes),
    "Bodies held": bytes(totals.peeked_bytes),
    "Prefix index": bytes(totals.index_bytes),
    "Blocks of prompts": count(totals.index_blocks),
  });
  page.traces.show(
    traces?.enabled
      ? {
          State: "on",
          Stored: count(traces.stored),
          Size: bytes(traces.stored_bytes),
          Waiting: count(traces.waiting),
          Lost: count(traces.lost),
        }
      : { State: "off: set traces.store to record calls" },
  );
  const rows = siblings?.balancers ?? [];
  page.siblings.show(rows, (row) => row.id ?? row.balancer, siblingTexts);
  setHidden(page.siblings.node, rows.length === 0);
  setHidden(page.empty, rows.length > 0);
  setText(
    page.empty,
    siblings?.enabled
      ? siblings.redis_up
        ? "No sibling has sent a message yet."
        : "Redis does not answer."
      : "This balancer works alone: set redis to have it share what it knows with others.",
  );
}
