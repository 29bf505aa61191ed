"""What engines get through routes with every option on, and what the SDKs see when something is wrong."""

import asyncio
import itertools
import json

import anthropic
import openai
import pytest

import harness
import routed
from faces import ASK, TALK, Face

LONG = [{"role": "user", "content": "word " * (2 * routed.LENGTH)}]
STOPS = routed.EVERYTHING["body"]["defaults"]["stop"]


def last_received(balancer, before):
    """The one request that came to the engines since."""
    news = [got[len(old) :] for got, old in zip(balancer.received(), before)]
    ((path, headers, body),) = [one for got in news for one in got]
    return path, headers, json.loads(body)


# ---- what the engine gets ----------------------------------------------------------------------


def test_what_the_engine_gets_of_a_chat(calm):
    before = calm.balancer.received()
    raw = calm.openai.chat.completions.with_raw_response.create(
        model=calm.model,
        messages=TALK,
        temperature=0.1,
        user="somebody",
        logit_bias={"7": 1},
        service_tier="flex",
        max_completion_tokens=9,
        metadata={
            "extra_body": json.dumps({"top_k": 4, "temperature": 1.5}),
            "chat_template_kwargs": json.dumps({"style": {"tone": "kind"}}),
        },
        extra_headers={"x-debug": "1"},
        extra_body={"chat_template_kwargs": {"enable_thinking": False, "secret": 1, "style": {"rhymes": 2}}},
    )
    assert raw.headers["x-served-by"] == "a route" and "server" not in raw.headers
    assert raw.headers["x-vllm-lb-upstream"].startswith("engine-")
    path, headers, body = last_received(calm.balancer, before)
    assert headers["authorization"] == f"Bearer {routed.KEY}" and headers["x-stage"] == "prod"
    assert not {"x-debug", "x-team"} & set(headers)
    assert body.pop("metadata") and path == routed.PATHS[0]
    assert body == {
        "model": routed.SERVED,
        "messages": [{"role": "system", "content": "Be brief."}, *ASK],
        "temperature": 0.1,
        "max_completion_tokens": 9,
        "top_k": 4,
        "seed": 7,
        "stop": STOPS,
        "reasoning_effort": "low",
        "logprobs": True,
        "return_token_ids": True,
        "chat_template_kwargs": {"enable_thinking": False, "style": {"tone": "kind", "rhymes": 1}},
    }


def test_what_the_engine_gets_of_a_response_and_a_message(calm):
    kwargs = {"enable_thinking": True, "style": {"tone": "dry", "rhymes": 1}}
    before = calm.balancer.received()
    calm.response_events(reasoning={"effort": "high", "summary": "auto"})
    _, _, body = last_received(calm.balancer, before)
    # Of a response that is kept, its id says where.
    assert body.pop("request_id").startswith("resp_")
    assert body == {
        "model": routed.SERVED,
        "input": [{"role": "system", "content": "Be brief."}, *ASK],
        "stream": True,
        "max_output_tokens": 200,
        "temperature": 0.5,
        "truncation": "disabled",
        "stop": STOPS,
        "seed": 7,
        "reasoning": {"effort": "high", "summary": "auto"},
        "chat_template_kwargs": kwargs,
    }
    before = calm.balancer.received()
    calm.message()
    _, headers, body = last_received(calm.balancer, before)
    assert body == {
        "model": routed.SERVED,
        "messages": ASK,
        "max_tokens": 40,
        "temperature": 0.5,
        "seed": 7,
        "chat_template_kwargs": kwargs,
    }
    assert headers["authorization"] == f"Bearer {routed.KEY}" and "x-api-key" not in headers


def test_thoughts_come_back_as_reasoning(calm, balancer, clients):
    """What a chat was told with tags is history for the next turn, and no text of the assistant's."""
    tagged = Face(balancer, clients, "tagged")
    said = tagged.chat().choices[0].message.content
    before = balancer.received()
    tagged.chat(messages=[*TALK, {"role": "assistant", "content": said}, {"role": "user", "content": "And?"}])
    message = last_received(balancer, before)[2]["messages"][2]
    thought, text = said.removeprefix("<think>").split("</think>")
    assert (message["role"], message["content"]) == ("assistant", text)
    assert message["reasoning"] == message["reasoning_content"] == thought


def test_without_the_header_nothing_matches(calm):
    """The header is a condition: without it the name is nobody's, and is refused as any other."""
    client = openai.OpenAI(base_url=calm.balancer.balanced.v1, api_key="x", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="plain", messages=ASK)


# ---- errors ------------------------------------------------------------------------------------


def test_models(calm):
    cards = {card.id: card for card in calm.openai.models.list()}
    assert list(cards) == [*routed.FACES, "locked", "strict", "haunted", routed.SERVED, "ghost"]
    assert {cards[name].max_model_len for name in (*routed.FACES, routed.SERVED)} == {routed.LENGTH}


@pytest.mark.parametrize("name", ["nobody", "lost"])
def test_an_unknown_model(calm, name):
    calls = [
        lambda: calm.chat(model=name),
        lambda: calm.chat(model=name, stream=True),
        lambda: calm.openai.responses.create(model=name, input="Why?"),
        lambda: calm.message(model=name),
    ]
    for call in calls:
        with pytest.raises((openai.NotFoundError, anthropic.NotFoundError)) as raised:
            call()
        assert f"The model `{name}` does not exist." in str(raised.value)
        assert "Valid aliases: tagged, plain, " in str(raised.value)


def test_the_engines_word_about_a_model_has_the_clients_name(calm):
    for streams in (False, True):
        with pytest.raises(openai.NotFoundError, match="The model `haunted` does not exist") as raised:
            calm.chat(model="haunted", stream=streams)
        assert raised.value.param == "model"
    with pytest.raises(anthropic.NotFoundError, match="The model `haunted` does not exist"):
        calm.message(model="haunted")


def test_a_bad_request(calm):
    with pytest.raises(openai.BadRequestError) as raised:
        calm.chat(temperature=-5)
    assert raised.value.param == "temperature"
    with pytest.raises(anthropic.BadRequestError):
        calm.message(max_tokens=0)
    with pytest.raises(openai.BadRequestError):
        calm.chat(messages="no list")


def test_a_wrong_key(calm):
    with pytest.raises(openai.AuthenticationError) as raised:
        calm.chat(model="locked")
    assert raised.value.response.json() == {"error": "Unauthorized"}
    with pytest.raises(anthropic.AuthenticationError):
        calm.message(model="locked")


# ---- a prompt that is too long -----------------------------------------------------------------


def test_an_overflow_of_a_chat(face):
    raw = face.openai.chat.completions.with_raw_response.create(model=face.model, messages=LONG)
    (choice,) = raw.parse().choices
    assert (raw.parse().model, choice.finish_reason, choice.message.content) == (face.model, "length", "")
    assert raw.headers["x-served-by"] == "a route" and "server" not in raw.headers
    assert raw.headers["content-type"] == "application/json"
    chunks = face.chunks(messages=LONG)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {(chunk.model, chunk.id) for chunk in chunks} == {(face.model, chunks[0].id)}
    assert not any(choice.delta.content for chunk in chunks for choice in chunk.choices)


def test_an_overflow_of_a_response(face):
    whole = face.openai.responses.create(model=face.model, input=LONG)
    events, final = face.response_events(input=LONG)
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    for reply in (whole, final):
        assert (reply.status, reply.output_text, reply.model) == ("incomplete", "", face.model)
        assert reply.incomplete_details.reason == "max_output_tokens"
    assert {event.response.id for event in events if hasattr(event, "response")} == {final.id}


def test_an_overflow_of_a_message(face):
    reply, (_, final) = face.message(messages=LONG), face.message_events(messages=LONG)
    for one in (reply, final):
        assert (one.stop_reason, one.model, one.content[0].text) == ("max_tokens", face.model, "")


def test_an_overflow_is_an_error_elsewhere(calm):
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        calm.chat(model="strict", messages=LONG)


# ---- many, and what breaks ---------------------------------------------------------------------


def test_many_at_once(balancer, weather):
    """Answers are not mixed up: of each question there is one text, however it is asked for."""

    async def ask(client, number, model, streams):
        asked = {"model": model, "messages": [{"role": "user", "content": f"Question {number}"}]}
        if not streams:
            return (await client.chat.completions.create(**asked)).choices[0].message.content
        async with client.chat.completions.stream(**asked) as stream:
            return (await stream.get_final_completion()).choices[0].message.content

    async def all_of_them():
        url = balancer.balanced.v1
        async with openai.AsyncOpenAI(
            base_url=url, api_key="x", max_retries=0, timeout=60, default_headers=routed.MATCHED
        ) as client:
            asked = list(itertools.product(range(10), routed.FACES, (False, True)))
            return dict(zip(asked, await asyncio.gather(*(ask(client, *one) for one in asked))))

    if weather == "rough":
        balancer.fail(0, "cut_headers", requests=8, reset=True)
        balancer.fail(1, "abort_empty", requests=8)
    told = asyncio.run(all_of_them())
    for number in range(10):
        texts = [{told[number, model, streams] for streams in (False, True)} for model in routed.FACES]
        assert [len(one) for one in texts] == [1, 1], f"question {number}"
        (tagged,), (plain,) = texts
        assert tagged.split("</think>")[1] == plain
    assert len(set(told.values())) == 20


@pytest.mark.parametrize("fault", ["error_event", "cut_stream"])
def test_what_fails_before_its_first_token_is_made_good(calm, fault):
    """Whatever an engine had said by then, the client sees one stream that begins once."""
    # What comes before a token: created and in_progress, a role, message_start.
    for call, prelude in [(calm.response_events, 2), (calm.chat_events, 1), (calm.message_events, 1)]:
        for events in range(prelude + 1):
            for told, _ in calm.balancer.struck(call, fault, events=events):
                starts = [event for event in told if event.type in ("response.created", "message_start")]
                assert len(starts) == (call != calm.chat_events)


def test_sessions_and_queries_are_no_part_of_the_path(calm):
    """What a route is matched by is the path of the interface, without what else stands in it."""
    url = calm.balancer.balanced.url
    named = calm.openai.with_options(base_url=f"{url}/sessions/mine/v1")
    assert named.chat.completions.create(model="plain", messages=ASK).model == "plain"
    asked = {"model": "plain", "max_tokens": 8, "messages": ASK}
    assert calm.anthropic.beta.messages.create(**asked).model == "plain"


@pytest.mark.parametrize("reset", [False, True])
def test_what_breaks_in_the_middle_is_an_error_at_once(calm, reset):
    """The SDKs raise it: no answer is taken for whole that is not."""
    for call, kind in [
        (calm.chat_events, openai.APIError),
        (calm.response_events, openai.APIError),
        (calm.message_events, anthropic.APIError),
    ]:
        for at in range(3):
            calm.balancer.fail(at, "cut_stream", events=8, reset=reset)
        with pytest.raises(kind):
            call()
        calm.balancer.heal()


def test_engines_did_fail_and_nothing_is_left(balancer):
    """Last: without faults that struck, what stands above would have shown less than it says."""
    assert balancer.metric("vllm_lb_retries_total") > 10
    for name in ("active", "backlog_tokens", "context_tokens"):
        # A request is over after its client has the answer.
        harness.until(lambda: balancer.metric(f"vllm_lb_upstream_{name}") == 0, f"{name} is 0")
    *_, spare = balancer.received()
    assert {json.loads(body)["model"] for path, _, body in spare if path in routed.PATHS} == {"ghost"}
