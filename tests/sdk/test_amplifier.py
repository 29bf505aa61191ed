"""Amplifier's client of vLLM, rebuilt on the openai SDK from what it sends: the real one is in no registry.

It streams Responses with `accept: application/json`, names no session, gives its history's items new ids
with every request, and decides by status and `Retry-After` whether it tries again.
"""

import asyncio
import contextlib
import http.client
import json
import time
import urllib.parse
import uuid

import openai
import pytest

import harness
import routed
from test_openai import FLAT_TOOL

# What it waits at the most between two tries; an answer that asks for more is not tried again.
LONGEST = 60
WORDS = "The quick brown fox jumps over the lazy dog and runs away from all of them. "

FACE = {
    "model": "agent",
    "to": "sim",
    "body": {"defaults": {"max_tokens": 100, "temperature": 0.3, "truncation": "auto"}},
}
# For streams that stall: a slow machine lets others stall, too.
HASTY = {**FACE, "model": "hasty", "timeouts": {"idle": "300ms"}}


@pytest.fixture(scope="module")
def engines():
    with routed.engines(3) as urls:
        yield urls


@pytest.fixture(scope="module")
def balancer(engines):
    # Tests fail engines more often than the breaker and the budget would let pass.
    more = {"breaker": {"failures": 1000}, "retry": {"budget": 10}}
    with routed.balancer({"upstreams": engines, "routes": [FACE, HASTY], **more}, engines) as running:
        yield running


@pytest.fixture(params=["sim", "agent"])
def model(request):
    return request.param


# ---- the client --------------------------------------------------------------------------------


def item(role, text):
    if role == "user":
        return {"role": "user", "content": text}
    content = [{"type": "output_text", "text": text, "annotations": []}]
    kind = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "status": "completed"}
    return {**kind, "role": "assistant", "content": content}


def thought(text):
    summary = [{"type": "summary_text", "text": text}]
    content = [{"type": "reasoning_text", "text": text}]
    kind = {"type": "reasoning", "id": f"local_{uuid.uuid4().hex[:16]}"}
    return {**kind, "summary": summary, "content": content}


def call(identity, name, arguments):
    kind = {"type": "function_call", "call_id": identity, "id": f"ft_{identity}", "status": None}
    return {**kind, "name": name, "arguments": arguments}


def parameters(model, given, **more):
    include = ["reasoning.encrypted_content"]
    fixed = {"store": False, "max_output_tokens": 24, "include": include, "truncation": "disabled"}
    return {"model": model, "input": given, **fixed, **more}


async def once(client, asked, deadline=20):
    """One attempt: the kinds of its events, and the response."""
    async with asyncio.timeout(deadline), client.responses.stream(**asked) as stream:
        kinds = [event.type async for event in stream]
        return kinds, await stream.get_final_response()


def verdict(error):
    """What it takes an error for: whether it is tried again, and after how long at the least."""
    if isinstance(error, openai.RateLimitError):
        after = float(error.response.headers.get("retry-after", 0))
        return after <= LONGEST, after
    if isinstance(error, openai.APIStatusError):
        return error.status_code >= 500, 0
    return True, 0


async def stubbornly(client, asked, tries=6):
    for left in reversed(range(tries)):
        try:
            return await once(client, asked)
        except (openai.APIError, RuntimeError) as error:
            again, after = verdict(error)
            if not again or not left:
                raise
            await asyncio.sleep(max(after, 0.1))


def run(target, work):
    async def whole():
        async with openai.AsyncOpenAI(base_url=target.v1, api_key="EMPTY", max_retries=0) as client:
            return await work(client)

    return asyncio.run(whole())


def complete(running, asked):
    return run(running.balanced, lambda client: once(client, asked))


def newest(running, before):
    news = [got[len(old) :] for got, old in zip(running.received(), before)]
    ((path, headers, body),) = [one for got in news for one in got]
    return path, headers, json.loads(body)


# ---- its requests ------------------------------------------------------------------------------


def test_its_request_arrives_as_it_is(balancer, model):
    history = [
        item("user", "<context_file>\nnotes\n</context_file>"),
        item("user", "What is the weather?"),
        thought("I should look."),
        call("call_1", "weather", '{"city": "Ulm", "days": 1}'),
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        item("assistant", "It rains."),
        item("user", "And tomorrow?"),
    ]
    tools = {"tools": [FLAT_TOOL], "tool_choice": "auto", "parallel_tool_calls": True}
    reasoning = {"effort": "low", "summary": "detailed"}
    asked = parameters(model, history, instructions="Be brief.", reasoning=reasoning, **tools)
    before = balancer.received()
    kinds, response = complete(balancer, asked)
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert response.model == model and response.output_text
    path, headers, body = newest(balancer, before)
    assert (path, headers["accept"]) == ("/v1/responses", "application/json")
    assert headers["authorization"] == "Bearer EMPTY"
    added = {"temperature": 0.3} if model == "agent" else {}
    assert body == {**asked, "stream": True, "model": "sim", **added}


def test_what_it_does_not_say_is_not_made_null(balancer, model):
    """For vLLM `truncation: null` is another word for auto, which loses input without a word."""
    asked = parameters(model, [item("user", "Hi")])
    del asked["truncation"], asked["max_output_tokens"]
    before = balancer.received()
    complete(balancer, asked)
    body = newest(balancer, before)[2]
    assert None not in body.values()
    routes = {"truncation": "auto", "max_output_tokens": 100, "temperature": 0.3}
    assert {key: body[key] for key in routes if key in body} == (routes if model == "agent" else {})


def test_a_conversation_stays_where_its_cache_is(balancer, model):
    """No session, and new ids every time: what is known again is what was said."""

    async def converse(client, number):
        history = [item("user", f"{model} {number}: {WORDS * 100}")]
        kept = []
        for turn in range(4):
            # As the client writes it anew for every request.
            anew = [item(one["role"], one["text"]) if "text" in one else one for one in history]
            _, response = await once(client, parameters(model, anew))
            usage = response.usage
            kept.append(usage.input_tokens_details.cached_tokens / usage.input_tokens)
            history += [{"role": "assistant", "text": response.output_text}, item("user", f"Turn {turn}")]
        return kept

    async def all_of_them(client):
        return await asyncio.gather(*(converse(client, number) for number in range(6)))

    for first, *others in run(balancer.balanced, all_of_them):
        # Each engine has a cache of its own: only the one that had the turn before has this much of it. What
        # the others have in flight is never worth as much as these prompts.
        assert first < 0.5 and min(others) > 0.8, (first, others)


def test_what_is_cut_by_its_length_completes(balancer, model):
    """It goes on from there by itself, where the stream has ended as it must: with response.completed."""
    first = parameters(model, [item("user", "Tell me a story.")])
    kinds, response = complete(balancer, first)
    assert kinds[-1] == "response.completed" and response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    kinds, response = complete(balancer, {**first, "input": [*first["input"], item("assistant", "Once")]})
    assert kinds[-1] == "response.completed"


def test_it_finds_what_a_model_can_take(balancer):
    cards = run(balancer.balanced, lambda client: client.models.list()).data
    served = dict.fromkeys(["agent", "hasty", "sim"], routed.LENGTH)
    assert {card.id: card.max_model_len for card in cards} == served


# ---- its errors --------------------------------------------------------------------------------


def plainly(target, method, path, body):
    """Status, headers and body of an answer that no SDK reads."""
    place = urllib.parse.urlsplit(target.url)
    with contextlib.closing(http.client.HTTPConnection(place.hostname, place.port, timeout=30)) as connection:
        connection.request(method, path, body=body, headers={"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


@pytest.mark.parametrize(
    "method, path, body, status",
    [
        ("POST", "/v1/responses", '{"model": "nobody", "input": "x"}', 404),
        ("POST", "/v1/responses", "{", 400),
        ("POST", "/v1/responses", '{"model": "agent", "input": "x", "temperature": -1}', 400),
        ("POST", "/v1/responses", '{"model": "agent"}', 400),
        ("POST", "/v1/responses", '{"model": "agent", "input": "' + "x " * 9000 + '"}', 400),
        ("POST", "/v1/responses", '{"model": "agent", "input": "x", "previous_response_id": "resp_x"}', 404),
        ("GET", "/v1/responses/resp_x", None, 404),
        ("GET", "/v1/responses", None, 405),
        ("GET", "/v1/nowhere", None, 404),
    ],
)
def test_every_error_is_json(balancer, method, path, body, status):
    """It takes what is no JSON for a proxy's page, and tries again what will never work."""
    told, headers, said = plainly(balancer.balanced, method, path, body)
    assert told == status and headers["content-type"] == "application/json"
    assert isinstance(json.loads(said), dict)
    assert not any(word in said for word in (b"blocked", b"safety", b"content filter"))


def test_a_prompt_that_is_too_long_is_told_in_vllms_words(balancer, model):
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        complete(balancer, parameters(model, [item("user", "word " * 9000)]))


def test_overload_is_429_and_an_honest_time(engines, model):
    full = {"url": engines[0], "max_active": 1}
    config = {"upstreams": [full], "routes": [FACE], "queue": {"size": 0, "wait": "1s"}}
    with routed.balancer(config, engines) as running:
        # The first stream lasts until its client leaves.
        running.fail(0, "stall_stream", events=4)

        async def crowd(client):
            async with client.responses.stream(**parameters(model, [item("user", "Hi")])) as first:
                assert (await anext(aiter(first))).type == "response.created"
                with pytest.raises(openai.RateLimitError) as raised:
                    await once(client, parameters(model, [item("user", "Me too")]))
                # It is let in as soon as there is room, by its own patience.
                waits = asyncio.create_task(stubbornly(client, parameters(model, [item("user", "Me too")])))
            return raised.value, await waits

        error, (_, response) = run(running.balanced, crowd)
    assert error.response.headers["content-type"] == "application/json"
    assert 1 <= int(error.response.headers["retry-after"]) <= LONGEST
    assert verdict(error)[0] and isinstance(error.body, dict)
    assert response.model == model


def test_nobody_there_is_503(model):
    (port,) = harness.free_ports(1)
    nobody = {"url": f"http://127.0.0.1:{port}", "models": ["sim"]}
    with routed.balancer({"upstreams": [nobody], "routes": [FACE]}, [], lives=True) as running:
        with pytest.raises(openai.InternalServerError) as raised:
            complete(running, parameters(model, [item("user", "Hi")]))
    assert (raised.value.status_code, verdict(raised.value)[0]) == (503, True)
    assert isinstance(raised.value.body, dict) and raised.value.body["message"]


# ---- its streams -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["error_event", "cut_headers", "cut_stream", "abort_empty", "status"])
def test_another_engine_takes_over_before_the_first_token(balancer, model, kind):
    asked = parameters(model, [item("user", "Hi")])
    for kinds, response in balancer.struck(lambda: complete(balancer, asked), kind, events=2, status=502):
        # Ids that differ, or two beginnings, are a RuntimeError of the SDK's.
        assert kinds.count("response.created") == 1 and response.output_text


@pytest.mark.parametrize("kind", ["cut_stream", "stall_stream"])
def test_what_breaks_in_the_middle_is_an_error_at_once(balancer, kind):
    """An end without an event is a RuntimeError of the SDK's; silence is five minutes of its own clock."""
    for at in range(3):
        balancer.fail(at, kind, events=8)
    begun = time.monotonic()
    with pytest.raises(openai.APIError) as raised:
        complete(balancer, parameters("hasty", [item("user", "Hi")]))
    assert time.monotonic() - begun < 5 and verdict(raised.value)[0]
    balancer.heal()
    kinds, _ = run(balancer.balanced, lambda c: stubbornly(c, parameters("agent", [item("user", "Hi")])))
    assert kinds[-1] == "response.completed"
