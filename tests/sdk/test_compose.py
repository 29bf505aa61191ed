"""docker/compose.yaml as processes of this machine: nginx with keys and limits, two balancers, Redis, three
simulated engines and Prometheus do together what the compose file promises.

No Docker is needed. compose.py says what differs from containers; test_packages.py checks the files.
"""

import concurrent.futures
import contextlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import anthropic
import openai
import pytest

import compose
import harness

KEY = "sk-demo"
# The key of a client without limits.
BATCH_KEY = "sk-demo-batch"
TOKEN = "the-operators-token"
PASSWORD = "of-this-test"

# As docker/nginx.conf has them.
RATE, BURST, IN_FLIGHT = 10, 50, 256

BALANCERS = ("balancer-1", "balancer-2")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compose")
    variables = {"VLLM_LB_ADMIN_TOKEN": TOKEN, "REDIS_PASSWORD": PASSWORD}
    with compose.fleet([compose.COMPOSE], folder, **variables) as running:
        for name, service in running.services.items():
            if "healthcheck" in service.settings:
                running.wait(lambda name=name: running.is_healthy(name), f"{name} is healthy", name)
        yield running


@pytest.fixture
def url(fleet):
    return fleet.url("nginx")


def ask(url, key=None, body=None, timeout=60, **headers):
    """The status, the headers and the body of an answer."""
    headers = {"content-type": "application/json", **headers}
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode() if body is not None else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def chat(tokens=8, **more):
    messages = [{"role": "user", "content": "Say something."}]
    return {"model": "sim", "messages": messages, "max_tokens": tokens, "ignore_eos": True, **more}


def client(url, key=BATCH_KEY):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


# ---- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/metrics", "/sleep", "/"])
@pytest.mark.parametrize(
    "header",
    [
        {},
        {"authorization": "Bearer sk-unknown"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": f"Bearer {KEY} more"},
        {"x-api-key": "demo"},
    ],
)
def test_a_call_without_a_known_key_is_401(url, path, header):
    status, headers, body = ask(url + path, **header)
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert headers["content-type"] == "application/json" and headers["x-request-id"]
    error = json.loads(body)["error"]
    assert (error["type"], error["code"], error["param"]) == ("AuthenticationError", 401, None)


def test_the_sdks_raise_their_errors_for_a_wrong_key(url):
    with pytest.raises(openai.AuthenticationError) as raised:
        client(url, "sk-unknown").models.list()
    assert raised.value.body["message"] == "The API key is missing or unknown."
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=url, api_key="sk-unknown", max_retries=0).messages.create(
            model="sim", max_tokens=8, messages=[{"role": "user", "content": "Hello"}]
        )


def test_only_callers_on_the_machine_of_nginx_get_metrics(url):
    """A key alone is not enough, in any spelling that the balancers answer with the engines' metrics."""
    paths = ["/metrics", "/metrics?a=b", "/metrics/", "//metrics", "/%6detrics", "/metrics_of_any_name"]

    def status_and_body(path, source, key):
        with contextlib.closing(http.client.HTTPConnection(
            urllib.parse.urlsplit(url).netloc, timeout=60, source_address=(source, 0)
        )) as connection:
            connection.request("GET", path, headers={"authorization": f"Bearer {key}"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    for path in paths:
        status, body = status_and_body(path, "127.0.0.2", BATCH_KEY)
        assert status == 403 and json.loads(body)["error"]["code"] == 403, path
        assert status_and_body(path, "127.0.0.2", "sk-unknown")[0] == 401, path
        assert status_and_body(path, "127.0.0.1", "sk-unknown")[0] == 401, path
    status, body = status_and_body("/metrics", "127.0.0.1", BATCH_KEY)
    assert status == 200 and b"vllm:num_requests_running{" in body
    assert status_and_body("/v1/models", "127.0.0.2", BATCH_KEY)[0] == 200


def test_health_needs_no_key(url):
    assert ask(f"{url}/health")[0] == 200


@pytest.mark.parametrize("key", [KEY, BATCH_KEY])
def test_the_openai_sdk_gets_answers(url, key):
    sdk = client(url, key)
    assert [model.id for model in sdk.models.list()] == ["sim"]
    answer = sdk.chat.completions.create(model="sim", max_tokens=12, messages=chat()["messages"])
    assert answer.choices[0].message.content and answer.usage.completion_tokens > 0


def test_streams_come_event_by_event(url):
    """Each event is seen long before the last one is made: nothing between holds the stream back."""
    sdk, seen, begun = client(url), [], time.monotonic()
    stream = sdk.chat.completions.create(
        model="sim", messages=chat()["messages"], max_tokens=2000, stream=True,
        extra_body={"ignore_eos": True},
    )
    text = ""
    for chunk in stream:
        seen.append(time.monotonic() - begun)
        text += chunk.choices[0].delta.content or ""
    assert len(seen) > 500 and text
    assert seen[0] < 0.5 * seen[-1], (seen[0], seen[-1])


def test_the_anthropic_sdk_gets_answers(url):
    sdk = anthropic.Anthropic(base_url=url, api_key=BATCH_KEY, max_retries=0, timeout=60)
    question = [{"role": "user", "content": "Hello"}]
    assert sdk.messages.create(model="sim", max_tokens=8, messages=question).content[0].text
    with sdk.messages.stream(model="sim", max_tokens=8, messages=question) as stream:
        assert "".join(stream.text_stream)


def test_the_log_has_the_name_of_the_client_and_no_key(fleet, url):
    ask(f"{url}/v1/models", KEY, **{"x-request-id": "seen-in-the-log"})
    log = fleet.folder / "access.log"
    fleet.wait(lambda: "seen-in-the-log" in log.read_text(), "the request is in the log")
    [line] = [line for line in log.read_text().splitlines() if "seen-in-the-log" in line]
    assert 'client "demo"' in line
    assert "sk-" not in log.read_text()


# ---- limits ------------------------------------------------------------------------------------


def answers_at_once(url, key, count):
    """The answers to so many requests, as fast as they go out."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda _: ask(url, key), range(count)))


def until_calm():
    """Waits until nginx has forgotten the requests of a burst."""
    time.sleep(BURST / RATE + 1)


def test_a_client_beyond_its_rate_gets_429_and_others_go_on(url):
    until_calm()
    begun = time.monotonic()
    answers = answers_at_once(f"{url}/v1/models", KEY, 4 * BURST)
    allowed = BURST + 1 + RATE * (time.monotonic() - begun)
    served = [status for status, _, _ in answers].count(200)
    refused = [(headers, json.loads(body)) for status, headers, body in answers if status == 429]
    assert BURST <= served <= allowed + 1 and served + len(refused) == len(answers)
    for headers, body in refused:
        assert headers["retry-after"] == "1" and headers["x-request-id"]
        assert (body["error"]["type"], body["error"]["code"]) == ("RateLimitError", 429)
    assert refused
    # Others are not beyond theirs, and this client is served again after the time of Retry-After.
    assert {status for status, _, _ in answers_at_once(f"{url}/v1/models", BATCH_KEY, 4 * BURST)} == {200}
    patient = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=5, timeout=60)
    assert patient.models.list().data


def test_the_openai_sdk_raises_its_error_beyond_the_limit(url):
    sdk, outcomes = client(url, KEY), set()

    def call(_):
        try:
            return sdk.models.list().data[0].id
        except openai.RateLimitError as error:
            return error.body["message"]

    # Requests are served at the rate of the client at all times, and beyond it refused.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        def both():
            outcomes.update(pool.map(call, range(BURST)))
            return len(outcomes) > 1

        harness.until(both, "some are served and some refused")
    assert outcomes == {"sim", "Too many requests with this API key. Please try again later."}


def test_the_limits_are_those_of_the_file():
    text = (compose.DOCKER / "nginx.conf").read_text()
    assert f"rate={RATE}r/s;" in text and f"burst={BURST} nodelay;" in text
    assert f"limit_conn in_flight {IN_FLIGHT};" in text


# ---- the balancers -----------------------------------------------------------------------------


def admin(fleet, name, path, token=TOKEN):
    status, _, body = ask(fleet.url(name, 9090) + path, token)
    return json.loads(body) if status == 200 else status


def test_the_admin_api_needs_the_token(fleet):
    for name in BALANCERS:
        assert admin(fleet, name, "/admin/siblings", token=None) == 401
        assert admin(fleet, name, "/ready", token=None)["upstreams"] == 3


def test_the_balancers_see_each_other_and_the_engines(fleet):
    def see():
        return all(
            [row["shares_upstreams"] for row in admin(fleet, name, "/admin/siblings")["siblings"]] == [True]
            for name in BALANCERS
        )

    fleet.wait(see, "the balancers see each other")
    for name in BALANCERS:
        upstreams = admin(fleet, name, "/admin/upstreams")
        assert [row["state"] for row in upstreams] == ["ready"] * 3


def test_both_balancers_and_all_engines_serve(fleet, url):
    answers = statuses_of_chats(url, 60)
    assert set(answers) == {200}
    for name in BALANCERS:
        page = ask(fleet.url(name, 9090) + "/metrics")[2].decode()
        counted = [line for line in page.splitlines() if line.startswith("vllm_lb_requests_total{")]
        assert sum(float(line.rsplit(" ", 1)[1]) for line in counted) > 0, name
    for name in ("engine-1", "engine-2", "engine-3"):
        page = ask(fleet.url(name) + "/metrics")[2].decode()
        answered = [line for line in page.splitlines() if line.startswith("vllm:request_success_total{")]
        assert sum(float(line.rsplit(" ", 1)[1]) for line in answered) > 0, name


def statuses_of_chats(url, count):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, f"{url}/v1/chat/completions", BATCH_KEY, chat()) for _ in range(count)]
        return [one.result()[0] for one in asked]


def test_prometheus_reads_both_balancers(fleet):
    def up():
        query = urllib.parse.urlencode({"query": "up"})
        body = json.loads(ask(f"{fleet.url('prometheus', 9090)}/api/v1/query?{query}")[2])
        return sorted(
            (row["metric"]["instance"], row["value"][1]) for row in body["data"]["result"]
        )

    wanted = sorted((fleet.url(name, 9090).removeprefix("http://"), "1") for name in BALANCERS)
    fleet.wait(lambda: up() == wanted, "Prometheus reads both balancers", "prometheus")
    rules = json.loads(ask(f"{fleet.url('prometheus', 9090)}/api/v1/rules")[2])["data"]["groups"]
    assert rules and all(group["rules"] for group in rules)


# ---- failures ----------------------------------------------------------------------------------


class Load:
    """Clients that send one request after the other until they are told to stop."""

    def __init__(self, url, clients):
        self.url = f"{url}/v1/chat/completions"
        self.done = []
        self.stopping = threading.Event()
        self.pool = concurrent.futures.ThreadPoolExecutor(clients)
        self.clients = [self.pool.submit(self.work) for _ in range(clients)]

    def work(self):
        while not self.stopping.is_set():
            begun = time.monotonic()
            try:
                status, _, body = ask(self.url, BATCH_KEY, chat(20, stream=True))
                whole = status == 200 and body.endswith(b"data: [DONE]\n\n") and b'"error"' not in body
            except (OSError, http.client.HTTPException) as error:
                whole, body = False, str(error)
            self.done.append((begun, time.monotonic(), whole, body))

    def stop(self):
        self.stopping.set()
        for one in self.clients:
            one.result()
        return self.done


def test_a_balancer_that_is_killed_costs_only_its_requests_in_flight(fleet, url):
    clients = 8
    load = Load(url, clients)
    try:
        fleet.wait(lambda: len(load.done) > 5 * clients, "the load runs")
        before = time.monotonic()
        fleet.kill("balancer-1")
        killed = time.monotonic()
        fleet.wait(lambda: len([one for one in load.done if one[0] > killed]) > 10 * clients, "it goes on")
    finally:
        done = load.stop()
    failed = [one for one in done if not one[2]]
    # nginx may have chosen the connection of a request just before it learns of the end of the connection. It
    # has learned of it when it answers a request of afterwards.
    learned = min(one[1] for one in done if one[2] and one[0] > killed)
    assert [one for one in failed if one[0] > learned] == []
    assert [one for one in failed if one[1] < before] == []
    assert len(failed) <= clients
    assert ask(f"{url}/health")[0] == 200

    # A new process in its place is found by nginx and by its sibling.
    fleet.start("balancer-1")
    fleet.wait(lambda: fleet.is_healthy("balancer-1"), "balancer-1 is healthy", "balancer-1")
    test_the_balancers_see_each_other_and_the_engines(fleet)
    page = fleet.url("balancer-1", 9090) + "/metrics"

    def serves():
        assert set(statuses_of_chats(url, 8)) == {200}
        return "vllm_lb_requests_total{" in ask(page)[2].decode()

    fleet.wait(serves, "nginx sends requests to it again")


def test_a_balancer_that_stops_costs_no_request(fleet, url):
    """With `shutdown.drain: 0`, although this nginx checks no health."""
    load = Load(url, 8)
    try:
        fleet.wait(lambda: len(load.done) > 40, "the load runs")
        fleet.end("balancer-2")
        ended = time.monotonic()
        fleet.wait(lambda: len([one for one in load.done if one[0] > ended]) > 80, "it goes on")
        fleet.start("balancer-2")
        fleet.wait(lambda: fleet.is_healthy("balancer-2"), "balancer-2 is healthy", "balancer-2")
    finally:
        done = load.stop()
    assert [one for one in done if not one[2]] == []


def test_an_engine_that_is_killed_costs_no_request_that_has_not_begun(fleet, url):
    """The health check of a container sees the end, and clients do not."""
    fleet.kill("engine-3")
    assert not fleet.is_healthy("engine-3")
    assert set(statuses_of_chats(url, 30)) == {200}
    fleet.start("engine-3")
    fleet.wait(
        lambda: all(admin(fleet, name, "/ready")["upstreams"] == 3 for name in BALANCERS), "it is back"
    )


def test_redis_admits_the_balancers_alone(fleet):
    """The password of the compose file is needed, and its user reaches no other keys."""
    def redis(*command, user="vllm-lb", password=PASSWORD):
        port = str(fleet.ports["redis", 6379])
        known = ["--user", user, "--pass", password, "--no-auth-warning"] if user else []
        code, said = compose.run([compose.tool("redis-cli"), "-p", port, *known, *command])
        return said.strip() if code == 0 else f"({code}) {said}"

    assert redis("ping") == "PONG"
    assert "NOAUTH" in redis("ping", user=None)
    assert "WRONGPASS" in redis("ping", password="demo")
    assert redis("xlen", "vllm-lb:{lb}:stream").isdigit()
    assert "NOPERM" in redis("get", "another-key")
    assert "NOPERM" in redis("flushall") and "NOPERM" in redis("config", "get", "*")


def test_a_stop_ends_everything_cleanly(tmp_path):
    with compose.fleet([compose.COMPOSE], tmp_path) as running:
        running.wait(lambda: running.is_healthy("nginx"), "nginx is healthy", "nginx")
        ended = running.stop()
    assert {name: code for name, code in ended.items() if code != 0} == {}
    log = (tmp_path / "balancer-1.log").read_text()
    assert '"message":"stopped"' in log.replace('": "', '":"'), log
