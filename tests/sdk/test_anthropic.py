"""The anthropic SDK against one engine and through the balancer: vLLM speaks /v1/messages too."""

import anthropic
import pytest

from conftest import MODEL, Same

ASK = [{"role": "user", "content": "Why is the sky blue?"}]
TOOL = {
    "name": "weather",
    "description": "the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def create(clients, **change):
    asked = {"model": MODEL, "max_tokens": 8, "messages": ASK, **change}
    return clients.anthropic.messages.create(**asked)


def test_messages(same):
    reply = same(create)
    assert reply.type == "message" and reply.role == "assistant" and reply.model == MODEL
    assert reply.stop_reason == "max_tokens"
    assert reply.content[0].text and reply.usage.output_tokens == 8


def test_messages_with_system_and_turns(same):
    answered = {"role": "assistant", "content": "Scattering."}
    turns = [*ASK, answered, {"role": "user", "content": "And at dusk?"}]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    same(lambda c: create(c, system=system, messages=turns))


def test_messages_stream_helper(same):
    def call(c):
        with c.anthropic.messages.stream(model=MODEL, max_tokens=8, messages=ASK) as stream:
            events = list(stream)
            return events, stream.get_final_message()

    events, final = same(call)
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    said = "".join(event.text for event in events if event.type == "text")
    assert said == final.content[0].text == same(create).content[0].text


def test_messages_raw_events(same):
    events = same(lambda c: list(create(c, stream=True)))
    assert [event.type for event in events][-2:] == ["message_delta", "message_stop"]


def test_messages_tool_use(same):
    reply = same(lambda c: create(c, max_tokens=200, tools=[TOOL], tool_choice={"type": "any"}))
    (used,) = [block for block in reply.content if block.type == "tool_use"]
    assert reply.stop_reason == "tool_use"
    assert used.name == "weather" and isinstance(used.input["city"], str)


def test_count_tokens(same):
    counted = same(lambda c: c.anthropic.messages.count_tokens(model=MODEL, messages=ASK))
    assert counted.input_tokens == same(create).usage.input_tokens


def test_beta_query(same):
    """Claude Code asks with ?beta=true, which is no part of the path."""
    same(lambda c: c.anthropic.beta.messages.create(model=MODEL, max_tokens=8, messages=ASK))


def test_unknown_model(same):
    error = same.fails(anthropic.NotFoundError, lambda c: create(c, model="nobody"))
    assert error.body["type"] == "error" and "nobody" in error.body["error"]["message"]


@pytest.mark.parametrize(
    "change", [{"max_tokens": 0}, {"messages": "no list"}, {"extra_body": {"temperature": -5}}], ids=str
)
def test_bad_request(same, change):
    same.fails(anthropic.BadRequestError, lambda c: create(c, **change))


def test_wrong_and_right_key(locked_stack):
    Same(locked_stack, "wrong").fails(anthropic.AuthenticationError, create)
    assert Same(locked_stack, "open-sesame")(create).content
