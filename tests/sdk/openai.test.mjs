// The JavaScript SDK against one engine and through the balancer; harness.py starts both and says where.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";

const MODEL = "sim";
const messages = [{ role: "user", content: "Why is the sky blue?" }];

function client(name, defaultHeaders = {}) {
  const url = process.env[name];
  assert.ok(url, `${name} is not set: run this through harness.py`);
  const patience = { maxRetries: 0, timeout: 60_000 };
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: "EMPTY", defaultHeaders, ...patience });
}

const targets = [client("VLLM_LB_DIRECT"), client("VLLM_LB_BALANCED")];

// Virtual models with every option on; `tagged` has its thoughts in the content, `plain` beside it.
const routed = client("VLLM_LB_ROUTED", { "x-team": "research" });
const faces = ["tagged", "plain"];

const VOLATILE = /^(id|created|created_at|completed_at|item_id|.*cache.*)$/;

/** Plain data without what is new with every call. */
function normal(value) {
  return JSON.parse(JSON.stringify(value, (key, inner) => (VOLATILE.test(key) ? typeof inner : inner)));
}

/** Makes the call to both targets; the balancer's result, when it is the engine's. */
async function same(call) {
  const [direct, balanced] = [await call(targets[0]), await call(targets[1])];
  assert.deepEqual(normal(balanced), normal(direct));
  return balanced;
}

async function all(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

test("chat", async () => {
  const reply = await same((openai) => openai.chat.completions.create({ model: MODEL, messages }));
  assert.equal(reply.choices[0].finish_reason, "stop");
  assert.ok(reply.choices[0].message.content);
});

test("chat stream", async () => {
  const chunks = await same(async (openai) =>
    all(await openai.chat.completions.create({ model: MODEL, messages, stream: true })),
  );
  const whole = await targets[0].chat.completions.create({ model: MODEL, messages });
  const said = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(said, whole.choices[0].message.content);
});

test("chat stream helper", async () => {
  const final = await same((openai) =>
    openai.chat.completions.stream({ model: MODEL, messages }).finalChatCompletion(),
  );
  assert.ok(final.choices[0].message.content);
});

test("responses stream helper", async () => {
  const events = await same((openai) => all(openai.responses.stream({ model: MODEL, input: "Why?" })));
  assert.equal(events.at(0).type, "response.created");
  assert.equal(events.at(-1).type, "response.completed");
});

test("models", async () => {
  const models = await same(async (openai) => all(await openai.models.list()));
  assert.deepEqual(models.map((model) => model.id), [MODEL]);
});

test("an unknown model is the SDK's NotFoundError", async () => {
  const errors = [];
  for (const openai of targets) {
    const refused = openai.chat.completions.create({ model: "nobody", messages });
    await assert.rejects(refused, (error) => errors.push(error) && error instanceof OpenAI.NotFoundError);
  }
  const told = errors.map(({ status, code, param, message }) => ({ status, code, param, message }));
  assert.deepEqual(told[1], told[0]);
  assert.equal(told[1].param, "model");
});

test("a bad request is the SDK's BadRequestError", async () => {
  for (const openai of targets) {
    const refused = openai.chat.completions.create({ model: MODEL, messages, temperature: -5 });
    await assert.rejects(refused, (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      return error.param === "temperature";
    });
  }
});

test("virtual models stream what they say", async () => {
  for (const model of faces) {
    const whole = (await routed.chat.completions.create({ model, messages })).choices[0].message;
    const stream = routed.chat.completions.stream({ model, messages });
    const kinds = new Set();
    for await (const chunk of stream) {
      assert.equal(chunk.model, model);
      assert.ok(chunk.choices.length === 1 && !chunk.usage);
      Object.keys(chunk.choices[0].delta).forEach((key) => kinds.add(key));
    }
    const final = (await stream.finalChatCompletion()).choices[0];
    assert.equal(final.message.content, whole.content);
    assert.equal(final.message.content.startsWith("<think>"), model === "tagged");
    assert.ok(kinds.has("generation_token_ids") && kinds.has("prompt_token_ids"));
    assert.equal(whole.generation_token_ids.length, whole.generation_log_probs.length);
  }
});

test("virtual models run tools", async () => {
  const called = [];
  const weather = { name: "weather", parse: JSON.parse, function: (given) => called.push(given) && "rain" };
  weather.parameters = { type: "object", required: ["city"], properties: { city: { type: "string" } } };
  const tool_choice = { type: "function", function: { name: "weather" } };
  for (const model of faces) {
    const tools = [{ type: "function", function: weather }];
    const runner = routed.chat.completions.runTools({ model, messages, tools, tool_choice, stream: true });
    await runner.done();
  }
  assert.equal(called.length, faces.length);
  assert.ok(called.every((given) => typeof given.city === "string"));
});

test("virtual models stream responses", async () => {
  for (const model of faces) {
    const events = await all(routed.responses.stream({ model, input: "Why?" }));
    assert.equal(events.at(0).type, "response.created");
    assert.equal(events.at(-1).type, "response.completed");
    const told = events.flatMap(({ response }) => (response ? [`${response.id} ${response.model}`] : []));
    assert.deepEqual([...new Set(told)], [`${events[0].response.id} ${model}`]);
  }
});

test("a prompt that is too long for a virtual model is an empty answer", async () => {
  const long = [{ role: "user", content: "word ".repeat(9000) }];
  for (const model of faces) {
    const chunks = await all(await routed.chat.completions.create({ model, messages: long, stream: true }));
    assert.equal(chunks.at(-1).choices[0].finish_reason, "length");
    assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), "");
  }
});
