"""Starts a program or an image before it is published, and ends with an error unless it serves.

    smoke.py PROGRAM
    smoke.py docker run --rm --network host IMAGE

The arguments are the beginning of a command, to which arguments of vllm-lb are added: `--version`; then
`--demo` on free ports until `health` succeeds. One chat follows, and SIGTERM, on which it has to end with 0.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.request

START_LIMIT, STOP_LIMIT = 120, 60


def free_addresses(count):
    """Addresses of this machine, each with a port that was free a moment ago."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in held]
    for one in held:
        one.close()
    return addresses


def wait_until_healthy(command, admin, child):
    end = time.monotonic() + START_LIMIT
    while True:
        check = [*command, "health", f"http://{admin}"]
        asked = subprocess.run(check, capture_output=True, text=True, timeout=START_LIMIT, check=False)
        if asked.returncode == 0:
            return
        if child.poll() is not None:
            sys.exit(f"smoke.py: --demo ended with {child.returncode}")
        if time.monotonic() > end:
            sys.exit(f"smoke.py: not healthy within {START_LIMIT} s: {asked.stderr}")
        time.sleep(0.1)


def chat(listen):
    question = {"model": "sim", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
    request = urllib.request.Request(
        f"http://{listen}/v1/chat/completions", json.dumps(question).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def main(command):
    if not command:
        sys.exit(__doc__)
    version = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True, timeout=600)
    listen, admin = free_addresses(2)
    child = subprocess.Popen([*command, "--demo", "--listen", listen, "--admin", admin])
    try:
        wait_until_healthy(command, admin, child)
        answer = chat(listen)
        child.terminate()
        code = child.wait(timeout=STOP_LIMIT)
    finally:
        child.kill()
    if not answer or code != 0:
        sys.exit(f"smoke.py: the answer is {answer!r}, and the exit code {code}")
    print(f"smoke.py: {version.stdout.strip()} serves and stops")


if __name__ == "__main__":
    main(sys.argv[1:])
