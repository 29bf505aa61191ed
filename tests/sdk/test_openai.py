"""The openai SDK, as people use it, against one engine and through the balancer."""

import asyncio
import io
import json

import openai
import pydantic
import pytest

from conftest import MODEL, normal

ASK = [{"role": "user", "content": "Why is the sky blue?"}]

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "the weather", "parameters": WEATHER}
TOOL = {"type": "function", "function": FUNCTION}
FLAT_TOOL = {"type": "function", **FUNCTION}


class Weather(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    city: str
    days: int


def text_of(chunks):
    """The text that a stream of chat chunks spells."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# ---- chat --------------------------------------------------------------------------------------


def test_chat(same):
    reply = same(lambda c: c.openai.chat.completions.create(model=MODEL, messages=ASK))
    assert reply.id.startswith("chatcmpl-") and reply.model == MODEL
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.content
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_chat_with_a_limit(same):
    reply = same(lambda c: c.openai.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5))
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 5


def test_chat_of_many_turns_and_roles(same):
    messages = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        {"role": "assistant", "content": "Scattering."},
        {"role": "user", "content": [{"type": "text", "text": "And at dusk? Ünïcödé 🦀 \"quoted\" \\ \n"}]},
    ]
    same(lambda c: c.openai.chat.completions.create(model=MODEL, messages=messages, seed=7, temperature=0))


def test_chat_of_a_long_prompt(same):
    """More than one packet, and more than is read before an upstream is chosen when it is set low."""
    messages = [{"role": "user", "content": "All work and no play makes Jack a dull boy. " * 2000}]
    reply = same(lambda c: c.openai.chat.completions.create(model=MODEL, messages=messages))
    assert reply.usage.prompt_tokens > 10_000


def test_chat_with_several_choices_and_logprobs(same):
    reply = same(
        lambda c: c.openai.chat.completions.create(
            model=MODEL, messages=ASK, n=2, logprobs=True, top_logprobs=2, max_tokens=4
        )
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert len(reply.choices[0].logprobs.content) == 4


def test_chat_stream(same):
    def call(c):
        return list(c.openai.chat.completions.create(model=MODEL, messages=ASK, stream=True))

    chunks = same(call)
    whole = same(lambda c: c.openai.chat.completions.create(model=MODEL, messages=ASK))
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks), "nobody asked for usage"


def test_chat_stream_with_usage(same):
    def call(c):
        options = {"include_usage": True}
        return list(
            c.openai.chat.completions.create(model=MODEL, messages=ASK, stream=True, stream_options=options)
        )

    chunks = same(call)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0


def test_chat_stream_helper(same):
    def call(c):
        with c.openai.chat.completions.stream(model=MODEL, messages=ASK) as stream:
            kinds = [event.type for event in stream]
            return kinds, stream.get_final_completion()

    kinds, final = same(call)
    assert kinds[0] == "chunk" and "content.delta" in kinds and "content.done" in kinds
    assert final.choices[0].message.content


def test_chat_stream_left_early(same):
    def call(c):
        with c.openai.chat.completions.create(
            model=MODEL, messages=ASK, stream=True, max_tokens=2000
        ) as stream:
            first = next(iter(stream))
        after = c.openai.chat.completions.create(model=MODEL, messages=ASK)
        return first, after

    same(call)


def test_chat_tool_call(same):
    def call(c):
        return c.openai.chat.completions.create(
            model=MODEL, messages=ASK, tools=[TOOL], tool_choice="required"
        )

    reply = same(call)
    (called,) = reply.choices[0].message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls"
    assert called.function.name == "weather"
    Weather.model_validate_json(called.function.arguments)


def test_chat_tool_call_by_name_streamed(same):
    choice = {"type": "function", "function": {"name": "weather"}}

    def call(c):
        with c.openai.chat.completions.stream(
            model=MODEL, messages=ASK, tools=[TOOL], tool_choice=choice
        ) as stream:
            return stream.get_final_completion()

    (called,) = same(call).choices[0].message.tool_calls
    Weather.model_validate_json(called.function.arguments)


def test_chat_tool_result(same):
    messages = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    same(lambda c: c.openai.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL]))


def test_chat_structured_output(same):
    shape = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": WEATHER}}
    reply = same(
        lambda c: c.openai.chat.completions.create(model=MODEL, messages=ASK, response_format=shape)
    )
    Weather.model_validate_json(reply.choices[0].message.content)


def test_chat_parse(same):
    def call(c):
        return c.openai.chat.completions.parse(model=MODEL, messages=ASK, response_format=Weather)

    assert isinstance(same(call).choices[0].message.parsed, Weather)


def test_what_only_vllm_has(same):
    extra = {"return_token_ids": True, "top_k": 3, "cache_salt": "salt"}
    reply = same(lambda c: c.openai.chat.completions.create(model=MODEL, messages=ASK, extra_body=extra))
    assert reply.choices[0].token_ids and reply.prompt_token_ids


# ---- completions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", ["Once upon a time", ["One", "Two"], [301, 302, 303], [[301, 302], [303]]], ids=str
)
def test_completions(same, prompt):
    reply = same(lambda c: c.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=6))
    many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    assert reply.id.startswith("cmpl-")
    assert len(reply.choices) == (len(prompt) if many else 1)
    assert all(choice.text for choice in reply.choices)


def test_completions_stream(same):
    def call(c):
        return list(c.openai.completions.create(model=MODEL, prompt="Once", max_tokens=6, stream=True))

    chunks = same(call)
    whole = same(lambda c: c.openai.completions.create(model=MODEL, prompt="Once", max_tokens=6))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


# ---- responses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["Why is the sky blue?", ASK], ids=["text", "items"])
def test_responses(same, given):
    reply = same(lambda c: c.openai.responses.create(model=MODEL, input=given, instructions="Be brief."))
    assert reply.id.startswith("resp_") and reply.status == "completed"
    assert reply.output_text and reply.usage.output_tokens > 0


def test_responses_stream_helper(same):
    """The helper raises unless response.created is first, and .completed last."""

    def call(c):
        asked = {"store": False, "truncation": "disabled", "include": ["reasoning.encrypted_content"]}
        with c.openai.responses.stream(model=MODEL, input=ASK, **asked) as stream:
            events = list(stream)
            return events, stream.get_final_response()

    events, final = same(call)
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert {event.response.id for event in events if hasattr(event, "response")} == {final.id}
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == final.output_text != ""


def test_responses_tool_call(same):
    def call(c):
        return c.openai.responses.create(model=MODEL, input=ASK, tools=[FLAT_TOOL], tool_choice="required")

    called = [item for item in same(call).output if item.type == "function_call"]
    assert [item.name for item in called] == ["weather"]
    Weather.model_validate_json(called[0].arguments)


def test_responses_parse(same):
    reply = same(lambda c: c.openai.responses.parse(model=MODEL, input=ASK, text_format=Weather))
    assert isinstance(reply.output_parsed, Weather)


def test_responses_that_go_on(same):
    """The second request must reach the engine that keeps the first one's answer, whichever it is."""

    def call(c):
        told = []
        for turn in range(4):
            first = c.openai.responses.create(model=MODEL, input=f"Turn {turn}", store=True)
            told.append(first)
            told.append(c.openai.responses.create(model=MODEL, input="Go on", previous_response_id=first.id))
            told.append(c.openai.responses.retrieve(first.id))
        return told

    told = same(call)
    assert told[0].id == told[2].id


def test_responses_unknown_id(same):
    error = same.fails(openai.NotFoundError, lambda c: c.openai.responses.retrieve("resp_unknown"))
    assert error.param == "response_id"
    same.fails(
        openai.NotFoundError,
        lambda c: c.openai.responses.create(model=MODEL, input="Go on", previous_response_id="resp_unknown"),
    )


# ---- the rest ----------------------------------------------------------------------------------


@pytest.mark.parametrize("coded", ["float", "base64"])
def test_embeddings(same, coded):
    reply = same(lambda c: c.openai.embeddings.create(model=MODEL, input=["a", "b"], encoding_format=coded))
    assert [item.index for item in reply.data] == [0, 1]
    assert reply.data[0].embedding


def test_models(same):
    reply = same(lambda c: list(c.openai.models.list()))
    assert [model.id for model in reply] == [MODEL]
    assert reply[0].max_model_len > 0 and reply[0].owned_by == "vllm"


def test_transcription(same):
    """A form, whose model stands behind the file or before it."""

    def call(c):
        sound = ("a.wav", io.BytesIO(b"RIFF" + bytes(40_000)), "audio/wav")
        return c.openai.audio.transcriptions.create(model=MODEL, file=sound, language="en")

    same(call)


# ---- errors ------------------------------------------------------------------------------------


def test_unknown_model(same):
    error = same.fails(
        openai.NotFoundError, lambda c: c.openai.chat.completions.create(model="nobody", messages=ASK)
    )
    assert (error.param, error.code, error.type) == ("model", "404", "NotFoundError")
    assert "nobody" in error.message


def test_unknown_model_streamed(same):
    same.fails(
        openai.NotFoundError,
        lambda c: c.openai.chat.completions.create(model="nobody", messages=ASK, stream=True),
    )


@pytest.mark.parametrize(
    "change, param",
    [
        ({"temperature": -5}, "temperature"),
        ({"messages": [{"role": "user", "content": "word " * 200_000}]}, "input_tokens"),
        ({"messages": "no list"}, None),
    ],
    ids=["temperature", "too long", "no messages"],
)
def test_bad_request(same, change, param):
    asked = {"model": MODEL, "messages": ASK, **change}
    error = same.fails(openai.BadRequestError, lambda c: c.openai.chat.completions.create(**asked))
    assert error.code == "400"
    assert param is None or error.param == param


def test_no_such_path(same):
    error = same.fails(openai.NotFoundError, lambda c: c.openai.models.retrieve(MODEL))
    assert error.body == {"detail": "Not Found"}
    same.fails(openai.NotFoundError, lambda c: c.openai.files.list())


def test_wrong_method(same):
    same.fails(openai.APIStatusError, lambda c: c.openai.get("/chat/completions", cast_to=object))


def test_wrong_and_right_key(locked_stack):
    from conftest import Same

    def call(c):
        return c.openai.chat.completions.create(model=MODEL, messages=ASK)

    same_wrong, same_right = Same(locked_stack, "wrong"), Same(locked_stack, "open-sesame")
    error = same_wrong.fails(openai.AuthenticationError, call)
    assert error.response.json() == {"error": "Unauthorized"}
    assert same_right(call).choices[0].message.content


# ---- what goes along ---------------------------------------------------------------------------


def test_raw_response_and_headers(same):
    def call(c):
        raw = c.openai.chat.completions.with_raw_response.create(
            model=MODEL, messages=ASK, extra_headers={"X-Request-Id": "from-the-client"}
        )
        kept = ("content-type", "server", "content-encoding", "vary")
        return raw.status_code, {name: raw.headers.get(name) for name in kept}, raw.parse()

    status, headers, reply = same(call)
    assert status == 200 and headers["content-type"] == "application/json"
    assert reply.id == "chatcmpl-from-the-client"


def test_raw_stream(same):
    def call(c):
        with c.openai.chat.completions.with_streaming_response.create(
            model=MODEL, messages=ASK, stream=True
        ) as raw:
            lines = list(raw.iter_lines())
        datas = [line.removeprefix("data: ") for line in lines if line]
        return raw.headers["content-type"], [one if one == "[DONE]" else json.loads(one) for one in datas]

    kind, datas = same(call)
    assert kind == "text/event-stream; charset=utf-8"
    assert datas[-1] == "[DONE]"


def test_many_at_once(same):
    """Answers must not be mixed up, lost or doubled when many are under way on few connections."""

    def call(c):
        async def one(client, number):
            asked = [{"role": "user", "content": f"Question {number}"}]
            if number % 2:
                return await client.chat.completions.create(model=MODEL, messages=asked)
            stream = await client.chat.completions.create(model=MODEL, messages=asked, stream=True)
            return [chunk async for chunk in stream]

        async def all_of_them():
            async with c.async_openai() as client:
                return await asyncio.gather(*(one(client, number) for number in range(60)))

        return [normal(reply) for reply in asyncio.run(all_of_them())]

    replies = same(call)
    assert len(replies) == 60
