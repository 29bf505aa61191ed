"""Starts what the SDK tests talk to: simulated vLLM servers, and the balancer in front of some of them.

It knows the product by its command line alone. The binary is named by VLLM_LB_BIN. As a program it runs a
command against such a set of processes, whose addresses stand in the command's environment:

    harness.py COMMAND...       VLLM_LB_DIRECT and VLLM_LB_BALANCED are base URLs without /v1, and so is
                                VLLM_LB_ROUTED, where the virtual models of routed.py are
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Processes start within a second; what takes longer than this will not come.
PATIENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Target:
    """Somewhere that speaks vLLM's API."""

    name: str
    url: str

    @property
    def v1(self):
        return self.url + "/v1"


@dataclasses.dataclass(frozen=True)
class Stack:
    """One engine for itself, and the balancer over two others of the same kind."""

    direct: Target
    balanced: Target
    admin: str

    @property
    def targets(self):
        return (self.direct, self.balanced)


def binary():
    path = os.environ.get("VLLM_LB_BIN")
    if not path or not os.access(path, os.X_OK):
        sys.exit(f"VLLM_LB_BIN names no program ({path!r}): set it, or run ./dev test")
    return path


class PortPool:
    """Ports of 127.0.0.1 below those that the kernel gives to connections and for port 0.

    The process that a test starts binds its port later: no connection and no other listener gets the port in
    between. The pool takes blocks of ports, each by a lock that no other process of this machine can hold
    until this one ends, and hands out each port once.
    """

    FIRST, BLOCK = 10_000, 50

    def __init__(self):
        text = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
        blocks = range(self.FIRST, int(text.split()[0]) - self.BLOCK + 1, self.BLOCK)
        # Tests that began just before have left connections of the first blocks behind.
        at = os.getpid() * 7 % max(len(blocks), 1)
        self.blocks = iter([*blocks[at:], *blocks[:at]])
        self.lock = threading.Lock()
        self.held = []
        self.left = iter(())

    def take(self):
        with self.lock:
            while True:
                for port in self.left:
                    if is_free(port):
                        return port
                self.left = iter(self.next_block())

    def next_block(self):
        for first in self.blocks:
            # A name without a file, of the same network as the ports; the kernel drops it with the process.
            held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                held.bind(f"\0vllm-lb-tests-ports-{first}")
            except OSError:
                held.close()
                continue
            self.held.append(held)
            return range(first, first + self.BLOCK)
        sys.exit("no ports are left below those that the kernel gives to connections: ip_local_port_range")


def is_free(port):
    """Whether a port of 127.0.0.1 has neither a listener nor a connection."""
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@functools.cache
def port_pool():
    return PortPool()


def free_ports(count):
    """Ports of 127.0.0.1 for listeners that other processes bind."""
    return [port_pool().take() for _ in range(count)]


def status(url):
    """The status of a GET, or None when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def until(condition, what, said=lambda: ""):
    """Waits until a condition holds; what it gave. `said`: what a failure shows of the processes."""
    end = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {what}\n{said()}"
        time.sleep(0.02)
    return result


def named(command, host):
    """The command on a machine of this name, where the kernel permits it; else the command."""
    own = ["unshare", "--user", "--map-root-user", "--uts", "sh", "-c", f'hostname {host} && exec "$0" "$@"']
    tried = subprocess.run([*own, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if tried.returncode != 0:
        print(f"the host name cannot be {host}: {tried.stderr.decode().strip()}", file=sys.stderr)
        return command
    return [*own, *map(str, command)]


@contextlib.contextmanager
def process(arguments, ready_url, patience=PATIENCE, environment=None):
    """Runs a program until the block ends; the block begins when `ready_url` is 200. `environment`: further
    variables."""
    with tempfile.TemporaryFile() as log:
        variables = {**os.environ, **(environment or {})}
        child = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=variables
        )

        def fail(why):
            log.seek(0)
            said = log.read().decode(errors="replace")
            raise RuntimeError(f"{' '.join(map(str, arguments))}: {why}\n{said}")

        try:
            end = time.monotonic() + patience
            while status(ready_url) != 200:
                if child.poll() is not None:
                    fail(f"ended with {child.returncode} before it was ready")
                if time.monotonic() > end:
                    fail(f"{ready_url} is not 200 after {patience:.0f} s")
                time.sleep(0.02)
            yield child
            if child.poll() is not None:
                fail(f"ended with {child.returncode} in the middle of the tests")
        finally:
            stop(child)


def stop(child):
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(timeout=20)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@contextlib.contextmanager
def stack(api_key=None):
    """Three engines and a balancer over two of them; with a key, engines that ask for it."""
    lone, first, second, listen, admin = free_ports(5)
    with contextlib.ExitStack() as running:
        for port in (lone, first, second):
            key = ["--api-key", api_key] if api_key else []
            engine = [binary(), "engine", "--speed", "10", "--port", str(port), *key]
            running.enter_context(process(engine, f"http://127.0.0.1:{port}/health"))
        upstreams = [f"http://127.0.0.1:{first}", f"http://127.0.0.1:{second}"]
        balancer = [binary(), "--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}"]
        if api_key:
            # Clients bring the key, the balancer has none: so it must be told what it cannot ask.
            folder = running.enter_context(tempfile.TemporaryDirectory())
            config = pathlib.Path(folder, "lb.yaml")
            told = [{"url": url, "models": ["sim"]} for url in upstreams]
            config.write_text(json.dumps({"upstreams": told}))
            balancer += ["--config", str(config)]
        else:
            balancer += upstreams
        running.enter_context(process(balancer, f"http://127.0.0.1:{listen}/health"))
        direct = Target("direct", f"http://127.0.0.1:{lone}")
        yield Stack(direct, Target("balanced", f"http://127.0.0.1:{listen}"), f"http://127.0.0.1:{admin}")


def main(command):
    if not command:
        sys.exit(__doc__)
    # Made of what stands here.
    import routed

    with stack() as running, routed.every_face() as faces:
        addresses = {
            "VLLM_LB_DIRECT": running.direct.url,
            "VLLM_LB_BALANCED": running.balanced.url,
            "VLLM_LB_ROUTED": faces.balanced.url,
        }
        return subprocess.run(command, env={**os.environ, **addresses}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
