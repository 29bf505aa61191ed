"""The README's promises: its snippets are run, as they are printed, against `./dev demo`. And the pictures.

test_docs.py looks up what the README names, as it does for the other pages.
"""

import re
import socket
import subprocess
import sys

import pytest

import documents
import harness

README = documents.page("README.md")
PRINTED = "127.0.0.1:8000"


def snippets(language):
    return [block.text for block in README.blocks() if block.language == language]


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
    """The address that the demo serves on: the printed one, unless another process has it."""
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


def test_two_commands_set_up_a_fresh_machine():
    """The second is the command of the fixture. The first installs Rust, and is not run where Rust is."""
    commands = [command for _, command in README.commands()]
    first, second = [command for command in commands if not command.startswith(("cargo", "vllm-lb"))]
    assert first.startswith("curl ") and "https://sh.rustup.rs | sh -s -- -y" in first
    assert subprocess.run(["bash", "-nc", first], check=False).returncode == 0
    assert "rustup.rs" in (harness.ROOT / "dev").read_text()
    assert second == "./dev demo"


@pytest.mark.parametrize("text", snippets("bash"))
def test_bash(demo, text):
    assert '"object":"chat.completion"' in run(["bash", "-euc"], text, demo)


@pytest.mark.parametrize("text", snippets("python"))
def test_python(demo, text):
    assert len(run([sys.executable, "-c"], text, demo).split()) > 3


def test_there_is_something_to_run():
    assert snippets("bash") and snippets("python")


def test_every_picture_is_shown_by_a_page():
    shown = {target for page in documents.pages() for target in re.findall(r"images/([\w.-]+)", page.text)}
    pictures = {path.name for path in (documents.ROOT / "docs/images").iterdir()}
    assert len(pictures) > 5 and pictures - shown == set()
