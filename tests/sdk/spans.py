"""Runs a balancer that exports spans over one engine, for the tests of spans."""

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import tempfile
import time
import urllib.error
import urllib.request

import pytest

import harness

CHAT = "/v1/chat/completions"
STATE = "vendor=t61rcWkgMzE,other=00f067aa0ba902b7"


def trace_id(number):
    return f"{number:032x}"


def parent(trace, flags="01"):
    return f"00-{trace}-00f067aa0ba902b7-{flags}"


@dataclasses.dataclass
class Running:
    """A balancer over one engine, and its collector."""

    url: str
    admin: str
    engine: str
    child: object
    file: pathlib.Path
    settings: dict

    def send(self, path=CHAT, body=None, **headers):
        """Status and body of a request."""
        sent = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        body = body if body is not None else chat()
        return fetch(urllib.request.Request(self.url + path, json.dumps(body).encode(), sent))

    def metric(self, name):
        page = fetch(urllib.request.Request(self.admin + "/metrics"))[1]
        values = re.findall(rf"^{re.escape(name)} (\d+)$", page, re.MULTILINE)
        return int(values[0]) if values else 0

    def spans(self, result):
        return self.metric(f'vllm_lb_spans_total{{result="{result}"}}')

    def told(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        return json.loads(fetch(urllib.request.Request(self.engine + path, data))[1])

    def fields(self, trace):
        """What the engine got as trace of the request with this prompt: its traceparent and tracestate."""
        found = [one for one in self.told("/sim/requests") if trace in one["body"]]
        assert len(found) == 1
        values = {}
        for name, value in found[0]["headers"]:
            values.setdefault(name, []).append(value)
        return values.get("traceparent", []), values.get("tracestate", [])

    def reload(self, **changed):
        self.settings.update(changed)
        self.file.write_text(json.dumps(self.settings))
        answer = fetch(urllib.request.Request(self.admin + "/admin/reload", b""))
        return json.loads(answer[1])


def fetch(request):
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def chat(text="hello", **more):
    return {"model": "sim", "max_tokens": 8, "messages": [{"role": "user", "content": text}], **more}


@contextlib.contextmanager
def over(engine, otlp, upstreams=None, environment=None, **settings):
    """A balancer with these settings and variables, which exports as `otlp` says."""
    listen, admin = harness.free_ports(2)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "lb.yaml")
        file_settings = {
            "listen": f"127.0.0.1:{listen}",
            "admin": {"address": f"127.0.0.1:{admin}"},
            "upstreams": upstreams or [{"url": engine, "name": "gpu-0"}],
            "otlp": otlp,
            "upgrade_socket": str(pathlib.Path(folder, "upgrade.sock")),
            **settings,
        }
        file.write_text(json.dumps(file_settings))
        command = [harness.binary(), "--config", str(file), "--log-format", "json"]
        url = f"http://127.0.0.1:{listen}"
        with harness.process(command, url + "/health", environment=environment) as child:
            yield Running(url, f"http://127.0.0.1:{admin}", engine, child, file, file_settings)


def nested(server, phases):
    """Holds that phases lie within their request, one after the other."""
    order = [name for name in ("queue", "connect", "prefill", "stream") if name in phases]
    assert set(order) == set(phases)
    before = server.start
    for phase in (phases[name] for name in order):
        assert phase.parent == server.id and phase.trace == server.trace
        assert before <= phase.start <= phase.end <= server.end
        before = phase.end
    assert len({server.id, *(phase.id for phase in phases.values())}) == len(phases) + 1
    return order


def burst(running, count, first, threads=8):
    """Sends so many requests, each in a trace; the longest time that one took."""

    def one(number):
        start = time.monotonic()
        body = chat(max_tokens=1)
        assert running.send(body=body, traceparent=parent(trace_id(first + number)))[0] == 200
        return time.monotonic() - start

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return max(pool.map(one, range(count)))


def complete(spans, first, count):
    """Whether the spans are those of the requests, once each."""
    traces = [span.trace for span in spans if span.is_server]
    assert len(traces) == len(set(traces))
    return set(traces) == {trace_id(first + number) for number in range(count)}


def ended(running, within):
    """Ends the balancer; the seconds that this took."""
    start = time.monotonic()
    running.child.send_signal(signal.SIGTERM)
    running.child.wait(timeout=within)
    return time.monotonic() - start


@contextlib.contextmanager
def ends(balancer):
    """A balancer that the test ends itself."""
    with pytest.raises(RuntimeError, match="in the middle of the tests") as raised, balancer as running:
        yield running, raised
