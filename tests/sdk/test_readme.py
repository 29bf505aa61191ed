"""The README's promises: its snippets are run, as they are printed, against `./dev demo`."""

import os
import re
import socket
import subprocess
import sys

import pytest

import harness

README = (harness.ROOT / "README.md").read_text()
PRINTED = "127.0.0.1:8000"


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def is_free(port):
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def demo():
    """The address that the demo serves on: the printed one, unless somebody else is there."""
    port, admin = harness.free_ports(2)
    port = 8000 if is_free(8000) else port
    address = f"127.0.0.1:{port}"
    command = [harness.ROOT / "dev", "demo", "--admin", f"127.0.0.1:{admin}"]
    if address != PRINTED:
        command += ["--listen", address]
    # The demo builds what is not built.
    with harness.process(command, f"http://{address}/health", patience=900):
        yield address


def run(command, text, address):
    text = text.replace(PRINTED, address)
    done = subprocess.run([*command, text], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_names_the_command_of_the_fixture():
    assert "\n    ./dev demo\n" in README


@pytest.mark.parametrize("text", snippets("bash"))
def test_bash(demo, text):
    assert '"object":"chat.completion"' in run(["bash", "-euc"], text, demo)


@pytest.mark.parametrize("text", snippets("python"))
def test_python(demo, text):
    assert len(run([sys.executable, "-c"], text, demo).split()) > 3


def test_there_is_something_to_run():
    assert snippets("bash") and snippets("python")


def test_files_that_the_readme_names_exist():
    named = re.findall(r"\]\(([^):]+)\)", README) + re.findall(r"conf/[a-z.-]+", README)
    missing = [name for name in named if not os.path.exists(harness.ROOT / name)]
    assert not missing
