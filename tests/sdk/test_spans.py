"""Spans of requests, as a collector of OpenTelemetry gets them from the binary."""

import concurrent.futures
import contextlib
import json
import time
import urllib.request

import pytest

import collector as otel
import harness
from spans import CHAT, STATE, chat, ended, ends, fetch, nested, over, parent, trace_id

# How far clocks may differ, in nanoseconds.
MARGIN = 100_000_000


@pytest.fixture(scope="module")
def sink():
    with otel.collector() as running:
        yield running


@pytest.fixture(scope="module")
def running(engine, sink):
    otlp = {"endpoint": sink.url, "header": {"x-api-key": "hunter2"}, "service_name": "front"}
    with over(engine, otlp) as balancer:
        yield balancer


# ---- one request -------------------------------------------------------------------------------


def test_the_engine_gets_the_span_of_the_request_as_parent(running, sink):
    trace, before = trace_id(1), time.time_ns()
    body = chat(f"trace {trace}", stream=True, stream_options={"include_usage": True})
    fields = {"traceparent": parent(trace), "tracestate": STATE, "x_session_id": "conversation-1"}
    status, said = running.send(body=body, x_request_id="id-of-client", **fields)
    assert status == 200 and "[DONE]" in said
    server, phases = sink.request(trace)
    after = time.time_ns()
    assert server.parent == "00f067aa0ba902b7"
    assert running.fields(trace) == ([f"00-{trace}-{server.id}-01"], [STATE])
    assert nested(server, phases) == ["connect", "prefill", "stream"]
    # A request ends after its client has the answer, and before it is exported.
    assert before - MARGIN <= server.start and server.end <= after + MARGIN
    assert phases["stream"].end == server.end
    # The engine takes a while for both.
    assert phases["prefill"].end > phases["prefill"].start and phases["stream"].end > phases["stream"].start
    assert not any(span.failed for span in [server, *phases.values()])
    usage = json.loads(said.split("data: ")[-2])["usage"]
    expected = {
        "http.request.method": "POST",
        "http.route": CHAT,
        "url.path": CHAT,
        "http.response.status_code": 200,
        "http.request.body.size": len(json.dumps(body)),
        "client.address": "127.0.0.1",
        "vllm_lb.request_id": "id-of-client",
        "vllm_lb.model": "sim",
        "vllm_lb.upstream": "gpu-0",
        "vllm_lb.attempts": 1,
        "vllm_lb.outcome": "ok",
        "vllm_lb.session": "conversation-1",
        "vllm_lb.tokens.input": usage["prompt_tokens"],
        "vllm_lb.tokens.output": usage["completion_tokens"],
    }
    assert server.attributes.items() >= expected.items()
    assert server.name == f"POST {CHAT}"
    assert server.resource["service.name"] == "front"
    assert server.resource["service.version"] and server.resource["service.instance.id"]
    _, path, headers, _ = sink.exports[-1]
    assert path == "/v1/traces"
    assert (headers["content-type"], headers["x-api-key"]) == ("application/x-protobuf", "hunter2")


def begun(running, sink, number, **fields):
    """The spans of a request whose trace begins at the balancer."""
    prompt = f"trace {trace_id(number)}"
    assert running.send(body=chat(prompt), **fields)[0] == 200
    (sent,), state = running.fields(trace_id(number))
    version, trace, span, flags = sent.split("-")
    assert (version, flags, state) == ("00", "01", [])
    server, phases = sink.request(trace)
    assert (server.id, server.parent) == (span, "")
    nested(server, phases)
    return trace


def test_a_trace_begins_where_the_client_has_none(running, sink):
    assert begun(running, sink, 2) != begun(running, sink, 3)


@pytest.mark.parametrize(
    "wrong",
    ["", "00", parent("0" * 32), parent("A" * 32), "ff" + parent("1" * 32)[2:], parent("1" * 32) + "-x"],
)
def test_a_malformed_trace_begins_anew(running, sink, wrong):
    number = 100 + len(wrong) * 7 + sum(wrong.encode())
    trace = begun(running, sink, number, traceparent=wrong, tracestate=STATE)
    assert trace not in wrong


def test_a_later_version_is_read_as_version_0(running, sink):
    trace = trace_id(4)
    running.send(body=chat(f"trace {trace}"), traceparent="cc" + parent(trace)[2:] + "-what-will-come")
    server, _ = sink.request(trace)
    assert running.fields(trace) == ([f"00-{trace}-{server.id}-01"], [])


def test_a_trace_that_is_not_sampled_passes_unchanged(running, sink):
    unsampled, sampled = trace_id(5), trace_id(6)
    field = parent(unsampled, "00")
    running.send(body=chat(f"trace {unsampled}"), traceparent=field, tracestate=STATE)
    assert running.fields(unsampled) == ([field], [STATE])
    running.send(body=chat(), traceparent=parent(sampled))
    sink.request(sampled)
    assert sink.spans(unsampled) == []


def test_own_answers_have_no_span_unless_the_client_asks(running, sink):
    def get(base, path, **headers):
        return fetch(urllib.request.Request(base + path, headers=headers))[0]

    before = {span.id for span in sink.spans()}
    for path in ("/health", "/v1/models"):
        assert get(running.url, path) == 200
    assert get(running.admin, "/admin/config") == 200
    assert get(running.admin, "/metrics", traceparent=parent(trace_id(7))) == 200
    assert get(running.url, "/v1/models", traceparent=parent(trace_id(8))) == 200
    server, phases = sink.request(trace_id(8))
    assert (server.name, phases) == ("GET /v1/models", {})
    assert {span.id for span in sink.spans()} - before == {server.id}


def test_keys_are_not_shown(running):
    page = fetch(urllib.request.Request(running.admin + "/admin/config"))[1]
    assert "x-api-key" in page and "hunter2" not in page


# ---- sampling and names ------------------------------------------------------------------------


def test_nothing_is_sampled_with_a_share_of_0(engine):
    with otel.collector() as sink, over(engine, {"endpoint": sink.url, "sample": 0}) as running:
        for number in range(20, 30):
            running.send(body=chat(f"trace {trace_id(number)}"))
            (sent,), _ = running.fields(trace_id(number))
            assert sent.endswith("-00")
        # The client's own decision counts.
        running.send(body=chat(), traceparent=parent(trace_id(9)))
        sink.request(trace_id(9))
        assert {span.trace for span in sink.spans()} == {trace_id(9)}


def test_names_of_the_conventions_for_generative_ai(engine):
    with otel.collector() as sink, over(engine, {"endpoint": sink.url, "gen_ai": True}) as running:
        running.send(body=chat(), traceparent=parent(trace_id(10)))
        attributes = sink.request(trace_id(10))[0].attributes
        assert attributes["gen_ai.request.model"] == "sim"
        assert attributes["gen_ai.operation.name"] == "chat"
        assert attributes["gen_ai.usage.input_tokens"] > 0 and attributes["gen_ai.usage.output_tokens"] == 8
        assert not [name for name in attributes if name.startswith("vllm_lb.tokens")]


def test_nothing_is_changed_or_sent_without_an_endpoint(engine):
    with over(engine, {"sample": 1}) as running:
        fields = [parent(trace_id(40)), "malformed", parent(trace_id(42), "00")]
        for number, field in enumerate(fields, 40):
            running.send(body=chat(f"trace {trace_id(number)}"), traceparent=field, tracestate=STATE)
            assert running.fields(trace_id(number)) == ([field], [STATE])
        running.send(body=chat(f"trace {trace_id(43)}"))
        assert running.fields(trace_id(43)) == ([], [])


def test_a_reload_turns_the_export_on_and_off(engine):
    with otel.collector() as sink, ends(over(engine, {})) as (running, _):
        assert running.reload(otlp={"endpoint": sink.url})["changed"] == ["otlp"]
        running.send(body=chat(), traceparent=parent(trace_id(11)))
        sink.request(trace_id(11))
        assert running.reload(otlp={})["changed"] == ["otlp"]
        running.send(body=chat(f"trace {trace_id(12)}"), traceparent=parent(trace_id(12)))
        assert running.fields(trace_id(12)) == ([parent(trace_id(12))], [])
        # A balancer exports what it has before it ends.
        ended(running, 60)
        assert sink.spans(trace_id(12)) == []


# ---- failures ----------------------------------------------------------------------------------


def test_failed_requests_have_an_error(running, sink):
    def spans(number, status, body=None, fault=None):
        if fault:
            running.told("/sim/fault", fault)
        trace = trace_id(number)
        assert running.send(body=body, traceparent=parent(trace))[0] == status
        running.told("/sim/fault", {"kind": "none"})
        return sink.request(trace)

    server, phases = spans(50, 500, fault={"kind": "status", "status": 500, "requests": 1})
    assert server.failed and server.attributes["error.type"] == "server_error"
    assert server.attributes["http.response.status_code"] == 500
    server, phases = spans(51, 404, body=chat() | {"model": "unknown"})
    assert not server.failed and server.attributes["http.response.status_code"] == 404
    assert server.attributes["vllm_lb.outcome"] == "client_error"
    cut = {"kind": "cut_stream", "events": 3, "reset": True, "requests": 1}
    server, phases = spans(52, 200, body=chat(stream=True), fault=cut)
    assert server.failed and server.attributes["vllm_lb.outcome"] == "broken"
    assert phases["stream"].failed and not phases["prefill"].failed


def test_an_unreachable_upstream_fails_in_connect(sink):
    (port,) = harness.free_ports(1)
    url = f"http://127.0.0.1:{port}"
    settings = {"health": {"interval": "1m"}}
    with contextlib.ExitStack() as open_engine:
        command = [harness.binary(), "engine", "--port", str(port)]
        child = open_engine.enter_context(own_process(command, url + "/health"))
        with over(url, {"endpoint": sink.url}, **settings) as running:
            harness.stop(child)
            status, _ = running.send(traceparent=parent(trace_id(53)))
            server, phases = sink.request(trace_id(53))
    assert status == 502 and server.attributes["http.response.status_code"] == 502
    assert server.failed and server.attributes["vllm_lb.outcome"] == "upstream"
    assert set(phases) == {"connect"} and phases["connect"].failed


@contextlib.contextmanager
def own_process(command, ready_url):
    """A process that the test ends."""
    with pytest.raises(RuntimeError, match="in the middle"), harness.process(command, ready_url) as child:
        yield child


def test_a_retry_shows_the_attempts_and_the_last_one(running, sink):
    running.told("/sim/fault", {"kind": "cut_headers", "reset": True, "requests": 1})
    second = {"url": running.engine.replace("127.0.0.1", "localhost"), "name": "gpu-1"}
    with over(running.engine, {"endpoint": sink.url}, [running.settings["upstreams"][0], second]) as two:
        running.told("/sim/fault", {"kind": "cut_headers", "reset": True, "requests": 1})
        assert two.send(traceparent=parent(trace_id(54)))[0] == 200
        server, phases = sink.request(trace_id(54))
        assert server.attributes["vllm_lb.attempts"] == 2 and not server.failed
        nested(server, phases)


def test_a_request_that_waits_has_a_span_of_the_queue(engine, sink):
    upstreams = [{"url": engine, "name": "gpu-0", "max_active": 1}]
    with over(engine, {"endpoint": sink.url}, upstreams) as running:
        traces = [trace_id(60 + number) for number in range(4)]
        body = chat()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            # The first one is not over before the others have come.
            running.told("/sim/fault", {"kind": "slow", "factor": 50})
            sent = pool.map(lambda trace: running.send(body=body, traceparent=parent(trace))[0], traces)
            harness.until(lambda: running.metric("vllm_lb_queued") == 3, "three wait")
            running.told("/sim/fault", {"kind": "none"})
            assert list(sent) == [200] * 4
        found = [sink.request(trace) for trace in traces]
        for server, phases in found:
            nested(server, phases)
        waits = [phases["queue"] for _, phases in found if "queue" in phases]
        assert len(waits) == 3 and all(wait.end > wait.start for wait in waits)
