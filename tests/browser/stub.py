"""A server in place of the balancer: it serves the page as the product does, and a fleet that is made up.

It shows the page what real processes do not do on demand: 200 upstreams, hostile names, a token that is
refused, a stream that breaks, frames that come as fast as the page takes them. As a program it serves until
it is stopped:

    stub.py [PORT] [UPSTREAMS]
"""

import base64
import contextlib
import hashlib
import http.server
import json
import math
import pathlib
import random
import re
import sys
import threading
import time
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "dashboard"

HOSTILE = "<img src=x onerror=\"document.title='broken'\">"
KNOBS = {"preset": "work", "backlog": 1, "missing": 2, "stall": 0.1, "active": 400, "context": 0.05}


def joined(mark):
    """The files that the product joins at a mark, in its order."""
    listed = re.search(mark + r": &\[&str\] = &\[(.*?)\];", (ROOT / "src" / "dashboard.rs").read_text(), re.S)
    return [(SOURCES / name).read_text() for name in re.findall(r'"dashboard/([^"]+)"', listed.group(1))]


def page():
    """The document and its content security policy."""
    styles, scripts = joined("STYLES"), joined("SCRIPTS")
    html = (SOURCES / "index.html").read_text()
    for mark, name, texts in (("style", "style", styles), ("script", "script", scripts)):
        html = html.replace(f"<!-- {mark} -->", "".join(f"<{name}>{text}</{name}>" for text in texts))

    def hashes(texts):
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes(scripts)}; style-src {hashes(styles)}; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


class MadeUpFleet:
    """Numbers that move as those of a fleet do, one step a second."""

    def __init__(self, count, hostile=False, seed=1):
        self.random = random.Random(seed)
        self.step = 0
        self.started = time.time() - 3600
        self.totals = dict.fromkeys(
            "requests errors rejects retries broken_streams prompt_tokens cached_tokens output_tokens "
            "predicted_tokens reported_tokens compared_tokens".split(),
            0,
        )
        self.upstreams = [self.upstream(at, hostile) for at in range(count)]
        self.serial = 0

    def upstream(self, at, hostile):
        name = f"{HOSTILE}-{at}" if hostile else f"gpu-{at}"
        sight, reason = "exact", None
        if at % 11 == 3:
            sight, reason = "learnt", "the engine reports no cached tokens"
        elif at % 17 == 5:
            sight, reason = "blind", HOSTILE if hostile else "prefix caching is off"
        return {
            "name": name, "url": f"http://10.0.{at // 250}.{at % 250}:8000", "state": "ready", "reason": None,
            "drained": False, "weight": 1.0, "models": [HOSTILE if hostile else "llama-3.3-70b"],
            "active": 0, "active_elsewhere": 0, "max_active": None, "foreign": None, "queued": 0,
            "backlog": 0, "context": 0, "kv_usage": 0.4, "cache_tokens": 400_000 + 1000 * at,
            "requests": 1000, "failures": 0, "predicted_tokens": 0, "reported_tokens": 0,
            "compared_tokens": 0, "prompt_tokens": 0, "first_byte_ms": None, "forecast_error_ms": 20.5,
            "sight": sight, "sight_reason": reason, "incarnation": 0,
        }

    def move(self):
        self.step += 1
        for at, row in enumerate(self.upstreams):
            wave = 1 + 0.6 * math.sin(self.step / 40 + at) + 0.3 * math.sin(self.step / 7 + 2 * at)
            ready = row["state"] in ("ready", "suspect")
            done = self.poisson(3 * wave) if ready else 0
            prompt, hit = done * 1800, min(0.97, max(0.1, 0.72 + 0.2 * math.sin(self.step / 60 + at / 3)))
            row["active"] = self.poisson(9 * wave) if ready else 0
            row["active_elsewhere"] = self.poisson(2) if ready else 0
            row["queued"] = self.poisson(0.4 * wave)
            row["backlog"] = int(self.poisson(2 * wave) * 900)
            row["context"] = row["active"] * 2300
            row["kv_usage"] = min(0.99, 0.35 + 0.3 * wave) if ready else None
            row["requests"] += done
            row["failures"] += 1 if self.random.random() < 0.01 else 0
            row["prompt_tokens"] += prompt
            row["compared_tokens"] += prompt
            row["predicted_tokens"] += int(prompt * hit)
            row["reported_tokens"] += int(prompt * hit * (0.97 if row["sight"] == "exact" else 0))
            first = 130 + 90 * wave + self.random.random() * 20
            row["first_byte_ms"] = {"p50": first, "p90": first * 2.3} if ready else None
            self.totals["requests"] += done
            self.totals["errors"] += 1 if done and self.random.random() < 0.01 else 0
            self.totals["prompt_tokens"] += prompt
            self.totals["compared_tokens"] += prompt
            self.totals["cached_tokens"] += int(prompt * hit)
            self.totals["predicted_tokens"] += int(prompt * hit)
            self.totals["reported_tokens"] += int(prompt * hit * 0.96)
            self.totals["output_tokens"] += done * 240

    def poisson(self, mean):
        return max(0, int(self.random.gauss(mean, math.sqrt(max(mean, 0.01))) + 0.5))

    def decision(self, now):
        self.serial += 1
        rows = []
        tokens = self.random.choice([420, 1800, 9200, 31000])
        blocks = tokens // 128
        for row in self.random.sample(self.upstreams, min(len(self.upstreams), 16)):
            hit = self.random.choice([0, 0, 0, blocks // 2, blocks])
            missing = max(tokens - hit * 128, 16)
            terms = {"hit": hit, "uncached": missing, "missing": missing, "backlog": row["backlog"],
                     "active": row["active"], "context": row["context"], "session_penalty": 0, "weight": 1.0}
            cost = (KNOBS["backlog"] * row["backlog"]
                    + (KNOBS["missing"] + KNOBS["stall"] * row["active"]) * missing
                    + KNOBS["active"] * row["active"] + KNOBS["context"] * row["context"])
            rows.append({"upstream": row["name"], "cost": round(cost, 1), "forecast_ms": cost / 9, **terms})
        best = min(rows, key=lambda row: row["cost"])
        reason = "prefix" if best["hit"] else "load"
        return {"time": now, "id": f"{self.serial:032x}", "model": "llama-3.3-70b", "attempt": 1,
                "session": None, "prompt_tokens": tokens, "blocks": blocks, "reason": reason,
                "upstream": best["upstream"], "of": len(rows), "candidates": rows}

    def overview(self, now):
        ready = sum(row["state"] == "ready" for row in self.upstreams)
        counted = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
        usage = {key: self.totals[key] for key in counted}
        model = self.upstreams[0]["models"][0] if self.upstreams else "llama-3.3-70b"
        return {
            "time": now,
            "balancer": {"id": "0f3a5b7c9d1e2f40", "name": "lb-0", "version": "0.1.0",
                         "started": self.started, "ready": ready > 0, "leaving": False},
            "totals": {**self.totals, "in_flight": sum(row["active"] for row in self.upstreams), "queued": 0,
                       "connections": 412, "first_byte_ms": {"p50": 212.0, "p90": 640.0, "p99": 1800.0},
                       "peeked_bytes": 3 << 20, "index_blocks": 183_204, "index_bytes": 22 << 20,
                       "memory_bytes": 96 << 20},
            "upstreams": self.upstreams,
            "models": [{"name": model, "upstreams": len(self.upstreams), "ready": ready, **usage}],
            "routes": [{"name": "fast", "model": model, **usage}],
            "siblings": {"enabled": True, "redis_up": True, "balancers": [
                {"id": "77aa5b7c9d1e2f40", "name": "lb-1", "address": "10.0.9.2", "age_ms": 12.0,
                 "in_flight": 31, "backlog_tokens": 8200, "context_tokens": 91_000,
                 "shares_upstreams": True}]},
            "traces": {"enabled": True, "stored_bytes": 91 << 20, "waiting": 0, "stored": 1820, "lost": 0},
            "decisions": [self.decision(now)] if self.upstreams else [],
        }


class Stub(http.server.ThreadingHTTPServer):
    """The server. Tests set its fields while it runs."""

    daemon_threads = True

    def __init__(self, port=0, upstreams=200, hostile=False, token=None):
        super().__init__(("127.0.0.1", port), Answering)
        self.html, self.policy = page()
        self.fleet = MadeUpFleet(upstreams, hostile)
        self.token = token
        self.interval = 1.0
        # Frames that are left to send in a burst, each a second later in the fleet's time.
        self.burst = 0
        self.now = time.time()
        self.broken = False
        self.calls = []
        self.streams = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/"

    def frame(self):
        with self.lock:
            self.fleet.move()
            self.now += 1
            return json.dumps(self.fleet.overview(self.now))

    def handle_error(self, request, client_address):
        """A page that leaves breaks its connection: that is no error of the server."""


class Answering(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        if path == "/":
            headers = {"content-security-policy": self.server.policy}
            return self.answer(200, self.server.html, "text/html; charset=utf-8", headers)
        if self.refused(path):
            return None
        if path == "/admin/live":
            return self.stream()
        parts = [urllib.parse.unquote(part) for part in path.split("/")[1:]]
        match parts:
            case ["admin", "config"]:
                return self.json(200, {"balance": KNOBS})
            case ["sessions"]:
                return self.json(200, [{"session_id": HOSTILE, "trace_count": 2, "created_at": time.time(),
                                        "metadata": {"from": HOSTILE}}])
            case ["sessions", session, "traces"]:
                return self.json(200, [trace(session)])
            case ["traces", _]:
                return self.json(200, trace(HOSTILE))
        return self.json(404, {"detail": "Not Found"})

    def do_PATCH(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.refused(self.path):
            return
        name = urllib.parse.unquote(self.path.removeprefix("/admin/upstreams/"))
        self.server.calls.append(("PATCH", name, body))
        rows = [row for row in self.server.fleet.upstreams if row["name"] == name]
        if not rows:
            self.json(404, {"error": f"no upstream is named {name!r}"})
            return
        if "drain" in body:
            rows[0].update(drained=body["drain"], state="draining" if body["drain"] else "ready")
        rows[0].update(weight=body.get("weight", rows[0]["weight"]))
        self.json(200, rows[0])

    def do_POST(self):
        if self.refused(self.path):
            return
        self.server.calls.append(("POST", self.path, None))
        self.json(200, {"status": "ok", "changed": ["balance"], "needs_restart": [], "warnings": []})

    def refused(self, path):
        token = self.server.token
        if token is None or self.headers["authorization"] == f"Bearer {token}":
            return False
        self.json(401, {"error": "Unauthorized"})
        return True

    def stream(self):
        server = self.server
        if server.broken:
            return self.json(503, {"error": "broken"})
        server.streams += 1
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        while not server.broken:
            self.wfile.write(f"event: overview\ndata: {server.frame()}\n\n".encode())
            self.wfile.flush()
            if server.burst > 0:
                server.burst -= 1
            else:
                self.wait()
        return None

    def wait(self):
        end = time.monotonic() + self.server.interval
        while time.monotonic() < end and not self.server.broken and self.server.burst == 0:
            time.sleep(0.02)

    def json(self, status, body):
        self.answer(status, json.dumps(body).encode(), "application/json", {})

    def answer(self, status, body, kind, headers):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def trace(session):
    """A recorded call whose every text is hostile."""
    words = ["<b>", "bold", "</b>", " and", " sure", HOSTILE]
    logprobs = [-0.01, -0.4, -1.0, -2.0, -5.0, -0.2]
    content = [{"token": word, "logprob": logprob} for word, logprob in zip(words, logprobs)]
    message = {"role": "assistant", "content": "".join(words), "reasoning": HOSTILE}
    return {
        "trace_id": "5f0c0a52-1c7e-4a77-9a37-0d6f1e2b3c4d", "session_id": session, "model": HOSTILE,
        "messages": [{"role": "system", "content": HOSTILE},
                     {"role": HOSTILE, "content": [{"type": "text", "text": HOSTILE}, {"type": HOSTILE}]},
                     {"role": "assistant", "content": None,
                      "tool_calls": [{"function": {"name": HOSTILE, "arguments": HOSTILE}}]}],
        "response_message": message, "completion_token_ids": [1, 2, 3, 4, 5, 6], "logprobs": logprobs,
        "finish_reason": "stop", "weight_version": 3, "latency_ms": 812.5,
        "token_counts": {"prompt": 1200, "completion": 6, "cached": 1024}, "timestamp": time.time(),
        "raw_request": {}, "raw_response": {"choices": [{"logprobs": {"content": content}}]}, "api": "chat",
        "stream": False, "status": 200, "error": None, "partial": False,
        "choices": [{"index": 0, "message": message, "completion_token_ids": [1, 2, 3, 4, 5, 6],
                     "logprobs": logprobs, "finish_reason": "stop"}],
        "ttft_ms": 230.0, "queue_ms": 41.0, "upstream": HOSTILE, "attempts": 1, "request_id": HOSTILE,
        "client_model": HOSTILE,
    }


@contextlib.contextmanager
def serving(**fields):
    """A stub that serves until the block ends."""
    server = Stub(**fields)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.broken = True
        server.shutdown()
        server.server_close()


def main(port="8099", upstreams="200"):
    with serving(port=int(port), upstreams=int(upstreams)) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
