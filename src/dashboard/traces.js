// One recorded call: conversation, timing, and the tokens of the answer coloured by log-probability.

"use strict";

const MAX_TEXT_AT_FIRST = 6000; // characters of a message
const MAX_MESSAGES_AT_FIRST = 40;
const MAX_TOKENS_AT_FIRST = 3000;

// From this probability on a token has the level of its place here; below the last one it has the next level.
const LEVELS = [0.9, 0.6, 0.3, 0.1];
const LEVEL_LABELS = ["≥ 90 %", "≥ 60 %", "≥ 30 %", "≥ 10 %", "< 10 %"];

function openTrace(id) {
  const steps = crumbs(["Sessions", "#/sessions"], [id]);
  return openCalled(steps, `traces/${encodeURIComponent(id)}`, (trace) => {
    const session = [trace.session_id, sessionHash(trace.session_id)];
    const found = crumbs(["Sessions", "#/sessions"], session, [trace.trace_id.slice(0, 8)]);
    steps.replaceChildren(...found.childNodes);
    return [
      overviewOf(trace),
      ...choicesOf(trace).map((choice, at, all) => tokenPanel(trace, choice, at, all.length)),
      conversation(trace),
    ].filter(Boolean);
  });
}

const choicesOf = (trace) =>
  trace.choices?.length > 0
    ? trace.choices
    : [
        {
          index: 0,
          message: trace.response_message,
          completion_token_ids: trace.completion_token_ids,
          logprobs: trace.logprobs,
        },
      ];

function overviewOf(trace) {
  const tokens = trace.token_counts ?? {};
  const facts = factList();
  const writing = trace.latency_ms - (trace.ttft_ms ?? trace.latency_ms);
  facts.show({
    Time: date(trace.timestamp),
    Model: trace.model,
    "Asked for": trace.client_model,
    API: trace.stream ? `${trace.api}, stream` : trace.api,
    Result: resultText(trace),
    Status: trace.status || UNKNOWN,
    Attempts: trace.attempts,
    "Prompt tokens": count(tokens.prompt),
    Cached:
      isNumber(tokens.cached) && tokens.prompt > 0
        ? `${count(tokens.cached)} (${percent(tokens.cached / tokens.prompt)})`
        : count(tokens.cached),
    "Output tokens": count(tokens.completion),
    "Tokens/s":
      trace.stream && writing > 0 ? compact(((tokens.completion ?? NaN) - 1) / (writing / 1000)) : UNKNOWN,
    "Version of the weights": trace.weight_version,
    Request: trace.request_id,
  });
  const upstream = trace.upstream
    ? make("a", { class: "mono", href: upstreamHash(trace.upstream), text: trace.upstream })
    : make("span", { class: "muted", text: "no upstream" });
  const row = { queue: trace.queue_ms, first: trace.ttft_ms, latency: trace.latency_ms };
  const legend = make(
    "ul",
    { class: "legend" },
    ...timePieces(row).map(([kind, label, time]) =>
      make(
        "li",
        {},
        make("i", { class: `swatch ${kind}` }),
        make("span", { text: label }),
        make("b", { class: "num", text: milliseconds(time) }),
      ),
    ),
  );
  legend.append(
    make(
      "li",
      {},
      make("span", { text: "in all" }),
      make("b", { class: "num", text: milliseconds(trace.latency_ms) }),
    ),
  );
  return make(
    "div",
    { class: "panel" },
    make(
      "div",
      { class: "panel-head" },
      make("h2", { id: "sessions-title", text: "Recorded call" }),
      upstream,
    ),
    make("div", { class: "timeline" }, timingBar(row, Math.max(trace.latency_ms, 1e-3)), legend),
    facts.node,
  );
}

// === the conversation ===

function conversation(trace) {
  const messages = [...(trace.messages ?? [])];
  const raw = trace.raw_request ?? {};
  if (messages.length === 0 && raw.prompt !== undefined)
    messages.push({ role: "prompt", content: raw.prompt });
  if (messages.length === 0 && raw.input !== undefined) messages.push({ role: "input", content: raw.input });
  const list = make("ol", { class: "messages" });
  const hidden = Math.max(messages.length - MAX_MESSAGES_AT_FIRST, 0);
  const answers = choicesOf(trace).map((choice) => ({
    role: "assistant",
    ...choice.message,
    isAnswer: true,
  }));
  list.append(...[...messages.slice(hidden), ...answers].map(messageItem));
  const view = panel("Conversation", "conversation-title");
  if (hidden > 0) {
    const more = make("button", {
      type: "button",
      class: "more",
      text: `Show the ${count(hidden)} messages before`,
    });
    more.addEventListener(
      "click",
      () => {
        list.prepend(...messages.slice(0, hidden).map(messageItem));
        more.remove();
      },
      { once: true },
    );
    view.append(more);
  }
  view.append(list);
  return view;
}

function messageItem(message) {
  const role = text(message.role);
  const body = make("div", { class: "message-body" });
  const reasoning = message.reasoning ?? message.reasoning_content;
  if (reasoning)
    body.append(make("details", {}, make("summary", { text: "Reasoning" }), longText(asText(reasoning))));
  for (const part of partsOf(message.content)) body.append(part);
  for (const made of message.tool_calls ?? []) {
    body.append(
      codeBlock(
        `calls ${text(made.function?.name ?? made.name)}`,
        asText(made.function?.arguments ?? made.arguments ?? made),
      ),
    );
  }
  if (!body.firstChild) body.append(make("p", { class: "muted", text: "empty" }));
  return make(
    "li",
    { class: "message", data: { role: message.isAnswer ? "answer" : role } },
    make("span", { class: "role", text: message.isAnswer ? "answer" : role }),
    body,
  );
}

const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));

function partsOf(content) {
  if (content === null || content === undefined || content === "") return [];
  if (typeof content === "string") return [longText(content)];
  if (!Array.isArray(content)) return [codeBlock("content", asText(content))];
  return content.map((part) => {
    if (typeof part === "string") return longText(part);
    if (typeof part?.text === "string") return longText(part.text);
    return codeBlock(text(part?.type ?? "part"), asText(part));
  });
}

function codeBlock(label, words) {
  return make(
    "div",
    { class: "code" },
    make("span", { class: "code-label", text: label }),
    longText(words, "mono"),
  );
}

function longText(words, kind = "") {
  const shown = make("p", { class: `said ${kind}`, text: words.slice(0, MAX_TEXT_AT_FIRST) });
  if (words.length <= MAX_TEXT_AT_FIRST) return shown;
  const more = make("button", {
    type: "button",
    class: "more",
    text: `Show all ${count(words.length)} characters`,
  });
  more.addEventListener(
    "click",
    () => {
      shown.textContent = words;
      more.remove();
    },
    { once: true },
  );
  return make("div", {}, shown, more);
}

// === tokens ===

// The tokens of a choice: {word, id, logprob}. Only an answer that was no stream has the texts of its tokens.
function tokensOf(trace, choice, at) {
  const raw = trace.raw_response?.choices?.[at]?.logprobs;
  const ids = choice.completion_token_ids ?? [];
  if (Array.isArray(raw?.content) && raw.content.length > 0) {
    return raw.content.map(({ token, logprob }, place) => ({ word: token, logprob, id: ids[place] }));
  }
  if (Array.isArray(raw?.tokens) && raw.tokens.length > 0) {
    return raw.tokens.map((word, place) => ({ word, logprob: raw.token_logprobs?.[place], id: ids[place] }));
  }
  return (choice.logprobs ?? []).map((logprob, place) => ({ logprob, id: ids[place] }));
}

function levelOf(logprob) {
  if (!isNumber(logprob)) return "none";
  const found = LEVELS.findIndex((least) => Math.exp(logprob) >= least);
  return found < 0 ? LEVELS.length : found;
}

function tokenPanel(trace, choice, at, choiceCount) {
  const tokens = tokensOf(trace, choice, at);
  if (tokens.length === 0) return null;
  const hasWords = tokens[0].word !== undefined;
  const logprobs = tokens.map((token) => token.logprob).filter(isNumber);
  const mean = logprobs.reduce((sum, logprob) => sum + logprob, 0) / logprobs.length;
  const title = choiceCount > 1 ? `Tokens of choice ${at + 1}` : "Tokens of the answer";
  const legend = make(
    "ul",
    { class: "legend", "aria-label": "Probability of a token" },
    make("li", { text: "Probability:" }),
    ...LEVEL_LABELS.map((label, level) =>
      make("li", {}, make("i", { class: `swatch token level-${level}` }), make("span", { text: label })),
    ),
  );
  const reading = make("p", { class: "reading num", text: "Point at a token, or walk with the arrow keys." });
  const list = make("div", {
    class: hasWords ? "tokens words" : "tokens cells",
    role: "listbox",
    "aria-label": `${title}, with their log-probabilities`,
    "aria-orientation": "horizontal",
  });
  const add = (from, to) =>
    tokens.slice(from, to).forEach((token, place) => list.append(tokenNode(token, from + place)));
  add(0, MAX_TOKENS_AT_FIRST);
  list.firstElementChild.tabIndex = 0;
  walkTokens(list, (place) => setText(reading, tokenWords(tokens[place], place)));
  const view = panel(title, `tokens-title-${at}`, legend, reading, list);
  view.firstChild.append(
    make("span", {
      class: "muted num",
      text:
        `${plural(tokens.length, "token")} · mean ${mean.toFixed(3)} · ` +
        `perplexity ${compact(Math.exp(-mean))}`,
    }),
  );
  if (!hasWords) {
    view.append(
      make("p", {
        class: "foot muted",
        text: "A stream is recorded with the ids of its tokens; their texts are not in the record.",
      }),
    );
  }
  if (tokens.length > MAX_TOKENS_AT_FIRST) {
    const more = make("button", {
      type: "button",
      class: "more",
      text: `Show all ${count(tokens.length)} tokens`,
    });
    more.addEventListener(
      "click",
      () => {
        add(MAX_TOKENS_AT_FIRST);
        more.remove();
      },
      { once: true },
    );
    view.append(more);
  }
  return view;
}

function tokenNode({ word, logprob, id }, place) {
  const node = make("span", {
    class: `token level-${levelOf(logprob)}`,
    role: "option",
    tabindex: "-1",
    "aria-selected": "false",
    "aria-label": tokenWords({ word, logprob, id }, place),
    data: { place },
  });
  if (word !== undefined) node.textContent = word;
  return node;
}

function tokenWords({ word, logprob, id }, place) {
  const name = word === undefined ? "" : ` ${JSON.stringify(word)}`;
  const chance = isNumber(logprob)
    ? `log-probability ${logprob.toFixed(3)}, probability ${percent(Math.exp(logprob))}`
    : "no log-probability";
  return `Token ${place + 1}${name}${isNumber(id) ? `, id ${id}` : ""}: ${chance}`;
}

// One stop for the tab key; arrow keys walk. `show` gets the place of the token that is pointed at.
function walkTokens(list, show) {
  let current = list.firstElementChild;
  const select = (node) => {
    current.tabIndex = -1;
    setAttribute(current, "aria-selected", "false");
    current = node;
    current.tabIndex = 0;
    setAttribute(current, "aria-selected", "true");
    show(Number(current.dataset.place));
  };
  const target = (event) => event.target.closest?.(".token");
  list.addEventListener("pointerover", (event) => target(event) && show(Number(target(event).dataset.place)));
  list.addEventListener("focusin", (event) => target(event) && select(target(event)));
  list.addEventListener("click", (event) => target(event)?.focus());
  list.addEventListener("keydown", (event) => {
    const steps = {
      ArrowRight: "nextElementSibling",
      ArrowDown: "nextElementSibling",
      ArrowLeft: "previousElementSibling",
      ArrowUp: "previousElementSibling",
    };
    const ends = { Home: list.firstElementChild, End: list.lastElementChild };
    const next = steps[event.key] ? current[steps[event.key]] : ends[event.key];
    if (steps[event.key] || ends[event.key]) event.preventDefault();
    next?.focus();
  });
}
