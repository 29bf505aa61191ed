#!/usr/bin/env python3
"""Captures `vllm-lb top` over a demo under load: docs/images/top.svg, and the text in docs/operating.md.

    VLLM_LB_BIN=target/release/vllm-lb docs/top.py [--seconds N] [--output FILE]

Both are what the program shows. Conversations of 32 clients run for half a minute before. With `--output`
only the picture is made, there.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/sdk"))

import harness
import terminal

PAGE = ROOT / "docs/operating.md"
PICTURE = ROOT / "docs/images/top.svg"

UPSTREAMS, CLIENTS, WARM_UP, COLUMNS, ROWS = 8, 32, 35.0, 124, 32

# The width of the text in the page.
PAGE_COLUMNS = 120

HOST = "lb-0"

# What the text of one screen begins with, in the page.
BLOCK = re.compile(r"```text\nvllm-lb \d.*?```", re.DOTALL)


def converse(v1, client, stopping):
    """One conversation after another, each with a system prompt that some others share."""
    number = 0
    while not stopping.is_set():
        number += 1
        text = f"You are assistant {client % 6}. " + "Answer briefly, and say what you assume. " * 30
        messages = [{"role": "system", "content": text}]
        for turn in range(5):
            question = f"Question {turn} of {client}-{number}: " + "why? " * 40
            messages.append({"role": "user", "content": question})
            body = {"model": "sim", "messages": messages, "max_tokens": 60, "user": f"{client}-{number}"}
            messages.append({"role": "assistant", "content": streamed(v1, {**body, "stream": True})})
            if stopping.is_set():
                return


def streamed(v1, body):
    """The text of an answer that comes as a stream."""
    headers, text = {"content-type": "application/json"}, ""
    request = urllib.request.Request(v1 + "/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            data = line.decode().strip().removeprefix("data: ")
            if data.startswith("{"):
                choices = json.loads(data)["choices"]
                text += "".join(choice["delta"].get("content") or "" for choice in choices)
    return text


def capture(seconds):
    """The screen after so many seconds of load, and the text of `--once`."""
    listen, admin = harness.free_ports(2)
    url, v1 = f"http://127.0.0.1:{admin}", f"http://127.0.0.1:{listen}/v1"
    command = [harness.binary(), "--demo", str(UPSTREAMS), "--listen", f"127.0.0.1:{listen}"]
    command += ["--admin", f"127.0.0.1:{admin}"]
    stopping = threading.Event()
    with harness.process(harness.named(command, HOST), f"http://127.0.0.1:{listen}/health"):
        clients = [threading.Thread(target=converse, args=(v1, at, stopping)) for at in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            with terminal.program([harness.binary(), "top", url], COLUMNS, ROWS) as program:
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    program.read(0.2)
                program.until(lambda screen: "DECISIONS" in screen.text() and "live" in screen.text())
                screen = program.screen
            width = {**os.environ, "COLUMNS": str(PAGE_COLUMNS)}
            command = [harness.binary(), "top", url, "--once"]
            once = subprocess.run(command, capture_output=True, text=True, check=True, env=width)
        finally:
            stopping.set()
            for client in clients:
                client.join()
    return screen, once.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=WARM_UP, help="of load before the picture")
    parser.add_argument("--output", type=pathlib.Path, help="make only the picture, there")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    if len(BLOCK.findall(page)) != 1:
        sys.exit(f"{PAGE} has no block of one screen, or several")
    screen, once = capture(arguments.seconds)
    picture = terminal.svg(screen, f"vllm-lb top over {UPSTREAMS} upstreams under load")
    (arguments.output or PICTURE).write_text(picture)
    if not arguments.output:
        PAGE.write_text(BLOCK.sub(lambda _: f"```text\n{once}```", page))


if __name__ == "__main__":
    main()
