"""rllm-model-gateway's own client, from PyPI, against vllm-lb over simulated engines.

Every method of `GatewayClient` and `AsyncGatewayClient` is called, and the quick start of the package's
README is run as it is printed. What the client of its main branch has beyond 0.1.0 is called as that client
calls it.
"""

import asyncio
import concurrent.futures
import contextlib
import importlib.metadata
import inspect
import io
import re
import time
import types
import uuid

import httpx
import openai
import pytest
from rllm_model_gateway import AsyncGatewayClient, GatewayClient

import harness

# The model of the README.
MODEL = "Qwen/Qwen2.5-7B"
README = importlib.metadata.metadata("rllm-model-gateway").get_payload()


@contextlib.contextmanager
def engine(port):
    command = [harness.binary(), "engine", "--speed", "10", "--model", MODEL, "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with harness.process(command, f"{url}/health"):
        yield url


@contextlib.contextmanager
def running():
    """A balancer over the first of two engines."""
    listen, admin, first, spare = harness.free_ports(4)
    with engine(first) as first, engine(spare) as spare:
        command = [harness.binary(), "--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}"]
        # As the README's --worker.
        command.append(f"{first}/v1")
        with harness.process(command, f"http://127.0.0.1:{listen}/health"):
            yield types.SimpleNamespace(
                url=f"http://127.0.0.1:{admin}",
                public=f"http://127.0.0.1:{listen}",
                first=first,
                spare=spare,
            )


@pytest.fixture(scope="module")
def gateway():
    with running() as one:
        yield one


@pytest.fixture
def own_gateway():
    """For tests that change its workers."""
    with running() as one:
        yield one


class Blocking:
    """The asynchronous client, with methods that wait for their results."""

    def __init__(self, url):
        self.loop = asyncio.new_event_loop()
        self.client = AsyncGatewayClient(url)

    def __getattr__(self, name):
        method = getattr(self.client, name)

        def call(*arguments, **named):
            result = method(*arguments, **named)
            return self.loop.run_until_complete(result) if inspect.isawaitable(result) else result

        return call


def connect(kind, url):
    return GatewayClient(url) if kind == "sync" else Blocking(url)


@pytest.fixture(params=["sync", "async"])
def kind(request):
    return request.param


@pytest.fixture
def client(kind, gateway):
    one = connect(kind, gateway.url)
    yield one
    one.close()


def new_id(name="run"):
    """As Harbor names its trials."""
    return f"harbor/{name}-{uuid.uuid4().hex[:8]}:0"


def chat(url, text="Hello", **options):
    agent = openai.OpenAI(base_url=url, api_key="EMPTY", max_retries=0, timeout=60)
    options = {"model": MODEL, "max_tokens": 8, "temperature": 0, **options}
    return agent.chat.completions.create(messages=[{"role": "user", "content": text}], **options)


def streamed(url, text="Hello", **options):
    return list(chat(url, text, stream=True, **options))


def is_404(error):
    return error.value.response.status_code == 404 and error.value.response.json()


# ---- sessions ----------------------------------------------------------------------------------


def test_a_session_is_made_with_a_new_id(client, gateway):
    made = client.create_session()
    assert uuid.UUID(made).version == 4
    assert client.create_session() != made
    assert client.get_session_url(made) == f"{gateway.url}/sessions/{made}/v1"


def test_a_session_has_its_metadata(client):
    sid = new_id()
    before = time.time()
    assert client.create_session(session_id=sid, metadata={"task": 7, "tags": ["a", None]}) == sid
    info = client.get_session_info(sid)
    assert before - 1 <= info.pop("created_at") <= time.time() + 1
    assert info == {"session_id": sid, "trace_count": 0, "metadata": {"task": 7, "tags": ["a", None]}}
    client.create_session(session_id=sid, metadata={"task": 8})
    client.create_session(session_id=sid)
    assert client.get_session_info(sid)["metadata"] == {"task": 8}


def test_what_is_unknown_is_404(client):
    with pytest.raises(httpx.HTTPStatusError) as raised:
        client.get_session_info("harbor/none:0")
    assert is_404(raised) == {"error": "Session harbor/none:0 not found"}
    with pytest.raises(httpx.HTTPStatusError) as raised:
        client.get_trace("none")
    assert is_404(raised) == {"error": "Trace none not found"}
    with pytest.raises(httpx.HTTPStatusError) as raised:
        client.remove_worker("none")
    assert is_404(raised) == {"error": "Worker none not found"}
    assert client.get_session_traces("harbor/none:0") == []
    assert client.delete_session("harbor/none:0") == 0


def test_health(client):
    assert client.health() == {"status": "ok"}


def test_a_client_is_a_context(gateway):
    with GatewayClient(gateway.url) as one:
        assert one.health() == {"status": "ok"}

    async def call():
        async with AsyncGatewayClient(gateway.url) as other:
            return await other.health()

    assert asyncio.run(call()) == {"status": "ok"}


# ---- traces ------------------------------------------------------------------------------------


def asked_directly(gateway, text):
    """What the engine answers when it is asked for ids and log-probabilities."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        "return_token_ids": True,
    }
    return httpx.post(f"{gateway.first}/v1/chat/completions", json=body).raise_for_status().json()


@pytest.mark.parametrize("stream", [False, True])
def test_a_trace_holds_what_the_engine_sent(client, gateway, stream):
    sid, text = client.create_session(new_id()), "Tell me a story"
    url = client.get_session_url(sid)
    if stream:
        chunks = streamed(url, text)
        assert all(choice.logprobs is None for chunk in chunks for choice in chunk.choices)
        kept = [choice.model_extra.get("token_ids") for chunk in chunks for choice in chunk.choices]
        assert not any(kept)
        said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    else:
        answer = chat(url, text)
        assert answer.choices[0].logprobs is None
        said = answer.choices[0].message.content
    assert client.flush()
    [trace] = client.get_session_traces(sid)
    expected = asked_directly(gateway, text)
    choice = expected["choices"][0]
    assert trace.prompt_token_ids == expected["prompt_token_ids"]
    assert trace.completion_token_ids == choice["token_ids"]
    assert trace.logprobs == [token["logprob"] for token in choice["logprobs"]["content"]]
    assert (trace.session_id, trace.model, trace.finish_reason) == (sid, MODEL, choice["finish_reason"])
    assert trace.messages == [{"role": "user", "content": text}]
    assert trace.response_message["content"] == said == choice["message"]["content"]
    assert trace.latency_ms > 0 and abs(trace.timestamp - time.time()) < 60
    assert trace.raw_request["return_token_ids"] is True and trace.raw_request["logprobs"] is True
    assert (trace.raw_response is None) == stream
    if not stream:
        assert trace.token_counts["prompt"] == expected["usage"]["prompt_tokens"]
        assert trace.token_counts["completion"] == expected["usage"]["completion_tokens"]
    assert client.get_trace(trace.trace_id) == trace


def test_a_flush_finds_every_answer_before_it(client):
    sid = client.create_session(new_id())
    url = client.get_session_url(sid)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(streamed if n % 2 else chat, url, f"Question {n}") for n in range(24)]
        for call in calls:
            call.result()
    assert client.flush(timeout=30) is True
    traces = client.get_session_traces(sid)
    said = sorted(trace.messages[0]["content"] for trace in traces)
    assert said == sorted(f"Question {n}" for n in range(24))
    assert client.get_session_info(sid)["trace_count"] == 24


def texts(traces):
    return [trace.messages[0]["content"] for trace in traces]


def test_traces_come_oldest_first_by_time_and_number(client):
    sid = client.create_session(new_id())
    for n in range(3):
        chat(client.get_session_url(sid), f"Turn {n}")
    client.flush()
    assert texts(client.get_session_traces(sid)) == ["Turn 0", "Turn 1", "Turn 2"]
    assert texts(client.get_session_traces(sid, limit=2)) == ["Turn 0", "Turn 1"]
    assert client.get_session_traces(sid, limit=0) == []
    pause = time.time()
    time.sleep(0.05)
    chat(client.get_session_url(sid), "Turn 3")
    client.flush()
    assert texts(client.get_session_traces(sid, since=pause)) == ["Turn 3"]
    assert client.get_session_traces(sid, since=time.time() + 60) == []


def test_traces_are_exported_as_lines(client, gateway):
    sid = client.create_session(new_id())
    for n in range(2):
        chat(client.get_session_url(sid), f"Turn {n}")
    client.flush()
    url = f"{gateway.url}/sessions/{sid}/traces"
    lines = httpx.get(url, params={"format": "jsonl"})
    assert lines.headers["content-type"] == "application/x-ndjson"
    rows = httpx.get(url).json()
    assert lines.text.endswith("\n")
    assert [httpx.Response(200, text=line).json() for line in lines.text.splitlines()] == rows
    assert [row["session_id"] for row in rows] == [sid, sid]


def test_sessions_with_traces_are_listed_newest_first(client):
    first, second, empty = (client.create_session(new_id()) for _ in range(3))
    begun = time.time()
    for sid in (first, second, first):
        chat(client.get_session_url(sid))
        client.flush()
    listed = client.list_sessions(since=begun)
    assert [session["session_id"] for session in listed] == [second, first]
    assert [session["trace_count"] for session in listed] == [1, 2]
    assert [session["session_id"] for session in client.list_sessions(since=begun, limit=1)] == [second]
    assert client.list_sessions(since=time.time() + 60) == []
    assert empty not in [session["session_id"] for session in client.list_sessions()]


def test_a_session_that_only_calls_name_exists(client):
    sid = new_id()
    chat(client.get_session_url(sid))
    client.flush()
    info = client.get_session_info(sid)
    assert (info["trace_count"], info["metadata"]) == (1, {})


def test_deleted_sessions_are_gone_with_their_traces(client, gateway):
    ids = [client.create_session(new_id()) for _ in range(3)]
    for sid in ids:
        chat(client.get_session_url(sid))
        chat(client.get_session_url(sid), "Again")
    client.flush()
    [trace, _] = client.get_session_traces(ids[0])
    assert client.delete_session(ids[0]) == 2
    with pytest.raises(httpx.HTTPStatusError):
        client.get_session_info(ids[0])
    with pytest.raises(httpx.HTTPStatusError):
        client.get_trace(trace.trace_id)
    # Main's delete_sessions.
    deleted = httpx.post(f"{gateway.url}/sessions/batch_delete", json={"session_ids": [*ids, "none"]})
    assert deleted.json() == {"deleted": 4}
    assert client.get_session_traces(ids[1]) == client.get_session_traces(ids[2]) == []


def test_a_query_keeps_the_order_of_its_ids_and_limits_each(gateway):
    with GatewayClient(gateway.url) as client:
        ids = [client.create_session(new_id()) for _ in range(2)]
        for n in range(3):
            for sid in ids:
                chat(client.get_session_url(sid), f"Turn {n}")
        client.flush()

    def query(**body):
        return httpx.post(f"{gateway.url}/traces/query", json=body).raise_for_status().json()

    found = query(session_ids=[ids[1], "none", ids[0]], limit=2)
    named = [(trace["session_id"], trace["messages"][0]["content"]) for trace in found]
    assert named == [(sid, f"Turn {n}") for sid in reversed(ids) for n in range(2)]
    assert len(query(session_ids=ids)) == 6
    assert query(session_ids=ids, since=time.time() + 60) == query(session_ids=[]) == []


def test_an_error_is_recorded_with_its_status(client, gateway):
    sid = client.create_session(new_id())
    with pytest.raises(openai.BadRequestError):
        chat(client.get_session_url(sid), max_tokens=-1)
    client.flush()
    [trace] = httpx.get(f"{gateway.url}/sessions/{sid}/traces").json()
    assert (trace["status"], trace["error"], trace["completion_token_ids"]) == (400, "client_error", [])
    assert len(client.get_session_traces(sid)) == 1


def test_sampling_parameters_of_a_session_go_before_those_of_its_calls(gateway):
    sid = new_id()
    body = {"session_id": sid, "sampling_params": {"max_tokens": 3, "seed": 5}}
    httpx.post(f"{gateway.url}/sessions", json=body).raise_for_status()
    answer = chat(f"{gateway.url}/sessions/{sid}/v1", max_tokens=20)
    assert answer.usage.completion_tokens == 3
    with GatewayClient(gateway.url) as client:
        client.flush()
        [trace] = client.get_session_traces(sid)
    assert (trace.raw_request["max_tokens"], trace.raw_request["seed"]) == (3, 5)


def test_the_weight_version_is_the_one_at_arrival(gateway):
    def set_version(value):
        return httpx.post(f"{gateway.url}/admin/weight_version", json={"weight_version": value})

    sid = new_id()
    with GatewayClient(gateway.url) as client:
        for version in (1, "2"):
            assert set_version(version).json() == {"weight_version": int(version)}
            assert httpx.get(f"{gateway.url}/admin/weight_version").json() == {"weight_version": int(version)}
            chat(client.get_session_url(sid))
        client.flush()
    traces = httpx.get(f"{gateway.url}/sessions/{sid}/traces").json()
    assert [trace["weight_version"] for trace in traces] == [1, 2]
    wrong = set_version("x")
    assert (wrong.status_code, wrong.json()) == (400, {"error": "invalid weight_version: 'x'"})


def test_traces_are_read_on_the_admin_listener_only(gateway):
    sid = new_id()
    chat(f"{gateway.public}/sessions/{sid}/v1")
    with GatewayClient(gateway.url) as client:
        client.flush()
        assert len(client.get_session_traces(sid)) == 1
    with GatewayClient(gateway.public) as client, pytest.raises(httpx.HTTPStatusError) as raised:
        client.get_session_traces(sid)
    assert is_404(raised) == {"detail": "Not Found"}


# ---- workers -----------------------------------------------------------------------------------


def test_workers_are_added_serve_and_are_removed(kind, own_gateway):
    client = connect(kind, own_gateway.url)
    [first] = client.list_workers()
    assert (first.url, first.api_path, first.healthy) == (own_gateway.first, "/v1", True)
    # The README's form, which the original turns into .../v1/v1.
    spare = client.add_worker(f"{own_gateway.spare}/v1")
    assert client.add_worker(own_gateway.spare, weight=1) == spare
    worker = harness.until(
        lambda: [one for one in client.list_workers() if one.worker_id == spare and one.healthy],
        "the worker is healthy",
    )[0]
    assert (worker.url, worker.api_url) == (own_gateway.spare, f"{own_gateway.spare}/v1")
    assert (worker.model_name, worker.weight, worker.active_requests) == (MODEL, 1, 0)
    client.remove_worker(first.worker_id)
    assert [one.worker_id for one in client.list_workers()] == [spare]
    assert chat(f"{own_gateway.public}/v1").model == MODEL
    health = httpx.get(f"{own_gateway.url}/health/workers").json()
    assert (health["healthy"], health["total"]) == (1, 1)
    again = client.add_worker(f"{own_gateway.first}/v1", model_name=MODEL, weight=2)
    worker = next(one for one in client.list_workers() if one.worker_id == again)
    assert (worker.url, worker.weight) == (own_gateway.first, 2)
    client.close()


# ---- the README --------------------------------------------------------------------------------


def snippet(heading):
    """The Python below a heading of the package's README."""
    return re.search(rf"^## {heading}.*?^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]


def run(source, gateway, **names):
    source = source.replace("http://localhost:9090", gateway.url)
    source = source.replace("http://vllm-worker-0:8000", gateway.spare)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "README", "exec"), names)
    return names, printed.getvalue().splitlines()


def test_the_quick_start_runs_as_it_is_printed(gateway):
    assert "rllm-model-gateway --port 9090 --worker http://localhost:8000/v1" in README
    training, after = snippet("Training Side").split("# After agent runs")
    names, _ = run(training, gateway)
    assert names["agent_url"] == f"{gateway.url}/sessions/{names['session_id']}/v1"
    agent, _ = run(snippet("Agent Side"), gateway, session_id=names["session_id"])
    assert agent["response"].choices[0].message.content
    names, printed = run("#" + after, gateway, **names)
    [trace] = names["traces"]
    assert printed == [str(trace.prompt_token_ids), str(trace.completion_token_ids), str(trace.logprobs)]
    assert len(trace.logprobs) == len(trace.completion_token_ids) > 0 < len(trace.prompt_token_ids)


def test_the_dynamic_registration_runs_as_it_is_printed(own_gateway):
    # It goes on where the training side has imported the client.
    names, _ = run(snippet("Dynamic Worker Registration"), own_gateway, GatewayClient=GatewayClient)
    workers = names["client"].list_workers()
    assert [worker.url for worker in workers] == [own_gateway.first, own_gateway.spare]
    harness.until(lambda: all(one.healthy for one in names["client"].list_workers()), "both are healthy")
