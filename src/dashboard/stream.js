// Calls of the admin API, with the token if there is one, and the live stream of overviews.

"use strict";

const TOKEN_KEY = "vllm-lb-token";
const STREAM_PATH = "admin/live?interval=1";
const SILENCE_LIMIT = 10000; // ms without a byte after which the stream counts as lost
const RETRY_FIRST = 500; // ms
const RETRY_LIMIT = 10000; // ms
const CALL_LIMIT = 30000; // ms
const MAX_FRAME_CHARS = 32 << 20;

class CallError extends Error {
  constructor(status, message, problems = []) {
    super(message);
    this.status = status;
    this.problems = problems;
  }
}

const token = {
  get: () => sessionStorage.getItem(TOKEN_KEY),
  set: (value) => sessionStorage.setItem(TOKEN_KEY, value),
  forget: () => sessionStorage.removeItem(TOKEN_KEY),
};

function withToken(headers = {}) {
  const given = token.get();
  return given ? { ...headers, authorization: `Bearer ${given}` } : headers;
}

// Calls the API: the parsed answer, or a `CallError`. A 401 asks for the token.
async function call(method, path, body) {
  const headers = withToken(body === undefined ? {} : { "content-type": "application/json" });
  const options = { method, headers, cache: "no-store", signal: AbortSignal.timeout(CALL_LIMIT) };
  if (body !== undefined) options.body = JSON.stringify(body);
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    const late = error.name === "TimeoutError";
    throw new CallError(0, late ? "the balancer did not answer in time" : "the balancer cannot be reached");
  }
  if (answer.status === 401) needToken();
  if (!answer.ok) throw await refusal(answer);
  return answer.json().catch(() => null);
}

// The error of an answer that is none of success.
async function refusal(answer) {
  const content = await answer.json().catch(() => null);
  const said = content?.error ?? content?.detail ?? `status ${answer.status}`;
  const words = typeof said === "string" ? said : JSON.stringify(said);
  return new CallError(answer.status, words, content?.problems);
}

// The live stream. `onFrame` gets each overview, `onState` the state of the connection: `connecting`, `live`,
// `lost` with the time of the next try, or `token`.
class LiveStream {
  constructor(onFrame, onState) {
    this.onFrame = onFrame;
    this.onState = onState;
    this.failures = 0;
    this.abort = null;
    this.retry = null;
  }

  // Connects now, and drops the connection that there may be.
  start() {
    clearTimeout(this.retry);
    this.abort?.abort();
    const abort = new AbortController();
    this.abort = abort;
    this.onState({ state: this.failures === 0 ? "connecting" : "reconnecting" });
    this.run(abort)
      .catch((error) => error)
      .then((reason) => {
        if (this.abort !== abort) return;
        abort.abort();
        if (reason?.status === 401) {
          this.onState({ state: "token" });
          return;
        }
        const wait = Math.min(RETRY_FIRST * 2 ** this.failures, RETRY_LIMIT);
        this.failures = Math.min(this.failures + 1, 10);
        this.onState({ state: "lost", reason: reason?.message ?? "the stream ended", wait });
        this.retry = setTimeout(() => this.start(), wait);
      });
  }

  async run(abort) {
    let watch = null;
    const alive = () => {
      clearTimeout(watch);
      watch = setTimeout(() => abort.abort(new Error("nothing came for 10 s")), SILENCE_LIMIT);
    };
    alive();
    try {
      const options = { headers: withToken({ accept: "text/event-stream" }), cache: "no-store" };
      const answer = await fetch(STREAM_PATH, { ...options, signal: abort.signal });
      if (!answer.ok) throw await refusal(answer);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      const parser = new EventParser((event) => this.event(event));
      for (;;) {
        const { value, done } = await reader.read();
        if (done) throw new Error("the stream ended");
        alive();
        parser.push(value);
      }
    } catch (error) {
      if (abort.signal.aborted && abort.signal.reason instanceof Error) throw abort.signal.reason;
      // How browsers word a connection that failed differs.
      throw error instanceof TypeError ? new Error("the balancer cannot be reached") : error;
    } finally {
      clearTimeout(watch);
    }
  }

  event({ name, data }) {
    if (name !== "overview") return;
    this.failures = 0;
    this.onState({ state: "live" });
    this.onFrame(JSON.parse(data));
  }
}

// Parses server-sent events from pieces of text.
class EventParser {
  constructor(onEvent) {
    this.onEvent = onEvent;
    this.rest = "";
    this.name = "";
    this.data = [];
  }

  push(piece) {
    const lines = (this.rest + piece).split("\n");
    this.rest = lines.pop();
    if (this.rest.length > MAX_FRAME_CHARS) throw new Error("a frame is too large");
    for (const line of lines) this.line(line.endsWith("\r") ? line.slice(0, -1) : line);
  }

  line(line) {
    if (line === "") {
      if (this.data.length > 0) this.onEvent({ name: this.name || "message", data: this.data.join("\n") });
      this.name = "";
      this.data = [];
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") this.name = value;
    else if (field === "data") this.data.push(value);
  }
}
