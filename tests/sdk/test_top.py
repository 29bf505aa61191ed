"""`vllm-lb top` on a real terminal: it draws, reacts to keys, and leaves the terminal as it found it."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree

import pytest

import harness
import terminal


@pytest.fixture(scope="module")
def balancer():
    with harness.stack() as stack:
        yield stack


def top(stack, *arguments):
    return [harness.binary(), "top", stack.admin, "--interval", "0.5", *arguments]


def complete(stack, count, headers=()):
    for number in range(count):
        body = json.dumps({"model": "sim", "prompt": f"{number} is the number", "max_tokens": 3}).encode()
        request = urllib.request.Request(
            stack.balanced.v1 + "/completions", body, {"content-type": "application/json", **dict(headers)}
        )
        urllib.request.urlopen(request, timeout=30).read()


def test_one_screen_is_text_for_scripts(balancer):
    complete(balancer, 5)
    done = subprocess.run(top(balancer, "--once"), capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("127.0.0.1:")]
    assert len(rows) == 2 and all(" ready " in row for row in rows), done.stdout
    assert "DECISIONS" in done.stdout and "2 of 2 ready" in done.stdout


def test_one_screen_has_whole_lines_unless_it_has_a_width(balancer):
    name = "a-request-with-a-long-name-" * 4
    complete(balancer, 1, {"x-request-id": name})

    def lines(columns):
        variables = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
        variables.update({"COLUMNS": columns} if columns else {})
        command = top(balancer, "--once")
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=variables)
        return done.stdout.splitlines()

    for columns in (None, "0", "wide"):
        assert any(line.endswith(f"id {name}") for line in lines(columns)), columns
    assert max(map(len, lines("90"))) <= 90


def test_without_a_terminal_or_a_balancer_it_says_what_is_wrong(balancer):
    done = subprocess.run(
        top(balancer), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1 and "--once" in done.stderr
    [port] = harness.free_ports(1)
    command = [harness.binary(), "top", f"http://127.0.0.1:{port}", "--once"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and f"127.0.0.1:{port}" in done.stderr


def test_a_screen_shows_traffic_and_drains_an_upstream(balancer):
    with terminal.program(top(balancer)) as program:
        program.until("2 of 2 ready")
        assert program.screen.is_alternate and program.screen.is_cursor_hidden
        complete(balancer, 3)
        program.until("DECISIONS")
        program.until("live")
        program.press("d")
        program.until("no new requests go to it")
        program.press("y")
        program.until("1 of 2 ready")
        program.until("draining")
        program.press("u")
        program.until("Let requests go to")
        program.press("y")
        program.until("2 of 2 ready")
        program.press("?")
        program.until("any key closes it")
        program.press(" ")
        program.resize(120, 40)
        program.until("TREND")
        program.press("q")
        assert program.end() == 0
        assert not program.screen.is_alternate and not program.screen.is_cursor_hidden


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_restores_the_terminal(balancer, ending):
    with terminal.program(top(balancer)) as program:
        program.until("2 of 2 ready")
        program.child.send_signal(ending)
        assert program.end() == 0
        assert not program.screen.is_alternate and not program.screen.is_cursor_hidden


def test_a_lost_balancer_is_shown_and_found_again():
    listen, admin = harness.free_ports(2)
    command = [harness.binary(), "--demo", "--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}"]
    ready, url = f"http://127.0.0.1:{listen}/health", f"http://127.0.0.1:{admin}"
    with terminal.program([harness.binary(), "top", url, "--interval", "0.5"]) as program:
        program.until("lost for")
        with harness.process(command, ready):
            program.until("2 of 2 ready")
        program.until("lost for")
        assert "UPSTREAMS" in program.screen.text(), "the last overview stays"
        with harness.process(command, ready):
            program.until(lambda screen: "live" in screen.text() and "lost" not in screen.text())
        program.press("\x03")
        assert program.end() == 0


def test_the_screen_draws_quickly_enough_for_an_idle_core(balancer):
    """Without a key or an event it draws about once an interval: it must not spin."""
    with terminal.program(top(balancer)) as program:
        program.until("2 of 2 ready")
        before = sum(float(part) for part in cpu(program.child.pid))
        end = time.monotonic() + 3
        while time.monotonic() < end:
            program.read(0.2)
        spent = sum(float(part) for part in cpu(program.child.pid)) - before
        assert spent < 1.0, f"{spent} s of CPU in 3 s"


# ---- the picture in the docs ------------------------------------------------------------------


def shown(picture):
    """The text of a picture of the screen, row by row."""
    rows = {}
    for text in xml.etree.ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text"):
        rows.setdefault(int(text.get("y")), []).append((float(text.get("x")), text.text))
    return "\n".join(" ".join(text for _, text in sorted(row)) for _, row in sorted(rows.items()))


def headings(text):
    """The words in capitals: titles of parts and of columns."""
    return {word for word in text.split() if len(word) > 2 and word.isalpha() and word.isupper()} - {"UTC"}


def test_the_picture_is_made_by_its_script_and_has_what_the_screen_has(tmp_path):
    script = harness.ROOT / "docs/top.py"
    page = (harness.ROOT / "docs/operating.md").read_text()
    made = tmp_path / "top.svg"
    command = [sys.executable, script, "--seconds", "4", "--output", made]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    text = shown(made)
    assert "8 of 8 ready" in text and "DECISIONS" in text and "live" in text, text
    kept = shown(harness.ROOT / "docs/images/top.svg")
    assert headings(kept) == headings(text), "make the picture anew: docs/top.py"
    assert len(headings(text)) > 10
    assert (harness.ROOT / "docs/operating.md").read_text() == page


def cpu(pid):
    """The seconds of CPU that a process has used, in the user's code and in the system's."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return [int(fields[index]) / 100 for index in (11, 12)]
