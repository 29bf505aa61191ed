"""Hours of moderate load through two balancers, with trouble every minute: does anything grow or stay behind?

Two balancers share a Redis and four simulated engines. Clients send chats, completions and calls of sessions,
streamed or whole; some leave in the middle, some name models that do not exist. Each minute one thing happens
to a balancer, an engine or Redis. At the end the load stops: no request may be in flight, the file
descriptors must be as few as at the beginning, and the memory of the last quarter may not exceed that of the
second by more than `MAX_GROWTH`. A request may fail only while an engine is being killed.

It needs redis-server and Python alone, uses loopback only, and ends what it has started.
"""

import argparse
import asyncio
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

ENGINES = 4
BALANCERS = 2
CLIENTS = 24
# Mean seconds between two requests of one client.
PAUSE = 0.35
TROUBLE_INTERVAL = 60.0
SAMPLE_INTERVAL = 15.0
# A client gives up after this, which counts as a failure.
MAX_REQUEST_SECONDS = 120.0
# How long after a kill of an engine its cut streams are explained.
EXPLAINED_SECONDS = 15.0
# The mean memory of the last quarter over that of the second.
MAX_GROWTH = 1.10
# Descriptors at the end above those at the beginning: Redis, kept-alive connections to engines.
MAX_EXTRA_DESCRIPTORS = 32
WORDS = "the cache of a prompt is read once and its blocks are found again by their hashes".split()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def call(method, url, body=None, seconds=10):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method)
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return answer.read().decode()


class Process:
    """A program that can be killed and started again with the same arguments."""

    def __init__(self, arguments, log):
        self.arguments, self.log = arguments, log
        self.running = None
        self.start()

    def start(self):
        with open(self.log, "ab") as log:
            self.running = subprocess.Popen(self.arguments, stdout=log, stderr=log)

    def send(self, number):
        self.running.send_signal(number)

    def kill(self):
        self.running.kill()
        self.running.wait()

    def resident(self):
        """The resident memory in MiB."""
        status = pathlib.Path(f"/proc/{self.running.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.running.pid}/fd"))

    def seconds(self):
        """The CPU time in seconds."""
        fields = pathlib.Path(f"/proc/{self.running.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Fleet:
    """All processes of a run."""

    def __init__(self, binary, directory):
        self.directory = directory
        self.redis_port = free_port()
        self.engine_ports = [free_port() for _ in range(ENGINES)]
        self.ports = [free_port() for _ in range(BALANCERS)]
        self.admin_ports = [free_port() for _ in range(BALANCERS)]
        log = lambda name: directory / f"{name}.log"
        redis = ["redis-server", "--port", str(self.redis_port), "--bind", "127.0.0.1"]
        redis += ["--save", "", "--appendonly", "no", "--dir", str(directory)]
        self.redis = Process(redis, log("redis"))
        self.engines = []
        for number, port in enumerate(self.engine_ports):
            engine = [binary, "engine", "--port", str(port), "--model", "sim", "--speed", "20", "-q"]
            self.engines.append(Process(engine, log(f"engine-{number}")))
        self.balancers = []
        for number in range(BALANCERS):
            path = directory / f"lb-{number}.yaml"
            path.write_text(self.settings(number))
            self.balancers.append(Process([binary, "-c", str(path), "-q"], log(f"lb-{number}")))

    def settings(self, number):
        upstreams = [{"name": f"engine-{n}", "url": f"http://127.0.0.1:{port}"}
                     for n, port in enumerate(self.engine_ports)]
        return json.dumps({
            "listen": [f"127.0.0.1:{self.ports[number]}"],
            "admin": {"address": f"127.0.0.1:{self.admin_ports[number]}"},
            "redis": f"redis://127.0.0.1:{self.redis_port}",
            "upgrade_socket": str(self.directory / f"lb-{number}.sock"),
            "traces": {"memory": "16MiB"},
            "threads": 1,
            "upstreams": upstreams,
        })

    def admin(self, number):
        return f"http://127.0.0.1:{self.admin_ports[number]}"

    def gauge(self, number, name):
        for line in call("GET", self.admin(number) + "/metrics").splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise ValueError(f"no metric {name}")

    async def ready(self):
        """Waits until all engines are ready in both balancers."""
        deadline = time.monotonic() + 60
        for number in range(BALANCERS):
            while True:
                try:
                    upstreams = json.loads(call("GET", self.admin(number) + "/admin/upstreams"))
                    rows = upstreams if isinstance(upstreams, list) else upstreams["upstreams"]
                    if len(rows) == ENGINES and all(row["state"] == "ready" for row in rows):
                        break
                except (OSError, ValueError):
                    pass
                if time.monotonic() > deadline:
                    raise SystemExit("endurance: the engines did not become ready")
                await asyncio.sleep(0.2)

    def end(self):
        for process in [*self.balancers, *self.engines, self.redis]:
            if process.running.poll() is None:
                process.send(signal.SIGCONT)
                process.kill()


class Tally:
    """What the clients have seen."""

    def __init__(self):
        self.answered = self.left = self.refused = self.explained = 0
        self.unexplained = []
        self.explained_until = 0.0

    def failed(self, what):
        if time.monotonic() < self.explained_until:
            self.explained += 1
        else:
            self.unexplained.append(f"{time.strftime('%H:%M:%S')} {what}")


def request_of(dice, conversations):
    """One request: its path, its body, whether the client leaves, and the status that is expected."""
    kind = dice.random()
    words = " ".join(dice.choice(WORDS) for _ in range(dice.choice([20, 200, 2000])))
    stream = dice.random() < 0.7
    model = "sim"
    if kind < 0.1:
        return "/v1/chat/completions", chat("absent", [words], stream), False, 404
    if kind < 0.3:
        body = {"model": model, "prompt": words, "max_tokens": 16, "stream": stream}
        return "/v1/completions", body, dice.random() < 0.1, 200
    number = dice.randrange(len(conversations))
    turns = conversations[number]
    if len(turns) > 12:
        turns.clear()
    turns.append(words[:800])
    path = f"/sessions/s{number}/v1/chat/completions" if number % 2 else "/v1/chat/completions"
    return path, chat(model, turns, stream), dice.random() < 0.1, 200


def chat(model, turns, stream):
    messages = [{"role": "user", "content": turn} for turn in turns]
    return {"model": model, "messages": messages, "max_tokens": 24, "stream": stream}


async def send(port, path, body, leaves):
    """Sends one request on a connection of its own; returns the status and whether the answer was whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        text = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: lb\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
        writer.write(head.encode() + text)
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        if leaves:
            await reader.read(100)
            return status, True
        rest = await reader.read()
        lower = head.lower()
        if b"text/event-stream" in lower:
            return status, b"data: [DONE]" in rest and b'"error"' not in rest
        if b"content-length:" in lower:
            length = int(lower.split(b"content-length:")[1].split()[0])
            return status, len(rest) == length
        return status, rest.endswith(b"0\r\n\r\n")
    finally:
        writer.close()


async def client(number, fleet, tally, until, pace):
    dice = random.Random(number)
    conversations = [[] for _ in range(4)]
    while time.monotonic() < until:
        await asyncio.sleep(dice.expovariate(pace / PAUSE))
        path, body, leaves, expected = request_of(dice, conversations)
        path = path.replace("/sessions/s", f"/sessions/c{number}-")
        try:
            port = fleet.ports[dice.randrange(BALANCERS)]
            status, whole = await asyncio.wait_for(send(port, path, body, leaves), MAX_REQUEST_SECONDS)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            tally.failed(f"{type(error).__name__} {error}")
            continue
        if status != expected:
            tally.failed(f"status {status} instead of {expected}")
        elif not whole:
            tally.failed(f"an answer of status {status} was cut")
        elif expected != 200:
            tally.refused += 1
        elif leaves:
            tally.left += 1
        else:
            tally.answered += 1


# ---- trouble -----------------------------------------------------------------------------------


async def reload(fleet, dice, tally):
    fleet.balancers[dice.randrange(BALANCERS)].send(signal.SIGHUP)


async def drain(fleet, dice, tally):
    upstream = f"{fleet.admin(dice.randrange(BALANCERS))}/admin/upstreams/engine-{dice.randrange(ENGINES)}"
    call("PATCH", upstream, {"drain": True})
    await asyncio.sleep(15)
    call("PATCH", upstream, {"drain": False})


async def kill_engine(fleet, dice, tally):
    engine = fleet.engines[dice.randrange(ENGINES)]
    tally.explained_until = time.monotonic() + EXPLAINED_SECONDS
    engine.kill()
    await asyncio.sleep(5)
    engine.start()


async def stall_engine(fleet, dice, tally):
    engine = fleet.engines[dice.randrange(ENGINES)]
    engine.send(signal.SIGSTOP)
    await asyncio.sleep(4)
    engine.send(signal.SIGCONT)


async def stop_redis(fleet, dice, tally):
    fleet.redis.send(signal.SIGSTOP)
    await asyncio.sleep(8)
    fleet.redis.send(signal.SIGCONT)


async def restart_redis(fleet, dice, tally):
    fleet.redis.kill()
    await asyncio.sleep(3)
    fleet.redis.start()


async def empty_redis(fleet, dice, tally):
    arguments = ["redis-cli", "-p", str(fleet.redis_port), "FLUSHALL"]
    process = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.DEVNULL)
    await process.wait()


TROUBLES = [reload, drain, kill_engine, stop_redis, stall_engine, restart_redis, empty_redis]


async def make_trouble(fleet, tally, until, counts, pace):
    dice, number = random.Random(1), 0
    while time.monotonic() + 2 * TROUBLE_INTERVAL < until:
        await asyncio.sleep(TROUBLE_INTERVAL / pace)
        trouble = TROUBLES[number % len(TROUBLES)]
        number += 1
        try:
            await trouble(fleet, dice, tally)
            counts[trouble.__name__] = counts.get(trouble.__name__, 0) + 1
        except (OSError, urllib.error.URLError) as error:
            tally.unexplained.append(f"{trouble.__name__}: {error}")


# ---- samples and the report --------------------------------------------------------------------


async def take_samples(fleet, tally, start, until, samples, path):
    while time.monotonic() < until:
        await asyncio.sleep(SAMPLE_INTERVAL)
        row = {
            "seconds": time.monotonic() - start,
            "resident": [process.resident() for process in fleet.balancers],
            "descriptors": [process.descriptors() for process in fleet.balancers],
            "cpu": [process.seconds() for process in fleet.balancers],
            "answered": tally.answered, "left": tally.left, "refused": tally.refused,
            "explained": tally.explained, "unexplained": len(tally.unexplained),
        }
        samples.append(row)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def mean(values):
    values = list(values)
    return sum(values) / max(len(values), 1)


def table(samples, rows=24):
    size = max(len(samples) // rows, 1)
    lines = ["| minutes | resident MiB, mean | most | descriptors, most | answered | clients left | refused |"
             " cut by a kill | unexplained |", "| ---: |" + " ---: |" * 8]
    for first in range(0, len(samples), size):
        part = samples[first:first + size]
        last, cells = part[-1], []
        cells.append(f"{last['seconds'] / 60:.0f}")
        cells.append(" / ".join(f"{mean(s['resident'][n] for s in part):.1f}" for n in range(BALANCERS)))
        cells.append(" / ".join(f"{max(s['resident'][n] for s in part):.1f}" for n in range(BALANCERS)))
        cells.append(" / ".join(str(max(s["descriptors"][n] for s in part)) for n in range(BALANCERS)))
        cells += [str(last[name]) for name in ("answered", "left", "refused", "explained", "unexplained")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


async def quiet(fleet):
    """Waits until no request is in flight; returns what is left after a minute."""
    names = ("vllm_lb_in_flight", "vllm_lb_queued", "vllm_lb_peeked_bytes")
    deadline = time.monotonic() + 75
    while True:
        left = {f"{name} of {n}": fleet.gauge(n, name) for n in range(BALANCERS) for name in names}
        left = {name: value for name, value in left.items() if value}
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(1)


def growth(samples, number):
    quarter = max(len(samples) // 4, 1)
    memory = [sample["resident"][number] for sample in samples]
    return mean(memory[-quarter:]) / mean(memory[quarter:2 * quarter])


async def run(arguments, directory):
    fleet = Fleet(arguments.binary, directory)
    problems = []
    try:
        await fleet.ready()
        tally, samples, counts = Tally(), [], {}
        before = [process.descriptors() for process in fleet.balancers]
        start = time.monotonic()
        until = start + arguments.minutes * 60
        pace = arguments.pace
        clients = [client(number, fleet, tally, until, pace) for number in range(CLIENTS)]
        await asyncio.gather(*clients, make_trouble(fleet, tally, until, counts, pace),
                             take_samples(fleet, tally, start, until, samples, arguments.samples))
        left = await quiet(fleet)
        if left:
            problems.append(f"left behind: {left}")
        after = [process.descriptors() for process in fleet.balancers]
        grown = [growth(samples, number) for number in range(BALANCERS)]
        problems += [f"memory of balancer {n} grew by {ratio:.3f}" for n, ratio in enumerate(grown)
                     if ratio > MAX_GROWTH]
        problems += [f"balancer {n} keeps {many - few} more descriptors"
                     for n, (few, many) in enumerate(zip(before, after))
                     if many > few + MAX_EXTRA_DESCRIPTORS]
        problems += tally.unexplained
        print(table(samples))
        print(f"\nTroubles: {', '.join(f'{n} {name}' for name, n in sorted(counts.items()))}.")
        print(f"Descriptors before the load {before}, after it {after}.")
        shares = ", ".join(f"{ratio:.3f}" for ratio in grown)
        print(f"Memory of the last quarter over the second: {shares}.")
        seconds = [sample / samples[-1]["seconds"] for sample in samples[-1]["cpu"]]
        print(f"CPU: {', '.join(f'{share:.1%}' for share in seconds)} of a core.")
    finally:
        fleet.end()
    print("\n" + ("\n".join(["**Problems**:", *problems[:50]]) if problems else "No problem."))
    return 1 if problems else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", required=True)
    parser.add_argument("--minutes", type=float, default=360)
    parser.add_argument("--pace", type=float, default=1, help="minutes' load and troubles in one")
    parser.add_argument("--samples", default=os.devnull, help="a file that gets each sample as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        raise SystemExit(asyncio.run(run(arguments, pathlib.Path(directory))))


if __name__ == "__main__":
    main()
