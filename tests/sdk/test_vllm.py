"""What no SDK asks: plain requests to one engine and through the balancer, and the admin listener."""

import concurrent.futures
import http.client
import json
import re
import urllib.parse
import urllib.request

import openai
import pytest

import harness
from conftest import MODEL, Same, normal

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]}
JSON = {"content-type": "application/json"}


def ask(target, method, path, body=None, headers=None):
    """Status, media type, `allow`, the redirect's path, and the body: as data when it is JSON."""
    place = urllib.parse.urlsplit(target.url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    try:
        if isinstance(body, (dict, list)):
            body, headers = json.dumps(body), headers or JSON
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        kind, said = answer.getheader("content-type"), answer.read().decode()
    finally:
        connection.close()
    said = normal(json.loads(said)) if kind == "application/json" and said else said
    location = (answer.getheader("location") or "").removeprefix(target.url)
    return answer.status, kind, answer.getheader("allow"), location, said


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/health", 200),
        ("HEAD", "/health", 405),
        ("GET", "/ping", 200),
        ("POST", "/ping", 200),
        ("GET", "/version", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/v1/models/", 307),
        ("GET", "/v1/models/sim", 404),
        ("GET", "/", 404),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/chat/completions/?a=b", 307),
        ("POST", "/sleep", 404),
        ("POST", "/collective_rpc", 404),
        ("GET", "/v1/responses/resp_unknown", 404),
        ("POST", "/v1/responses/resp_unknown/cancel", 404),
    ],
)
def test_without_a_body(same, method, path, status):
    assert same(lambda c: ask(c.target, method, path))[0] == status


@pytest.mark.parametrize(
    "path, body",
    [
        ("/tokenize", {"model": MODEL, "prompt": "Hello there"}),
        ("/tokenize", {"messages": ASK["messages"]}),
        ("/detokenize", {"model": MODEL, "tokens": [301, 302, 303]}),
        ("/v1/score", {"model": MODEL, "text_1": "a", "text_2": ["b", "c"]}),
        ("/rerank", {"model": MODEL, "query": "a", "documents": ["b", "c"]}),
        ("/pooling", {"model": MODEL, "input": "a"}),
        ("/classify", {"model": MODEL, "input": "a"}),
        ("/v1/chat/completions", {"messages": ASK["messages"]}),
        ("/v1/chat/completions", {**ASK, "model": None}),
        ("/v1/chat/completions", {**ASK, "model": ""}),
        ("/v1/chat/completions?a=b", {**ASK, "max_completion_tokens": 3}),
    ],
    ids=str,
)
def test_with_a_body(same, path, body):
    assert same(lambda c: ask(c.target, "POST", path, body))[0] == 200


@pytest.mark.parametrize(
    "body, headers",
    [
        ("{", JSON),
        ("", JSON),
        ("[]", JSON),
        ('"text"', JSON),
        ("{\"model\": 5}", JSON),
        ("{\"model\": \"sim\"}", JSON),
        (json.dumps(ASK), {"content-type": "text/plain"}),
        (json.dumps(ASK), {}),
    ],
    ids=str,
)
def test_bodies_that_are_wrong(same, body, headers):
    assert same(lambda c: ask(c.target, "POST", "/v1/chat/completions", body, headers))[0] == 400


def test_an_answer_is_the_same_bytes(same):
    """Given the ids, no byte of an answer differs but the time and what was cached."""
    body = json.dumps({**ASK, "stream": True, "max_tokens": 5})

    def call(c):
        headers = {**JSON, "x-request-id": "the-same"}
        said = ask(c.target, "POST", "/v1/chat/completions", body, headers)[-1]
        return re.sub(r'"created":\d+', "", said)

    assert "chatcmpl-the-same" in same(call)


# ---- the admin listener ------------------------------------------------------------------------


def admin(stack, path):
    with urllib.request.urlopen(stack.admin + path, timeout=10) as answer:
        return answer.read().decode()


def samples(text, name):
    """Values of a metric, by the text of their labels."""
    found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found}


def requests_total(stack):
    """The counts of requests once none is in flight: one is counted after its client has the answer."""
    def page():
        text = admin(stack, "/metrics")
        return text if samples(text, "vllm_lb_in_flight") == {"": 0.0} else None

    return samples(harness.until(page, "no request is in flight"), "vllm_lb_requests_total")


def test_requests_are_counted_once_and_on_both_upstreams(stack):
    before = requests_total(stack)
    clients = Same(stack).clients[1]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(clients.openai.chat.completions.create, **ASK) for _ in range(64)]
        assert all(call.result().choices for call in calls)
    with pytest.raises(openai.NotFoundError):
        clients.openai.chat.completions.create(**{**ASK, "model": "nobody"})
    after = requests_total(stack)
    more = {labels: after[labels] - before.get(labels, 0) for labels in after}
    ours = f'model="{MODEL}"'
    good = [count for labels, count in more.items() if ours in labels and 'status="200"' in labels]
    assert sum(good) == 64 and sum(count > 0 for count in good) == 2
    refused = [count for labels, count in more.items() if 'status="404"' in labels]
    assert sum(refused) == 1
    assert not any("nobody" in labels for labels in after), "labels are bounded"


def test_nothing_is_left_in_flight(stack):
    def left():
        text = admin(stack, "/metrics")
        names = [f"vllm_lb_upstream_{name}" for name in ("active", "backlog_tokens", "context_tokens")]
        return {name: samples(text, name) for name in names if set(samples(text, name).values()) != {0.0}}

    # A request is over after its client has the answer.
    harness.until(lambda: not left(), "nothing is left", left)


def test_every_metric_is_documented(stack):
    table = (harness.ROOT / "docs/metrics.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    served = set(re.findall(r"^# TYPE (\w+) ", admin(stack, "/metrics"), re.MULTILINE))
    assert served and served <= documented


def test_the_engines_metrics_are_told_apart(stack):
    with urllib.request.urlopen(stack.balanced.url + "/metrics", timeout=10) as answer:
        running = samples(answer.read().decode(), "vllm:num_requests_running")
    assert len({re.search(r'upstream="([^"]*)"', labels)[1] for labels in running}) == 2


def test_admin_paths(stack):
    assert json.loads(admin(stack, "/live")) == {"status": "ok"}
    assert json.loads(admin(stack, "/health"))["status"] == "ok"
    assert json.loads(admin(stack, "/ready"))["upstreams"] == 2
    assert "127.0.0.1" in admin(stack, "/admin/upstreams")
    assert "127.0.0.1" in admin(stack, "/admin/config")
