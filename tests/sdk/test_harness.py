"""The comparison itself can fail: what matters is kept, what must differ is not."""

import pathlib
import subprocess
import sys

import pytest

import harness
from conftest import Same, normal


def test_what_must_differ_is_taken_out():
    one = {"id": "a", "created": 1, "usage": {"cached_tokens": 0}, "choices": [{"text": "x"}]}
    two = {"id": "b", "created": 2, "usage": {"cached_tokens": 16}, "choices": [{"text": "x"}]}
    assert normal(one) == normal(two)


@pytest.mark.parametrize(
    "one, two",
    [
        ({"text": "x"}, {"text": "y"}),
        ({"id": "a"}, {"id": None}),
        ({"id": "a"}, {}),
        ([1, 2], [2, 1]),
        ({"object": "model", "id": "a"}, {"object": "model", "id": "b"}),
        (ValueError("a"), ValueError("b")),
    ],
)
def test_what_matters_is_kept(one, two):
    assert normal(one) != normal(two)


def test_a_difference_is_a_failure():
    stack = harness.Stack(harness.Target("direct", "http://a"), harness.Target("balanced", "http://b"), "")
    with pytest.raises(AssertionError):
        Same(stack)(lambda clients: clients.target.url)
    assert Same(stack)(lambda clients: "same") == "same"


def test_a_program_that_ends_is_told_with_its_words():
    with pytest.raises(RuntimeError, match="ended with 3.*\n.*nonsense"):
        with harness.process(["bash", "-c", "echo nonsense; exit 3"], "http://127.0.0.1:9/"):
            pass


def test_ports_are_of_one_process_and_none_of_a_connection():
    """The kernel gives a connection any port of its range that no process has bound yet."""
    script = "import harness; print(*harness.free_ports(60), flush=True); input()"
    command, folder = [sys.executable, "-c", script], pathlib.Path(harness.__file__).parent
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    others = [subprocess.Popen(command, cwd=folder, **pipes) for _ in range(3)]
    try:
        printed = " ".join(one.stdout.readline() for one in others)
        ports = [*harness.free_ports(60), *map(int, printed.split())]
    finally:
        for one in others:
            one.communicate("\n", timeout=harness.PATIENCE)
    assert len(ports) == len(set(ports)) == 240
    first_of_kernel = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < first_of_kernel
