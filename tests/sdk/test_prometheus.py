"""A real Prometheus reads two balancers that work, and evaluates every expression of dashboard and alerts.

The balancers have the settings of docker/lb.yaml, and Prometheus those of docker/prometheus, but for
addresses and intervals.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
import yaml

import collector as otel
import harness
import monitoring
import routed

TOKEN = "the-operators-token"
SESSION = "/sessions/watched/v1/chat/completions"

# How long Prometheus may take to read the balancers and to have two samples of each series.
PATIENCE = 60.0

# The tests read the balancers each second; ten of these are enough for a rate.
RATE_INTERVAL = "10s"

# Metrics that appear with an event that need not happen here.
ABSENT = {
    "vllm_lb_cache_trimmed_total",
    "vllm_lb_cumulative_turns_total",
    "vllm_lb_discovery_failures_total",
    "vllm_lb_discovery_last_list_time_seconds",
    "vllm_lb_discovery_upstreams",
    "vllm_lb_discovery_last_list_time_seconds",
    "vllm_lb_discovery_upstreams",
    "vllm_lb_exchange_lost_total",
    "vllm_lb_redis_failures_total",
    "vllm_lb_probe_failures_total",
    "vllm_lb_upstream_busy_total",
}
# Queries of panels for one kind of such an event.
EMPTY = {"Breaker and full upstreams, A"}


# ---- what is watched ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Watched:
    """Balancers that act as one, the engines behind them, and the Prometheus that reads them."""

    balancers: list
    admins: list
    engines: list
    prometheus: str

    def query(self, expression):
        """The series of an expression."""
        said = self.ask("query", query=expression)
        assert said["resultType"] == "vector", expression
        return said["result"]

    def ask(self, path, **arguments):
        url = f"{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{url}: {error.read().decode()}") from error

    def wait(self, condition, what):
        """Waits until the condition has no problem any more."""
        end = time.monotonic() + PATIENCE
        while problem := condition():
            assert time.monotonic() < end, f"{what}: {problem}"
            time.sleep(0.2)


@contextlib.contextmanager
def redis():
    [port] = harness.free_ports(1)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        harness.until(lambda: accepts(port) or child.poll() is not None, "redis-server starts")
        assert child.poll() is None, "redis-server ended"
        yield f"redis://127.0.0.1:{port}"
    finally:
        harness.stop(child)


def accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def balancer(folder, engines, store, spans):
    """A balancer as compose starts it, which exports spans. Two requests fill an engine: others wait."""
    listen, admin = harness.free_ports(2)
    config = yaml.safe_load((monitoring.ROOT / "docker/lb.yaml").read_text())
    config["upstreams"] = [{"url": url, "max_active": 2} for url in engines]
    config["routes"] = [{"model": "fast", "to": "sim"}]
    config["otlp"] = {"endpoint": spans}
    file = folder / f"{listen}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = ["env", f"VLLM_LB_ADMIN_TOKEN={TOKEN}", harness.binary(), "--config", file, "--redis", store]
    command += ["--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}"]
    with harness.process(command, f"http://127.0.0.1:{listen}/health"):
        yield f"http://127.0.0.1:{listen}", f"127.0.0.1:{admin}"


@contextlib.contextmanager
def prometheus(folder, targets):
    """A Prometheus with the settings of docker/prometheus over these targets."""
    [port] = harness.free_ports(1)
    config = yaml.safe_load(monitoring.PROMETHEUS.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(monitoring.RULES.parent / file) for file in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = targets
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with harness.process(command, f"http://127.0.0.1:{port}/-/ready"):
        yield f"http://127.0.0.1:{port}"


def post(url, body=None, **headers):
    """The status of a POST, and the answer as far as it comes."""
    data = json.dumps(body).encode() if body is not None else b""
    headers = {"content-type": "application/json", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def traffic(balancers, engines):
    """Requests of all kinds: that stream, wait, fail, are refused, recorded and stored."""
    def chat(at, **more):
        text = f"Tell me about number {at % 3}. " * 40
        return {"model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": 20, **more}

    def converse(url):
        question = {"model": "sim", "input": "Hello", "max_output_tokens": 8}
        _, first = post(url, question)
        post(url, {**question, "previous_response_id": json.loads(first).get("id")})

    # The first is answered by the other engine; of the second the client has seen a part.
    post(f"{engines[0]}/sim/fault", {"kind": "status", "status": 502, "requests": 1})
    post(f"{engines[1]}/sim/fault", {"kind": "cut_stream", "events": 4, "requests": 1})
    calls = [(post, balancers[at % 2] + SESSION, chat(at, stream=True)) for at in range(12)]
    for one in balancers:
        calls += [
            (post, f"{one}/v1/chat/completions", chat(0)),
            (post, f"{one}/v1/chat/completions", {**chat(0), "model": "fast"}),
            (post, f"{one}/v1/chat/completions", {**chat(0), "model": "unheard-of"}),
            (converse, f"{one}/v1/responses"),
        ]
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(*call) for call in calls]:
            done.result()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prometheus")
    with contextlib.ExitStack() as running:
        store = running.enter_context(redis())
        engines = running.enter_context(routed.engines(2))
        spans = running.enter_context(otel.collector()).url
        started = [running.enter_context(balancer(folder, engines, store, spans)) for _ in range(2)]
        balancers, admins = ([one[at] for one in started] for at in (0, 1))
        url = running.enter_context(prometheus(folder, admins))
        stop = threading.Event()

        def work():
            while not stop.is_set():
                traffic(balancers, engines)
                stop.wait(0.5)

        pool = running.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        done = pool.submit(work)
        try:
            yield Watched(balancers, admins, engines, url)
        finally:
            stop.set()
            done.result()


# ---- tests -------------------------------------------------------------------------------------


def test_prometheus_reads_both_balancers_without_a_token(watched):
    def problem():
        found = {series["metric"]["instance"]: series["value"][1] for series in watched.query("up")}
        return found != {admin: "1" for admin in watched.admins} and watched.ask("targets")["activeTargets"]

    watched.wait(problem, "the balancers are not up")


def test_other_calls_need_the_token(watched):
    for token, expected in ((None, 401), ("a-guess", 401), (TOKEN, 200)):
        headers = {"authorization": f"Bearer {token}"} if token else {}
        for admin in watched.admins:
            assert post(f"http://{admin}/admin/reload", **headers)[0] == expected


def has_data(watched, expression):
    """Waits until an expression has data, unless its metrics do not appear here."""
    text = expression.filled(__rate_interval=RATE_INTERVAL)
    watched.query(text)
    names = {selector.name for selector, _ in monitoring.selectors(expression.parsed())}
    if not names & ABSENT and expression.place not in EMPTY:
        watched.wait(lambda: not watched.query(text) and text, "an expression has no data")


@pytest.mark.parametrize(
    "expression", list(monitoring.panel_expressions(monitoring.dashboard())), ids=lambda each: each.place
)
def test_a_panel_has_data(watched, expression):
    has_data(watched, expression)


@pytest.mark.parametrize(
    "expression", list(monitoring.annotation_expressions(monitoring.dashboard())), ids=lambda each: each.place
)
def test_an_annotation_can_be_evaluated(watched, expression):
    watched.query(expression.filled())


@pytest.mark.parametrize(
    ("selector", "label"), list(monitoring.variables(monitoring.dashboard())), ids=lambda each: str(each)[:30]
)
def test_a_variable_has_values(watched, selector, label):
    def problem():
        series = watched.ask("series", **{"match[]": selector.filled()})
        return not [one for one in series if label in one] and selector.text

    watched.wait(problem, f"no values of {label}")


def test_every_rule_can_be_evaluated(watched):
    def rules():
        return [rule for group in watched.ask("rules")["groups"] for rule in group["rules"]]

    watched.wait(lambda: [rule["name"] for rule in rules() if rule["health"] == "unknown"], "not evaluated")
    assert [(rule["name"], rule["lastError"]) for rule in rules() if rule["health"] != "ok"] == []
    assert {rule["name"] for rule in rules()} == {each.place for each in monitoring.rule_expressions()}
