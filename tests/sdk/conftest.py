"""Fixtures of the SDK tests: every call is made twice, to one engine and through the balancer.

Whoever talks to vllm-lb must not be able to tell it from a vLLM server, so the two results have to be
equal in all but what is new with every call: ids, times, and how much of a prompt was cached.
"""

import anthropic
import openai
import pytest

import harness
import routed
from faces import Face

IDS = {"id", "item_id", "call_id", "response_id", "previous_response_id", "request_id", "_request_id"}
TIMES = {"created", "created_at", "completed_at"}
CACHE = {
    "cached_tokens",
    "created_cache_tokens",
    "cache_write_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "cached_tokens_per_turn",
}
VOLATILE = IDS | TIMES | CACHE

MODEL = "sim"


def normal(value):
    """A result as plain data, without what differs between any two calls."""
    if isinstance(value, (openai.APIStatusError, anthropic.APIStatusError)):
        said = {name: getattr(value, name, None) for name in ("status_code", "code", "param", "type")}
        return {"raised": type(value).__name__, **said, "body": normal(value.body)}
    if isinstance(value, Exception):
        return {"raised": type(value).__name__, "said": str(value)}
    if hasattr(value, "model_dump"):
        return normal(value.model_dump(mode="json", warnings=False))
    if isinstance(value, dict):
        # A list of models in whose cards ids mean something keeps them.
        kept = VOLATILE - {"id"} if value.get("object") == "model" else VOLATILE
        # Anthropic's count of a prompt is of what was not cached.
        kept = kept | {"input_tokens"} if "cache_read_input_tokens" in value else kept
        return {key: type(inner).__name__ if key in kept else normal(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [normal(inner) for inner in value]
    return value


class Clients:
    """The SDKs' clients for one target. They do not retry: a test wants to see the first answer."""

    def __init__(self, target, key="EMPTY"):
        self.target = target
        self.openai = openai.OpenAI(base_url=target.v1, api_key=key, max_retries=0, timeout=60)
        self.anthropic = anthropic.Anthropic(base_url=target.url, auth_token=key, max_retries=0, timeout=60)

    def async_openai(self):
        return openai.AsyncOpenAI(base_url=self.target.v1, api_key="EMPTY", max_retries=0, timeout=60)


class Same:
    """Makes a call to both targets and holds the results against each other."""

    def __init__(self, stack, key="EMPTY"):
        self.clients = [Clients(target, key) for target in stack.targets]

    def plain(self, value):
        """What is compared of a result."""
        return normal(value)

    def __call__(self, call):
        """What the balancer gave, when it is what the engine gave."""
        direct, balanced = (call(clients) for clients in self.clients)
        assert self.plain(balanced) == self.plain(direct)
        return balanced

    def fails(self, kind, call):
        """The error that both calls raised."""
        errors = []
        for clients in self.clients:
            with pytest.raises(kind) as raised:
                call(clients)
            errors.append(raised.value)
        direct, balanced = errors
        assert self.plain(balanced) == self.plain(direct)
        return balanced


@pytest.fixture(scope="session")
def stack():
    with harness.stack() as running:
        yield running


@pytest.fixture
def same(stack):
    return Same(stack)


@pytest.fixture(scope="session")
def locked_stack():
    with harness.stack(api_key="open-sesame") as running:
        yield running


@pytest.fixture(scope="module")
def engine():
    """The URL of an engine alone, for balancers with settings of their own."""
    (port,) = harness.free_ports(1)
    command = [harness.binary(), "engine", "--speed", "20", "--port", str(port)]
    with harness.process(command, f"http://127.0.0.1:{port}/health"):
        yield f"http://127.0.0.1:{port}"


# ---- virtual models ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def balancer():
    with routed.every_face() as running:
        yield running


@pytest.fixture(scope="session")
def clients(balancer):
    """The SDKs' clients: to make one takes longer than most tests."""
    url, common = balancer.balanced, {"max_retries": 0, "timeout": 60, "default_headers": routed.MATCHED}
    key = "the client's own"
    yield (
        openai.OpenAI(base_url=url.v1, api_key=key, **common),
        anthropic.Anthropic(base_url=url.url, auth_token=key, **common),
    )


@pytest.fixture(params=["calm", "rough"])
def weather(request, balancer):
    balancer.heal()
    yield request.param
    balancer.heal()


@pytest.fixture(params=routed.FACES)
def face(request, balancer, clients, weather):
    return Face(balancer, clients, request.param, weather == "rough")


@pytest.fixture
def plain(balancer, clients, weather):
    return Face(balancer, clients, "plain", weather == "rough")


@pytest.fixture
def calm(balancer, clients):
    balancer.heal()
    return Face(balancer, clients, "plain")
