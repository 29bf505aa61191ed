#!/usr/bin/env python3
"""Captures `vllm-lb top` over a demo under load: docs/images/top.svg, and the text in docs/operating.md.

    VLLM_LB_BIN=target/release/vllm-lb docs/top.py

Both are what the program shows. Conversations of four clients run for half a minute before.
"""

import json
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

UPSTREAMS, CLIENTS, WARM_UP, COLUMNS, ROWS = 4, 24, 35, 118, 34

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
            request = urllib.request.Request(
                v1 + "/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                messages.append(json.load(answer)["choices"][0]["message"])
            if stopping.is_set():
                return


def main():
    listen, admin = harness.free_ports(2)
    url, v1 = f"http://127.0.0.1:{admin}", f"http://127.0.0.1:{listen}/v1"
    command = [harness.binary(), "--demo", str(UPSTREAMS), "--listen", f"127.0.0.1:{listen}"]
    command += ["--admin", f"127.0.0.1:{admin}"]
    stopping = threading.Event()
    with harness.process(command, f"http://127.0.0.1:{listen}/health"):
        clients = [threading.Thread(target=converse, args=(v1, at, stopping)) for at in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            with terminal.program([harness.binary(), "top", url], COLUMNS, ROWS) as program:
                end = time.monotonic() + WARM_UP
                while time.monotonic() < end:
                    program.read(0.2)
                program.until("DECISIONS")
                PICTURE.write_text(terminal.svg(program.screen, "vllm-lb top over four upstreams under load"))
            once = subprocess.run(
                [harness.binary(), "top", url, "--once"], capture_output=True, text=True, check=True
            )
        finally:
            stopping.set()
            for client in clients:
                client.join()
    page = PAGE.read_text()
    if len(BLOCK.findall(page)) != 1:
        sys.exit(f"{PAGE} has no block of one screen, or several")
    PAGE.write_text(BLOCK.sub(lambda _: f"```text\n{once.stdout}```", page))


if __name__ == "__main__":
    main()
