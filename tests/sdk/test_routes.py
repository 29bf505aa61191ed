"""The SDKs through routes that have every option on, over engines that are well and engines that fail."""

import inspect
import json

import openai
import pytest

import routed
import test_anthropic
import test_openai
from conftest import Same, normal
from faces import ASK, TALK
from test_openai import FLAT_TOOL, TOOL, Weather

FLAT_TOOLS = {"tools": [FLAT_TOOL], "tool_choice": "required"}
NOT_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
BUNDLE = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")


# ---- what stands elsewhere, through a route ----------------------------------------------------


class Renamed(Same):
    """What an engine is known by to itself is not compared."""

    def plain(self, value):
        def without(value):
            if isinstance(value, dict):
                own = ("system_fingerprint", "root")
                return {key: without(inner) for key, inner in value.items() if key not in own}
            return [without(inner) for inner in value] if isinstance(value, list) else value

        return without(super().plain(value))


@pytest.fixture(scope="module")
def renamed():
    with routed.renamed() as stack:
        yield Renamed(stack)


# These see that there are two names.
TWO_NAMES = {"test_models", "test_unknown_model", "test_unknown_model_streamed"}
ELSEWHERE = [
    pytest.param(test, id=f"{module.__name__}-{name}")
    for module in (test_openai, test_anthropic)
    for name, test in vars(module).items()
    if name.startswith("test_") and name not in TWO_NAMES
    if list(inspect.signature(test).parameters) == ["same"]
]


@pytest.mark.parametrize("test", ELSEWHERE)
def test_a_virtual_model_is_like_any_other(renamed, test):
    """What holds of a served model holds of one that a route makes of it."""
    test(renamed)


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
    assert bool(getattr(choice.message, "reasoning", None)) == (not face.think_tags)
    assert len(bundle(choice.message)[1]) == reply.usage.completion_tokens
    # What the route alone has asked for does not stand where a client that asks itself finds it.
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
    for reply in (final, whole):
        assert [item.type for item in reply.output] == ["reasoning", "message"]
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
            # Only the holder can answer: no other engine replaces it.
            plain.balancer.heal()
            if streams:
                with plain._openai.responses.stream(model=plain.model, **asked) as stream:
                    last = stream.get_final_response()
            else:
                last = plain._openai.responses.create(model=plain.model, **asked)
            assert last.model == plain.model and last.output_text
        kept = plain._openai.responses.retrieve(first.id)
        assert (kept.id, kept.model, kept.output_text) == (first.id, plain.model, first.output_text)


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
    asked = {"tools": [test_anthropic.TOOL], "tool_choice": {"type": "any"}}
    reply, (_, final) = face.message(**asked), face.message_events(**asked)
    used = [[block for block in one.content if block.type == "tool_use"][0] for one in (reply, final)]
    assert used[0].input == used[1].input and isinstance(used[0].input["city"], str)
    assert reply.stop_reason == final.stop_reason == "tool_use"


def test_count_tokens(face):
    counted = face.anthropic.messages.count_tokens(model=face.model, messages=ASK)
    usage = face.message().usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
