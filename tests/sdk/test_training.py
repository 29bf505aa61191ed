"""A training loop: rollouts of an agent through sessions, and what a trainer reads back of them."""

import concurrent.futures
import contextlib
import json
import pathlib
import tempfile
import urllib.request

import openai
import pytest

import harness

ROLLOUTS = 8
TURNS = 5
EPOCHS = 2


@contextlib.contextmanager
def gateway(traces):
    """A balancer over two engines that keeps traces as these settings say."""
    first, second, listen, admin = harness.free_ports(4)
    with contextlib.ExitStack() as running:
        for port in (first, second):
            engine = [harness.binary(), "engine", "--speed", "10", "--port", str(port)]
            running.enter_context(harness.process(engine, f"http://127.0.0.1:{port}/health"))
        folder = running.enter_context(tempfile.TemporaryDirectory())
        config = pathlib.Path(folder, "lb.yaml")
        if traces.get("store") == "sqlite":
            traces = {**traces, "store": f"sqlite:{folder}/traces.db"}
        upstreams = [f"http://127.0.0.1:{port}" for port in (first, second)]
        config.write_text(json.dumps({"upstreams": upstreams, "traces": traces}))
        balancer = [harness.binary(), "--config", str(config)]
        balancer += ["--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}"]
        running.enter_context(harness.process(balancer, f"http://127.0.0.1:{listen}/health"))
        balanced = harness.Target("balanced", f"http://127.0.0.1:{listen}")
        yield harness.Stack(None, balanced, f"http://127.0.0.1:{admin}")


def call(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def rollout(stack, session, stream):
    """An agent of five turns, which knows nothing of token ids."""
    url = f"{stack.balanced.url}/sessions/{session}/v1"
    with openai.OpenAI(base_url=url, api_key="EMPTY", max_retries=0, timeout=60) as client:
        messages = [{"role": "system", "content": f"You are agent {session}."}]
        for turn in range(TURNS):
            messages.append({"role": "user", "content": f"Observation {turn} of {session}: go on."})
            common = {"model": "sim", "messages": messages, "max_tokens": 400}
            if stream:
                chunks = client.chat.completions.create(stream=True, **common)
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            else:
                text = client.chat.completions.create(**common).choices[0].message.content
            messages.append({"role": "assistant", "content": text})
    return messages


def samples(stack, session):
    """What a trainer needs of a rollout."""
    traces = call(f"{stack.admin}/sessions/{session}/traces")
    assert len(traces) == TURNS
    for trace in traces:
        assert trace["status"] == 200 and not trace["partial"], trace
        ids, logprobs = trace["completion_token_ids"], trace["logprobs"]
        assert ids and len(ids) == len(logprobs)
        assert all(isinstance(value, float) and value < 0 for value in logprobs)
        yield trace


@pytest.mark.parametrize("store", ["memory", "sqlite"])
@pytest.mark.parametrize("stream", [False, True])
def test_rollouts_are_read_back_without_a_gap(store, stream):
    with gateway({"store": store, "cumulative": True}) as stack:
        for epoch in range(EPOCHS):
            told = call(f"{stack.admin}/admin/weight_version", {"weight_version": epoch})
            assert told == {"weight_version": epoch}
            names = [f"epoch-{epoch}/rollout:{number}" for number in range(ROLLOUTS)]
            with concurrent.futures.ThreadPoolExecutor(ROLLOUTS) as pool:
                spoken = list(pool.map(lambda name: rollout(stack, name, stream), names))
            assert call(f"{stack.admin}/admin/flush", {}) == {"status": "flushed"}
            for name, messages in zip(names, spoken):
                tokens = []
                for turn, trace in enumerate(samples(stack, name)):
                    assert trace["weight_version"] == epoch
                    assert trace["messages"] == messages[: 2 * turn + 2]
                    assert trace["response_message"]["content"] == messages[2 * turn + 2]["content"]
                    prompt = trace["prompt_token_ids"]
                    assert prompt[: len(tokens)] == tokens, f"turn {turn} of {name} leaves a gap"
                    tokens = prompt + trace["completion_token_ids"]


def test_a_deleted_session_is_gone():
    with gateway({"store": "memory"}) as stack:
        rollout(stack, "one", stream=False)
        call(f"{stack.admin}/admin/flush", {})
        assert len(call(f"{stack.admin}/sessions/one/traces")) == TURNS
        gone = urllib.request.Request(f"{stack.admin}/sessions/one", method="DELETE")
        with urllib.request.urlopen(gone, timeout=30) as answer:
            assert json.load(answer) == {"deleted": TURNS}
        assert call(f"{stack.admin}/sessions/one/traces") == []
