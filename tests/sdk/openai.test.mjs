// The JavaScript SDK against one engine and through the balancer; harness.py starts both and says where.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";

const MODEL = "sim";
const messages = [{ role: "user", content: "Why is the sky blue?" }];

function client(name) {
  const url = process.env[name];
  assert.ok(url, `${name} is not set: run this through harness.py`);
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: "EMPTY", maxRetries: 0, timeout: 60_000 });
}

const targets = [client("VLLM_LB_DIRECT"), client("VLLM_LB_BALANCED")];

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
