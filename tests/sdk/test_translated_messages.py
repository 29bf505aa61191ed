"""The anthropic SDK's Messages over an engine that has only chats (`messages: chat`).

Held against an engine that has Messages itself: a client must not be able to tell which of the two it
talks to.
"""

import asyncio
import contextlib
import json
import pathlib
import tempfile

import anthropic
import pytest

import harness
from conftest import MODEL, Clients, normal

ASK = [{"role": "user", "content": "Why is the sky blue?"}]
THINK = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1100}
TOOL = {
    "name": "weather",
    "description": "the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ANY = {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 200}


@pytest.fixture(scope="module")
def clients():
    """Of an engine that has Messages, and of a balancer before one that has none."""
    native, chats, listen, admin = harness.free_ports(4)
    binary = harness.binary()
    with contextlib.ExitStack() as running:
        for port, more in ((native, []), (chats, ["--no-messages"])):
            engine = [binary, "engine", "--speed", "10", "--port", str(port), *more]
            running.enter_context(harness.process(engine, f"http://127.0.0.1:{port}/health"))
        config = pathlib.Path(running.enter_context(tempfile.TemporaryDirectory()), "lb.yaml")
        upstreams, routes = [f"http://127.0.0.1:{chats}"], [{"messages": "chat"}]
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
        direct, balanced = (make(client.anthropic.messages) for client in clients)
        assert said(balanced) == said(direct)
        return balanced

    return call


def said(value):
    """What has to be equal: all but ids, what was cached, and the signatures that are new with every call."""
    value = normal(value)
    if isinstance(value, list):
        return [said(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {key: said(inner) for key, inner in value.items() if key not in ("signature", "tool_use_id")}


def asked(**change):
    return {"model": MODEL, "max_tokens": 8, "messages": ASK, **change}


@pytest.mark.parametrize(
    "change",
    [{}, {"system": "Be brief."}, {"stop_sequences": ["a"], "max_tokens": 90}, THINK, ANY],
    ids=["plain", "system", "stop", "thinking", "tools"],
)
def test_create(both, change):
    reply = both(lambda m: m.create(**asked(**change)))
    assert reply.type == "message" and reply.model == MODEL and reply.usage.output_tokens > 0
    if "stop_sequences" in change:
        assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "a")


@pytest.mark.parametrize("change", [{}, THINK, ANY], ids=["plain", "thinking", "tools"])
def test_stream_helper(both, change):
    def call(messages):
        with messages.stream(**asked(**change)) as stream:
            events = list(stream)
            return events, stream.get_final_message()

    events, final = both(call)
    assert events[0].type == "message_start" and events[-1].type == "message_stop"
    whole = both(lambda m: m.create(**asked(**change)))
    assert said(final.content) == said(whole.content)
    assert final.stop_reason == whole.stop_reason


def test_raw_events(both):
    events = both(lambda m: list(m.create(**asked(stream=True))))
    assert [event.type for event in events][-2:] == ["message_delta", "message_stop"]


def test_async(clients):
    async def call(target):
        client = anthropic.AsyncAnthropic(base_url=target.url, auth_token="EMPTY", max_retries=0)
        async with client, client.messages.stream(**asked()) as stream:
            text = "".join([text async for text in stream.text_stream])
            final = await stream.get_final_message()
        return text, final

    direct, balanced = (asyncio.run(call(client.target)) for client in clients)
    assert said(balanced) == said(direct)
    assert balanced[0] == balanced[1].content[0].text != ""


def test_a_tool_is_called_and_its_result_read(both):
    def call(messages):
        more = {"chat_template_kwargs": {"enable_thinking": True}}
        first = messages.create(**asked(**ANY, extra_body=more))
        used = next(block for block in first.content if block.type == "tool_use")
        assert first.stop_reason == "tool_use" and isinstance(used.input["city"], str)
        rain = [{"type": "text", "text": "rain"}]
        result = {"type": "tool_result", "tool_use_id": used.id, "content": rain}
        told = {"role": "assistant", "content": first.content}
        turns = [*ASK, told, {"role": "user", "content": [result]}]
        return first, messages.create(**asked(messages=turns, tools=[TOOL]))

    first, answer = both(call)
    assert first.content[0].type == "thinking" and answer.content[0].text


def test_an_image(both):
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is it?"}]
    both(lambda m: m.create(**asked(messages=[{"role": "user", "content": content}])))


def test_structured_output(both):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    format = {"type": "json_schema", "schema": schema}
    change = {"extra_body": {"output_config": {"format": format}}, "max_tokens": 99}
    reply = both(lambda m: m.create(**asked(**change)))
    assert isinstance(json.loads(reply.content[0].text)["a"], str)


def test_count_tokens(both):
    count = both(lambda m: m.count_tokens(model=MODEL, messages=ASK, tools=[TOOL], system="Be brief."))
    reply = both(lambda m: m.create(**asked(tools=[TOOL], system="Be brief.")))
    assert count.input_tokens == reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError),
        ({"max_tokens": 0}, anthropic.BadRequestError),
        ({"extra_body": {"temperature": -5}}, anthropic.BadRequestError),
        ({"model": "none"}, anthropic.NotFoundError),
    ],
    ids=["tool", "limit", "temperature", "model"],
)
def test_what_is_refused(clients, change, kind):
    with pytest.raises(kind) as raised:
        clients[1].anthropic.messages.create(**asked(**change))
    assert raised.value.body["type"] == "error" and raised.value.body["error"]["message"]
