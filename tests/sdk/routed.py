"""A balancer whose routes have every option on together, over engines that can be told to fail.

`EVERYTHING` is what the routes of all virtual models have in common; each has one route for each path, as a
path is one of the options too. The engines ask for a key that only the upstreams and the routes know.
"""

import contextlib
import copy
import dataclasses
import json
import pathlib
import re
import tempfile
import time
import urllib.request

import harness

KEY = "open-sesame"
SERVED = "sim"
LENGTH = 4096

PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
]
MATCHED = {"x-team": "research"}

EVERYTHING = {
    "header": MATCHED,
    "to": SERVED,
    "headers": {"set": {"x-stage": "prod"}, "remove": ["x-debug", "x-team"]},
    "response_headers": {"set": {"x-served-by": "a route"}, "remove": ["server"]},
    "body": {
        "defaults": {
            "max_tokens": 200,
            "temperature": 0.5,
            "reasoning_effort": "low",
            "truncation": "disabled",
            "stop": ["za", "zo", "vi"],
            "chat_template_kwargs": {"enable_thinking": True, "style": {"tone": "dry", "rhymes": 0}},
        },
        "overrides": {
            "seed": 7,
            "user": None,
            "chat_template_kwargs": {"secret": None, "style": {"rhymes": 1}},
        },
        "remove": ["logit_bias", "service_tier"],
        "roles": {"developer": "system"},
    },
    "token_ids": True,
    "overflow": "length",
    "metadata_overrides": True,
    "api_key": KEY,
    "timeouts": {"connect": "1s", "first_byte": "20s", "idle": "20s", "total": "60s"},
    "retry": {"attempts": 3, "backoff": "1ms", "max_backoff": "10ms", "budget": 10},
}

# The virtual models with everything on, and whether their thoughts stand in the content of a chat.
FACES = {"tagged": True, "plain": False}


def face(name, think_tags, path, upstreams):
    made = copy.deepcopy(EVERYTHING)
    return {**made, "model": name, "path": path, "upstreams": upstreams, "think_tags": think_tags}


def every_option(urls, spare):
    """The faces lead to the upstreams of `urls` and never to the spare one, which serves less than it is
    said to."""
    upstreams = [{"url": url, "name": f"engine-{at}", "api_key": KEY} for at, url in enumerate(urls)]
    names = [upstream["name"] for upstream in upstreams]
    routes = [face(name, tags, path, names) for name, tags in FACES.items() for path in PATHS]
    routes.append({"model": "locked", "to": SERVED, "api_key": "wrong", "upstreams": names})
    routes.append({"model": "strict", "to": SERVED, "upstreams": names})
    routes.append({"model": "haunted", "to": "ghost", "overflow": "length"})
    routes.append({"model": "lost", "to": "nobody"})
    return {
        "upstreams": [*upstreams, {"url": spare, "name": "spare", "api_key": KEY, "models": ["ghost"]}],
        "routes": routes,
        "expose": True,
        # Tests fail engines more often than this would let pass.
        "breaker": {"failures": 1000},
    }


@dataclasses.dataclass(frozen=True)
class Routed:
    """The balancer, and the engines behind it."""

    balanced: harness.Target
    admin: str
    engines: list

    def told(self, engine, path, body=None):
        asked = urllib.request.Request(engine + path, data=json.dumps(body).encode() if body else None)
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return json.loads(answer.read())

    def fail(self, at, kind, requests=1, **more):
        """This engine fails so many requests in this way."""
        self.told(self.engines[at], "/sim/fault", {"kind": kind, "requests": requests, **more})

    def heal(self):
        for engine in self.engines:
            self.told(engine, "/sim/fault", {"kind": "none"})

    def struck(self, call, kind, **more):
        """Makes a call while two engines would fail it, until one has; what each call gave."""
        before, end = self.metric("vllm_lb_retries_total"), time.monotonic() + harness.PATIENCE
        while self.metric("vllm_lb_retries_total") == before:
            assert time.monotonic() < end, f"no request came to an engine that would fail it by {kind}"
            for at in (0, 1):
                self.fail(at, kind, **more)
            yield call()
            self.heal()

    def received(self):
        """What every engine got: a list of lists of (path, headers, body)."""
        return [
            [(one["path"], dict(one["headers"]), one["body"]) for one in self.told(engine, "/sim/requests")]
            for engine in self.engines
        ]

    def metric(self, name):
        """The sum of a metric of the balancer over its labels."""
        with urllib.request.urlopen(self.admin + "/metrics", timeout=10) as answer:
            page = answer.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))


# Every option that a client cannot see, and the name that it can.
UNSEEN = {
    "model": SERVED,
    "to": "real/one",
    "headers": {"set": {"x-stage": "prod"}, "remove": ["x-debug"]},
    "response_headers": {"set": {"x-served-by": "a route"}},
    "body": {
        "defaults": {"seed": 3, "chat_template_kwargs": {"style": {"tone": "dry"}}},
        "overrides": {"priority": 1, "chat_template_kwargs": {"secret": None}},
        "remove": ["of_nobody"],
    },
    "metadata_overrides": True,
    "timeouts": EVERYTHING["timeouts"],
    "retry": EVERYTHING["retry"],
}


@contextlib.contextmanager
def renamed():
    """One engine for itself, and a balancer over two that serve the same model by another name."""
    length = 8 * LENGTH
    with engines(1, length=length) as lone, engines(2, "--model", UNSEEN["to"], length=length) as urls:
        with balancer({"upstreams": urls, "routes": [UNSEEN]}, urls) as running:
            yield harness.Stack(harness.Target("direct", lone[0]), running.balanced, running.admin)


@contextlib.contextmanager
def engines(count, *flags, length=LENGTH):
    """So many engines in one process; the block is given their URLs."""
    ports = harness.free_ports(count)
    command = [harness.binary(), "engine", "--speed", "10", "--max-model-len", str(length), *flags]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with harness.process([*command, "--port", ",".join(map(str, ports))], f"{urls[-1]}/health"):
        yield urls


@contextlib.contextmanager
def balancer(config, urls, lives=False):
    """A balancer with this configuration, over the engines at these URLs."""
    listen, admin = harness.free_ports(2)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "lb.yaml")
        file.write_text(json.dumps(config))
        command = [harness.binary(), "--config", str(file)]
        command += ["--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}"]
        target = harness.Target("balanced", f"http://127.0.0.1:{listen}")
        # One whose upstreams are all gone lives, and is not healthy.
        ready = f"http://127.0.0.1:{admin}/live" if lives else f"{target.url}/health"
        with harness.process(command, ready):
            yield Routed(target, f"http://127.0.0.1:{admin}", urls)


@contextlib.contextmanager
def every_face():
    """The faces over three engines and a spare one."""
    with engines(4, "--api-key", KEY) as urls, balancer(every_option(urls[:-1], urls[-1]), urls) as running:
        yield running
