"""The SDKs through routes that have every option on, over engines that are well and engines that fail."""

import asyncio
import itertools
import json

import anthropic
import openai
import pytest

import routed
from conftest import normal
from test_openai import ASK, FLAT_TOOL, TOOL, Weather
from test_anthropic import TOOL as MESSAGES_TOOL

LONG = [{"role": "user", "content": "word " * (2 * routed.LENGTH)}]
TALK = [{"role": "developer", "content": "Be brief."}, *ASK]
TOOLS = {"tools": [TOOL], "tool_choice": "required"}
FLAT_TOOLS = {"tools": [FLAT_TOOL], "tool_choice": "required"}
NOT_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
STOPS = routed.EVERYTHING["body"]["defaults"]["stop"]
BUNDLE = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")

# Ways to fail that another upstream makes good, for answers and for streams.
FAULTS = [
    {"kind": "cut_headers", "reset": True},
    {"kind": "status", "status": 502},
    {"kind": "abort_empty"},
    {"kind": "cut_headers"},
]


@pytest.fixture(scope="session")
def balancer():
    with routed.routed() as running:
        yield running


class Face:
    """The SDKs' clients of one virtual model. Where engines fail, two of three do so before every call."""

    def __init__(self, balancer, model, fails):
        self.balancer, self.model, self.think_tags = balancer, model, routed.FACES[model]
        self.faults = itertools.cycle(FAULTS) if fails else None
        url, common = balancer.balanced, {"max_retries": 0, "timeout": 60, "default_headers": routed.MATCHED}
        self._openai = openai.OpenAI(base_url=url.v1, api_key="the client's", **common)
        self._anthropic = anthropic.Anthropic(base_url=url.url, auth_token="the client's", **common)

    def disturb(self):
        if self.faults:
            self.balancer.heal()
            for at, fault in zip((0, 1), self.faults):
                self.balancer.fail(at, **fault)

    @property
    def openai(self):
        self.disturb()
        return self._openai

    @property
    def anthropic(self):
        self.disturb()
        return self._anthropic

    def chat(self, **change):
        return self.openai.chat.completions.create(**{"model": self.model, "messages": TALK, **change})

    def chunks(self, **change):
        return list(self.chat(stream=True, **change))

    def chat_events(self, **change):
        """Events of the stream helper, and what it made of them."""
        asked = {"model": self.model, "messages": TALK, **change}
        with self.openai.chat.completions.stream(**asked) as stream:
            return list(stream), stream.get_final_completion()

    def response_events(self, **change):
        with self.openai.responses.stream(**{"model": self.model, "input": TALK, **change}) as stream:
            return list(stream), stream.get_final_response()

    def message(self, **change):
        asked = {"model": self.model, "max_tokens": 40, "messages": ASK, **change}
        return self.anthropic.messages.create(**asked)

    def message_events(self, **change):
        asked = {"model": self.model, "max_tokens": 40, "messages": ASK, **change}
        with self.anthropic.messages.stream(**asked) as stream:
            return list(stream), stream.get_final_message()


@pytest.fixture(params=["calm", "rough"])
def weather(request, balancer):
    balancer.heal()
    yield request.param
    balancer.heal()


@pytest.fixture(params=routed.FACES)
def face(request, balancer, weather):
    return Face(balancer, request.param, weather == "rough")


@pytest.fixture
def plain(balancer, weather):
    return Face(balancer, "plain", weather == "rough")


@pytest.fixture
def calm(balancer):
    balancer.heal()
    return Face(balancer, "plain", False)


def last_received(balancer, before):
    """The one request that came to the engines since."""
    news = [got[len(old) :] for got, old in zip(balancer.received(), before)]
    ((path, headers, body),) = [one for got in news for one in got]
    return path, headers, json.loads(body)


# ---- chat --------------------------------------------------------------------------------------


def bundle(message):
    """What reinforcement learning reads from a message: ids of its prompt, its own ids, their logprobs."""
    ids, generated, logprobs = (getattr(message, name) for name in BUNDLE)
    assert ids and all(isinstance(one, int) for one in ids + generated)
    assert len(generated) == len(logprobs) > 0 and all(one < 0 for one in logprobs)
    return ids, generated, logprobs


def test_chat(face):
    reply = face.chat()
    (choice,) = reply.choices
    assert reply.model == face.model and choice.finish_reason == "stop"
    assert choice.message.content.startswith("<think>") == face.think_tags
    assert ("</think>" in choice.message.content) == face.think_tags
    assert getattr(choice.message, "reasoning", None) == (None if face.think_tags else choice.message.reasoning)
    assert len(bundle(choice.message)[1]) == reply.usage.completion_tokens
    # What only the route has asked for is not where a client that asks itself would find it.
    assert choice.logprobs is choice.token_ids is reply.prompt_token_ids is None


def test_chat_stream_is_the_whole_in_pieces(face):
    chunks, whole = face.chunks(), face.chat()
    state = openai.lib.streaming.chat.ChatCompletionStreamState()
    for chunk in chunks:
        assert chunk.model == face.model and chunk.choices and chunk.usage is None
        state.handle_chunk(chunk)
    assert len({chunk.id for chunk in chunks}) == 1
    (streamed,), (choice,) = state.get_final_completion().choices, whole.choices
    assert streamed.message.content == choice.message.content
    assert getattr(streamed.message, "reasoning", None) == getattr(choice.message, "reasoning", None)
    assert streamed.finish_reason == choice.finish_reason
    assert bundle(streamed.message) == bundle(choice.message)


def test_a_thought_that_is_cut_is_closed(face):
    """Whatever an answer was ended by, what is read later as history is whole."""
    chunks, whole = face.chunks(max_tokens=1), face.chat(max_tokens=1)
    (choice,) = whole.choices
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert told == (choice.message.content or "") and choice.finish_reason == "length"
    assert face.think_tags == (told.startswith("<think>") and told.endswith("</think>"))


def test_chat_stream_helper(face):
    events, final = face.chat_events()
    kinds = [event.type for event in events]
    assert kinds[0] == "chunk" and kinds.count("content.done") == 1
    said = "".join(event.delta for event in events if event.type == "content.delta")
    (done,) = [event.content for event in events if event.type == "content.done"]
    assert said == done == final.choices[0].message.content
    assert final.model == face.model and final.choices[0].finish_reason == "stop"


def test_chat_stream_of_several_choices(face):
    _, final = face.chat_events(n=2, logprobs=True, top_logprobs=1)
    whole = face.chat(n=2, logprobs=True, top_logprobs=1)
    assert [choice.index for choice in final.choices] == [0, 1]
    for streamed, choice in zip(final.choices, whole.choices):
        assert streamed.message.content == choice.message.content
        assert streamed.message.content.count("<think>") == face.think_tags
        assert bundle(streamed.message) == bundle(choice.message)
        # These were asked for, and so stay where they were.
        assert normal(streamed.logprobs.content) == normal(choice.logprobs.content)
        assert [one.logprob for one in choice.logprobs.content] == choice.message.generation_log_probs
    assert whole.choices[0].message.content != whole.choices[1].message.content


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": True}], ids=str)
def test_a_chunk_with_usage_comes_when_it_is_asked_for(face, options):
    chunks = face.chunks(stream_options=options)
    counted = [chunk for chunk in chunks if chunk.usage]
    assert len(counted) == bool(options and options["include_usage"])
    assert all(chunk.choices for chunk in chunks if not chunk.usage)
    if counted:
        assert counted == chunks[-1:] and counted[0].usage.completion_tokens > 0 and not counted[0].choices


def test_chat_parse(face):
    """Thoughts in the content would be no JSON: whoever wants both keeps them apart."""
    extra = NOT_THINKING if face.think_tags else {}
    asked = {"model": face.model, "messages": TALK, "response_format": Weather, "extra_body": extra}
    reply = face.openai.chat.completions.parse(**asked)
    assert isinstance(reply.choices[0].message.parsed, Weather)
    events, final = face.chat_events(response_format=Weather, extra_body=extra)
    assert final.choices[0].message.parsed == reply.choices[0].message.parsed
    (done,) = [event for event in events if event.type == "content.done"]
    assert done.parsed == reply.choices[0].message.parsed


def test_chat_tools_streamed(face):
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    events, final = face.chat_events(tools=[strict], tool_choice="required")
    whole = face.chat(tools=[strict], tool_choice="required")
    kinds = {event.type for event in events}
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    (streamed,), (called,) = final.choices[0].message.tool_calls, whole.choices[0].message.tool_calls
    assert streamed.function.arguments == called.function.arguments
    assert streamed.function.parsed_arguments == json.loads(called.function.arguments)
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "tool_calls"
    assert (final.choices[0].message.content or "") == (whole.choices[0].message.content or "")
    assert bundle(final.choices[0].message) == bundle(whole.choices[0].message)


def test_completions(plain):
    asked = {"model": plain.model, "prompt": ["Once", "Twice"], "max_tokens": 6}
    whole = plain.openai.completions.create(**asked)
    chunks = list(plain.openai.completions.create(**asked, stream=True))
    for index, choice in enumerate(whole.choices):
        said = [chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(said) == choice.text != ""
    assert {whole.model, *(chunk.model for chunk in chunks)} == {plain.model}


# ---- responses ---------------------------------------------------------------------------------


def test_responses_stream_helper(face):
    events, final = face.response_events()
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.count("response.created") == 1
    told = [event.response for event in events if hasattr(event, "response")]
    assert len(told) >= 3 and {(one.id, one.model) for one in told} == {(final.id, face.model)}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == final.output_text != ""
    whole = face.openai.responses.create(model=face.model, input=TALK)
    assert (whole.model, whole.output_text) == (face.model, said)
    # Reasoning is an item of its own here, whatever a chat's content has.
    kinds = [[item.type for item in response.output] for response in (final, whole)]
    assert kinds == [["reasoning", "message"]] * 2
    assert final.output[0].content[0].text == whole.output[0].content[0].text != ""


def test_responses_parse(face):
    reply = face.openai.responses.parse(model=face.model, input=TALK, text_format=Weather)
    events, final = face.response_events(text_format=Weather)
    assert isinstance(reply.output_parsed, Weather) and final.output_parsed == reply.output_parsed
    assert reply.model == final.model == face.model


def test_responses_tools(face):
    events, final = face.response_events(**FLAT_TOOLS)
    whole = face.openai.responses.create(model=face.model, input=TALK, **FLAT_TOOLS)
    (called,), (streamed,) = (
        [item for item in reply.output if item.type == "function_call"] for reply in (whole, final)
    )
    assert called.arguments == streamed.arguments
    Weather.model_validate_json(called.arguments)
    told = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert told == called.arguments


def test_responses_that_go_on(plain):
    """Every next one reaches the engine that keeps the one before, though others may take it, too."""
    for streams in (False, True):
        first = plain.openai.responses.create(model=plain.model, input=TALK, store=True)
        last = first
        for turn in range(3):
            asked = {"input": f"Go on {turn}", "previous_response_id": last.id, "store": True}
            # The holder alone can answer: nobody makes good what it fails to do.
            plain.balancer.heal()
            if streams:
                with plain._openai.responses.stream(model=plain.model, **asked) as stream:
                    last = stream.get_final_response()
            else:
                last = plain._openai.responses.create(model=plain.model, **asked)
            assert last.model == plain.model and last.output_text
        kept = plain._openai.responses.retrieve(first.id)
        assert kept.id == first.id and kept.output_text == first.output_text


# ---- messages ----------------------------------------------------------------------------------


def test_messages(face):
    reply = face.message(system="Be brief.")
    events, final = face.message_events(system="Be brief.")
    assert (reply.model, final.model) == (face.model, face.model)
    assert [block.type for block in reply.content] == ["thinking", "text"]
    assert normal(final.content[1]) == normal(reply.content[1])
    assert final.content[0].thinking == reply.content[0].thinking != ""
    assert events[0].type == "message_start" and events[0].message.model == face.model
    assert events[-1].type == "message_stop"
    said = "".join(event.text for event in events if event.type == "text")
    assert said == reply.content[1].text
    thought = "".join(event.thinking for event in events if event.type == "thinking")
    assert thought == reply.content[0].thinking


def test_messages_text_stream(face):
    asked = {"model": face.model, "max_tokens": 40, "messages": ASK, "thinking": {"type": "disabled"}}
    with face.anthropic.messages.stream(**asked) as stream:
        said = "".join(stream.text_stream)
    assert said == stream.get_final_text() != ""


def test_messages_tools(face):
    asked = {"tools": [MESSAGES_TOOL], "tool_choice": {"type": "any"}}
    reply, (_, final) = face.message(**asked), face.message_events(**asked)
    used = [[block for block in one.content if block.type == "tool_use"][0] for one in (reply, final)]
    assert used[0].input == used[1].input and isinstance(used[0].input["city"], str)
    assert reply.stop_reason == final.stop_reason == "tool_use"


def test_count_tokens(face):
    counted = face.anthropic.messages.count_tokens(model=face.model, messages=ASK)
    usage = face.message().usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


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


def test_thoughts_come_back_as_reasoning(balancer):
    """What a chat was told with tags is history for the next turn, and no text of the assistant's."""
    balancer.heal()
    tagged = Face(balancer, "tagged", False)
    said = tagged.chat().choices[0].message.content
    before = balancer.received()
    tagged.chat(messages=[*TALK, {"role": "assistant", "content": said}, {"role": "user", "content": "And?"}])
    message = last_received(balancer, before)[2]["messages"][2]
    thought, text = said.removeprefix("<think>").split("</think>")
    assert message["content"] == text
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
            asked = list(itertools.product(range(20), routed.FACES, (False, True)))
            return dict(zip(asked, await asyncio.gather(*(ask(client, *one) for one in asked))))

    if weather == "rough":
        balancer.fail(0, "cut_headers", requests=15, reset=True)
        balancer.fail(1, "abort_empty", requests=15)
    told = asyncio.run(all_of_them())
    for number in range(20):
        texts = [{told[number, model, streams] for streams in (False, True)} for model in routed.FACES]
        assert [len(one) for one in texts] == [1, 1], f"question {number}"
        (tagged,), (plain,) = texts
        assert tagged.split("</think>")[1] == plain
    assert len(set(told.values())) == 40


@pytest.mark.parametrize("fault", ["error_event", "shutting_down", "cut_stream"])
def test_what_fails_before_its_first_token_is_made_good(face, fault):
    """Whatever an engine had said by then, the client sees one stream that begins once."""
    for call in (face.response_events, face.chat_events, face.message_events):
        face.balancer.heal()
        for at in (0, 1):
            face.balancer.fail(at, fault, events=0)
        face.faults = None
        events, _ = call()
        starts = {"response.created", "message_start"}
        assert sum(event.type in starts for event in events) <= 1
        assert not any(event.type == "error" for event in events)


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
    assert balancer.metric("vllm_lb_retries_total") > 50
    for name in ("active", "backlog_tokens", "context_tokens"):
        assert balancer.metric(f"vllm_lb_upstream_{name}") == 0
    *_, spare = balancer.received()
    assert {json.loads(body)["model"] for path, _, body in spare if path in routed.PATHS} == {"ghost"}
