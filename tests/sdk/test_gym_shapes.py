"""What NeMo Gym's model types accept, of Responses over an engine that has only chats.

Gym's package needs another Python than these tests run on: the shapes of its types are written down here,
on top of the openai SDK's own types, which it derives from. All of it is validated strictly.
"""

import contextlib
import json
import pathlib
import tempfile
import urllib.request
from typing import List, Literal, Optional

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

import harness
from conftest import MODEL

ASK = {"role": "user", "content": "Why is the sky blue?"}
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "name": "weather", "description": "", "parameters": PARAMETERS, "strict": True}


class Tokens(pydantic.BaseModel):
    """Gym's TokenIDLogProbMixin: all three lists, or it is no item for training."""

    prompt_token_ids: List[int]
    generation_token_ids: List[int]
    generation_log_probs: List[float]


class Summary(pydantic.BaseModel):
    text: str
    type: Literal["summary_text"]


class Reasoning(pydantic.BaseModel):
    """Gym's reasoning item, which has no content."""

    id: str
    summary: List[Summary]
    type: Literal["reasoning"] = "reasoning"
    encrypted_content: Optional[str] = None


@pytest.fixture(scope="module")
def stack():
    """A balancer with Gym's settings before an engine that has only chats: its client, and the engine."""
    engine, listen, admin = harness.free_ports(3)
    binary = harness.binary()
    with contextlib.ExitStack() as running:
        command = [binary, "engine", "--speed", "10", "--no-responses", "--port", str(engine)]
        running.enter_context(harness.process(command, f"http://127.0.0.1:{engine}/health"))
        config = pathlib.Path(running.enter_context(tempfile.TemporaryDirectory()), "lb.yaml")
        route = {
            "return_token_id_information": True,
            "is_responses_native": False,
            "uses_interleaved_reasoning": True,
            "sequential_reasoning_allowed": True,
            "overflow": "length",
            "body": {"remove": ["tools[].function.strict"]},
        }
        config.write_text(json.dumps({"upstreams": [f"http://127.0.0.1:{engine}"], "routes": [route]}))
        command = [binary, "--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}"]
        command += ["--config", str(config)]
        running.enter_context(harness.process(command, f"http://127.0.0.1:{listen}/health"))
        base = f"http://127.0.0.1:{listen}/v1"
        yield openai.OpenAI(base_url=base, api_key="EMPTY", max_retries=0), f"http://127.0.0.1:{engine}"


def last_chat(engine):
    """The body of the latest chat that the engine got."""
    with urllib.request.urlopen(engine + "/sim/requests", timeout=10) as answer:
        got = [one for one in json.load(answer) if one["path"] == "/v1/chat/completions"]
    return json.loads(got[-1]["body"])


def response(client, **asked):
    """The response, as its bytes say it."""
    raw = client.responses.with_raw_response.create(model=MODEL, **asked)
    Response.model_validate_json(raw.content, strict=True)
    return json.loads(raw.content)


def as_gym_keeps(item):
    """An item of an answer as Gym sends it with the next turn."""
    if item["type"] != "reasoning":
        return item
    return {**item, **Reasoning.model_validate(item, strict=True).model_dump(), "content": None}


def test_a_response_is_one_of_gyms(stack):
    client, _ = stack
    told = response(client, input=[ASK], extra_body=THINK)
    assert told["usage"]["output_tokens_details"]["reasoning_tokens"] >= 0
    assert told["usage"]["input_tokens_details"]["cached_tokens"] >= 0
    thought, *_, last = told["output"]
    kept = Reasoning.model_validate(thought, strict=True)
    assert [part.text for part in kept.summary] == [part["text"] for part in thought["content"]]
    tokens = Tokens.model_validate(last, strict=True)
    assert tokens.prompt_token_ids
    assert len(tokens.generation_token_ids) == len(tokens.generation_log_probs) > 0


def test_a_streamed_response_is_one_of_gyms(stack):
    client, _ = stack
    with client.responses.stream(model=MODEL, input=[ASK], extra_body=THINK) as stream:
        stream.until_done()
        final = stream.get_final_response()
    assert Response.model_validate_json(final.model_dump_json(), strict=True).usage.input_tokens > 0
    Reasoning.model_validate(final.output[0].model_dump(), strict=True)
    Tokens.model_validate(final.output[-1].model_dump(), strict=True)


def test_reasoning_and_token_ids_come_back_with_the_next_turn(stack):
    client, engine = stack
    told = response(client, input=[ASK], tools=[TOOL], tool_choice="required", extra_body=THINK)
    first = told["output"]
    call = next(item for item in first if item["type"] == "function_call")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    response(client, input=[ASK, *map(as_gym_keeps, first), result], tools=[TOOL])
    sent = last_chat(engine)
    assistant = sent["messages"][1]
    assert assistant["role"] == "assistant"
    assert assistant["reasoning"] == first[0]["summary"][0]["text"]
    assert Tokens.model_validate(assistant) == Tokens.model_validate(first[-1])
    assert "strict" not in sent["tools"][0]["function"]


def test_a_chat_is_one_of_gyms(stack):
    client, _ = stack
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=[ASK])
    ChatCompletion.model_validate_json(raw.content, strict=True)
    Tokens.model_validate(json.loads(raw.content)["choices"][0]["message"], strict=True)


def test_an_empty_answer_has_empty_lists(stack):
    client, _ = stack
    long = [{"role": "user", "content": "word " * 200_000}]
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=long)
    ChatCompletion.model_validate_json(raw.content, strict=True)
    choice = json.loads(raw.content)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert Tokens.model_validate(choice["message"], strict=True).generation_token_ids == []
    raw = client.responses.with_raw_response.create(model=MODEL, input=long)
    last = json.loads(raw.content)["output"][-1]
    assert Tokens.model_validate(last, strict=True).prompt_token_ids == []
