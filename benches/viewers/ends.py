"""What is behind the balancers of benches/viewers.sh, in one process: upstreams on neighbouring ports, each
of which is also a collector of spans.

    ends.py FIRST COUNT         serve on so many ports, until killed

An upstream answers a chat with a short stream at once, with the usage that vLLM reports. A collector answers
an export with an empty success.
"""

import asyncio
import json
import sys

EVENTS = 4

CARD = {"id": "sim", "object": "model", "created": 1, "owned_by": "vllm", "root": "sim",
        "max_model_len": 32768}
USAGE = {"prompt_tokens": 400, "completion_tokens": EVENTS, "total_tokens": 400 + EVENTS,
         "prompt_tokens_details": {"cached_tokens": 384}}

METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="sim"} 1.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="sim"} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{model_name="sim"} 0.5
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",enable_prefix_caching="True",num_gpu_blocks="16384"} 1.0
"""


def answer(kind, body):
    """A whole answer with status 200."""
    return f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


def stream():
    """A stream that is there at once."""
    common = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 1, "model": "sim"}
    word = {"index": 0, "delta": {"content": " word"}, "finish_reason": None}
    events = [{**common, "choices": [word]}] * EVENTS
    events.append({**common, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    events.append({**common, "choices": [], "usage": USAGE})
    texts = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
    chunks = "".join(f"{len(text):x}\r\n{text}\r\n" for text in texts)
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return f"{head}{chunks}0\r\n\r\n".encode()


ANSWERS = {
    b"GET /health": answer("application/json", ""),
    b"GET /version": answer("application/json", '{"version": "0.32.0"}'),
    b"GET /v1/models": answer("application/json", json.dumps({"object": "list", "data": [CARD]})),
    b"GET /metrics": answer("text/plain", METRICS),
    b"POST /v1/chat/completions": stream(),
    b"POST /v1/traces": answer("application/x-protobuf", ""),
}
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


class Connection(asyncio.Protocol):
    """Reads one request after the other, and answers with constants."""

    def connection_made(self, transport):
        self.transport, self.received = transport, b""

    def data_received(self, data):
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end]
            whole = end + 4 + body_length(head)
            if len(self.received) < whole:
                return
            self.received = self.received[whole:]
            method, target = head.split(b" ", 2)[:2]
            self.transport.write(ANSWERS.get(method + b" " + target, NOT_FOUND))


def body_length(head):
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def serve(first, count):
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Connection, "127.0.0.1", first + at) for at in range(count)]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
