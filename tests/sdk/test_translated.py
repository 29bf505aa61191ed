"""The openai SDK's Responses over an engine that has only chats (`responses: chat`).

Held against an engine that has Responses itself: a client must not be able to tell which of the two it
talks to, but for what only the engine knows, as the limit that it has put in where none was asked for.
"""

import contextlib
import json
import pathlib
import tempfile

import openai
import pydantic
import pytest

import harness
from conftest import MODEL, Clients, normal

ASK = [{"role": "user", "content": "Why is the sky blue?"}]
THINK = {"chat_template_kwargs": {"enable_thinking": True}}

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "weather", "description": "the weather", "parameters": WEATHER}


class Weather(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    city: str
    days: int


@pytest.fixture(scope="module")
def clients():
    """Of an engine that has Responses, and of a balancer before one that has none."""
    native, chats, listen, admin = harness.free_ports(4)
    binary = harness.binary()
    with contextlib.ExitStack() as running:
        for port, more in ((native, []), (chats, ["--no-responses"])):
            engine = [binary, "engine", "--speed", "10", "--port", str(port), *more]
            running.enter_context(harness.process(engine, f"http://127.0.0.1:{port}/health"))
        config = pathlib.Path(running.enter_context(tempfile.TemporaryDirectory()), "lb.yaml")
        upstreams, routes = [f"http://127.0.0.1:{chats}"], [{"responses": "chat"}]
        config.write_text(json.dumps({"upstreams": upstreams, "routes": routes}))
        balancer = [binary, "--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}"]
        balancer += ["--config", str(config)]
        running.enter_context(harness.process(balancer, f"http://127.0.0.1:{listen}/health"))
        targets = {"direct": native, "balanced": listen}
        yield [Clients(harness.Target(name, f"http://127.0.0.1:{port}")) for name, port in targets.items()]


@pytest.fixture
def both(clients):
    """Makes a call to both, and gives what the balancer said."""

    def call(make):
        direct, balanced = (make(client.openai.responses) for client in clients)
        assert said(balanced) == said(direct)
        return balanced

    return call


def said(value):
    """What has to be equal: all that was generated, how it came, and what it took."""
    value = normal(value)
    if isinstance(value, list):
        return [said(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.get("object") == "response":
        kept = ("object", "status", "incomplete_details", "model", "output", "tools", "text", "usage", "user")
        value = {key: value.get(key) for key in (*kept, "instructions", "metadata", "truncation")}
    if value.get("type") == "reasoning":
        # A translated answer has the reasoning in its summary, too.
        value = {key: field for key, field in value.items() if key != "summary"}
    if "output_tokens" in value:
        value = {key: value[key] for key in ("input_tokens", "output_tokens", "total_tokens")}
    return {key: said(inner) for key, inner in value.items()}


@pytest.mark.parametrize("given", ["Why is the sky blue?", ASK], ids=["text", "items"])
def test_create(both, given):
    asked = {"instructions": "Be brief.", "user": "me", "metadata": {"a": "b"}}
    reply = both(lambda r: r.create(model=MODEL, input=given, **asked))
    assert reply.id.startswith("resp_") and reply.status == "completed" and reply.store is False
    assert reply.output_text and reply.usage.output_tokens > 0


@pytest.mark.parametrize("more", [{}, THINK], ids=["plain", "thinking"])
def test_stream_helper(both, more):
    """The helper raises unless response.created is first, .completed last, and the id stays."""

    def call(responses):
        asked = {"store": False, "truncation": "disabled", "include": ["reasoning.encrypted_content"]}
        with responses.stream(model=MODEL, input=ASK, extra_body=more, **asked) as stream:
            events = list(stream)
            return events, stream.get_final_response()

    events, final = both(call)
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert ("response.reasoning_text.delta" in kinds) == bool(more)
    assert {event.response.id for event in events if hasattr(event, "response")} == {final.id}
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert told == final.output_text != ""


def test_an_incomplete_stream(both):
    def call(responses):
        with responses.stream(model=MODEL, input=ASK, max_output_tokens=4) as stream:
            stream.until_done()
            return stream.get_final_response()

    final = both(call)
    assert final.status == "incomplete" and final.incomplete_details.reason == "max_output_tokens"
    assert final.usage.output_tokens == 4


def test_create_as_a_stream(both):
    events = both(lambda r: list(r.create(model=MODEL, input=ASK, stream=True)))
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "name": "weather"}], ids=["any", "named"]
)
def test_tool_call(both, choice):
    reply = both(lambda r: r.create(model=MODEL, input=ASK, tools=[TOOL], tool_choice=choice))
    called = [item for item in reply.output if item.type == "function_call"]
    assert [item.name for item in called] == ["weather"]
    Weather.model_validate_json(called[0].arguments)


def test_tool_call_streamed_and_answered(both):
    def call(responses):
        asked = {"model": MODEL, "tools": [TOOL], "tool_choice": "required"}
        with responses.stream(input=ASK, extra_body=THINK, **asked) as stream:
            events = list(stream)
            first = stream.get_final_response()
        call = next(item for item in first.output if item.type == "function_call")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        history = [*ASK, *(item.model_dump() for item in first.output), result]
        return events, responses.create(model=MODEL, input=history, tools=[TOOL])

    events, answer = both(call)
    assert any(event.type == "response.function_call_arguments.done" for event in events)
    assert answer.output_text


def test_parse(both):
    reply = both(lambda r: r.parse(model=MODEL, input=ASK, text_format=Weather))
    assert isinstance(reply.output_parsed, Weather)


def test_parse_streamed(both):
    def call(responses):
        with responses.stream(model=MODEL, input=ASK, text_format=Weather) as stream:
            stream.until_done()
            return stream.get_final_response()

    assert isinstance(both(call).output_parsed, Weather)


def test_what_only_vllm_has(both):
    more = {"top_k": 20, "min_p": 0.1, "seed": 7, "repetition_penalty": 1.1, "cache_salt": "s", **THINK}
    reply = both(lambda r: r.create(model=MODEL, input=ASK, extra_body=more))
    assert reply.output[0].type == "reasoning" and reply.output[0].content[0].text


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"previous_response_id": "resp_unknown"}, openai.NotFoundError, "response_id"),
        ({"background": True}, openai.BadRequestError, "background"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools[0].type"),
        ({"model": "none"}, openai.NotFoundError, "model"),
        ({"max_output_tokens": -1}, openai.BadRequestError, None),
    ],
    ids=["previous", "background", "tool", "model", "limit"],
)
def test_what_is_refused(clients, change, kind, param):
    with pytest.raises(kind) as raised:
        clients[1].openai.responses.create(**{"model": MODEL, "input": ASK, **change})
    assert param is None or raised.value.param == param
    assert raised.value.body["message"]
