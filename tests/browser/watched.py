"""Pages that record what they should not do, and real processes to look at."""

import contextlib
import json
import pathlib
import random
import subprocess
import tempfile
import threading
import time
import urllib.request

import harness

AXE = pathlib.Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"

# Milliseconds for a change to show. Frames come each second.
PATIENCE = 60_000


class WatchedPage:
    """A page with what it requested and what its console got."""

    def __init__(self, page, url):
        self.page = page
        self.host = url.split("/")[2]
        self.problems = []
        # Statuses that a test makes the server answer: Chromium reports them in the console.
        self.expected = []
        page.set_default_timeout(PATIENCE)
        page.on("request", self.request)
        page.on("console", self.console)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))

    def request(self, request):
        if request.url.split(":")[0] in ("data", "blob"):
            return
        if request.url.split("/")[2] != self.host:
            self.problems.append(f"a request to {request.url}")

    def console(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text}")

    def check(self):
        found = [problem for problem in self.problems if not any(text in problem for text in self.expected)]
        assert found == []

    def go(self, view):
        """Goes to a view by its fragment."""
        self.page.evaluate("view => { location.hash = view }", view)

    def is_live(self):
        self.page.wait_for_selector("#stream[data-tone=good]")
        self.page.wait_for_selector("#ready[data-tone]")

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def wait_for(self, script, argument=None, timeout=PATIENCE):
        """Waits until an expression is true. Playwright's own waiting evaluates texts in the page, which the
        page's policy rejects."""
        end = time.monotonic() + timeout / 1000
        while not self.page.evaluate(script, argument):
            assert time.monotonic() < end, f"not true after {timeout} ms: {script}"
            self.page.wait_for_timeout(50)

    def serious(self):
        """The findings of axe-core that are serious or worse."""
        if not self.page.evaluate("typeof axe === 'object'"):
            # Not by a script element, which the page's policy rejects.
            self.page.evaluate(AXE.read_text() + "; undefined")
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [
            f"{one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes'][:3]]}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]

    def is_narrow(self):
        """Whether nothing makes the page scroll sideways."""
        widths = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        return widths[0] <= widths[1]

    def processor_time(self, script):
        """Milliseconds for which the page's thread ran for a script: other processes do not count."""
        session = self.page.context.new_cdp_session(self.page)

        def ran():
            metrics = {row["name"]: row["value"] for row in session.send("Performance.getMetrics")["metrics"]}
            return metrics["TaskDuration"] * 1000

        try:
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            before = ran()
            self.page.evaluate(script)
            return ran() - before
        finally:
            session.detach()

    def heap(self):
        """Bytes of JavaScript's heap after a collection, and the numbers of elements and of listeners."""
        session = self.page.context.new_cdp_session(self.page)
        try:
            session.send("Performance.enable")
            for _ in range(3):
                session.send("HeapProfiler.collectGarbage")
            metrics = {row["name"]: row["value"] for row in session.send("Performance.getMetrics")["metrics"]}
        finally:
            session.detach()
        return metrics["JSHeapUsedSize"], metrics["Nodes"], metrics["JSEventListeners"]


def get(url):
    return urllib.request.urlopen(url, timeout=10)


class RunningBalancer:
    """A real balancer with the engines behind it."""

    def __init__(self, file, listen, admin, engines, host=None):
        self.file, self.host = file, host
        self.url = f"http://127.0.0.1:{listen}"
        self.admin = f"http://127.0.0.1:{admin}/"
        self.engines = engines
        self.running = contextlib.ExitStack()
        self.start()

    def start(self):
        command = [harness.binary(), "--config", str(self.file)]
        if self.host:
            command = harness.named(command, self.host)
        self.running.enter_context(harness.process(command, self.admin + "live"))

    def stop(self):
        self.running.close()

    def restart(self):
        self.stop()
        self.start()

    def kill(self, name):
        """Ends an engine as a crash does."""
        engine = self.engines[name]
        engine.kill()
        engine.wait()

    def chat(self, words, session=None, stream=False, tokens=12):
        """Sends a chat and reads the whole answer."""
        body = {"model": "sim", "messages": [{"role": "user", "content": words}], "max_tokens": tokens,
                "stream": stream}
        headers = {"content-type": "application/json", **({"x-session-id": session} if session else {})}
        url = self.url + "/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def json(self, path):
        """The answer of the admin API."""
        with get(self.admin + path) as answer:
            return json.load(answer)

    def overview(self):
        return self.json("admin/overview")

    def wait_until_ready(self, count):
        def ready():
            return sum(row["state"] == "ready" for row in self.json("admin/upstreams"))

        harness.until(lambda: ready() >= count, "the upstreams are ready")


@contextlib.contextmanager
def balancer(engines=2, token=None, options=("--speed", "10"), host=None, **settings):
    """A balancer that records every call over so many engines with these options, `gpu-0` and on; with `host`
    on a machine of this name."""
    ports = harness.free_ports(engines + 2)
    (listen, admin), ports = ports[:2], ports[2:]
    with contextlib.ExitStack() as running:
        children = {}
        for at, port in enumerate(ports):
            command = [harness.binary(), "engine", "--port", str(port), *options]
            children[f"gpu-{at}"] = running.enter_context(engine_process(command, port))
        folder = pathlib.Path(running.enter_context(tempfile.TemporaryDirectory()))
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        upstreams = [{"name": f"gpu-{at}", "url": url} for at, url in enumerate(urls)]
        config = {
            "listen": f"127.0.0.1:{listen}",
            "admin": {"address": f"127.0.0.1:{admin}", **({"token": token} if token else {})},
            "upstreams": upstreams,
            "traces": {"store": "memory", "capture": "all"},
            **settings,
        }
        file = folder / "lb.yaml"
        file.write_text(json.dumps(config))
        made = RunningBalancer(file, listen, admin, children, host)
        running.callback(made.stop)
        if not token:
            made.wait_until_ready(engines)
        yield made


@contextlib.contextmanager
def engine_process(command, port):
    """An engine that a test may kill."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/health"
        harness.until(lambda: harness.status(url) == 200 or child.poll() is not None, "the engine starts")
        assert child.poll() is None, "the engine ended"
        yield child
    finally:
        harness.stop(child)


class Traffic:
    """Clients that hold conversations until the block ends."""

    def __init__(self, target, clients=4, tokens=24, pause=0.0, length=60):
        """`pause`: the most seconds before a turn; `length`: sentences that begin a conversation."""
        self.target, self.tokens, self.pause, self.length = target, tokens, pause, length
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.talk, args=(at,)) for at in range(clients)]

    def talk(self, client):
        turn, words, dice = 0, "", random.Random(client)
        while not self.stopped.wait(self.pause * dice.random()):
            if turn % 12 == 0:
                words = f"Conversation {client}, part {turn}. " + "Tell me about caches. " * self.length
            turn += 1
            words += f"Turn {turn} of this conversation. " * dice.randint(4, 40)
            # Requests to an engine that is killed may fail.
            with contextlib.suppress(OSError):
                self.target.chat(words, session=f"talk-{client}", stream=True, tokens=self.tokens)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        for thread in self.threads:
            thread.join()
