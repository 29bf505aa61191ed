"""A collector of OpenTelemetry for tests: takes OTLP over HTTP, keeps the spans, and fails when told to.

The messages are decoded by the classes that the protocol's own files generate (opentelemetry-proto).
"""

import contextlib
import dataclasses
import http.server
import threading
import time

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

PATIENCE = 30.0


@dataclasses.dataclass(frozen=True)
class SpanSeen:
    """A span as it was exported."""

    trace: str
    id: str
    parent: str
    name: str
    kind: int
    flags: int
    start: int
    end: int
    attributes: dict
    failed: bool
    message: str
    resource: dict

    @property
    def is_server(self):
        return self.kind == trace_pb2.Span.SPAN_KIND_SERVER


def plain(attributes):
    """Attributes as a map; a name that comes twice is an error."""
    values = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
    assert len(values) == len(attributes)
    return values


def spans_of(message):
    """The spans of an export."""
    for group in message.resource_spans:
        resource = plain(group.resource.attributes)
        for scope in group.scope_spans:
            assert scope.scope.name == "vllm-lb"
            for span in scope.spans:
                yield SpanSeen(
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    name=span.name,
                    kind=span.kind,
                    flags=span.flags,
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    attributes=plain(span.attributes),
                    failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                    message=span.status.message,
                    resource=resource,
                )


class Collector:
    """Takes exports on a port. `answers` are the next answers, one each; after them all exports are taken.

    An answer is a function of the handler of the request. It returns whether it took the spans.
    """

    def __init__(self, port=0, tls=None):
        """`tls`: the context of a server with a certificate."""
        self.lock = threading.Lock()
        self.taken, self.exports, self.answers = [], [], []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.export(self, body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.scheme = "https" if tls else "http"
        if tls:
            # The thread of a connection makes its handshake, and not the one that accepts it.
            self.server.socket = tls.wrap_socket(
                self.server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def export(self, handler, body):
        message = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
        found = list(spans_of(message))
        with self.lock:
            self.exports.append((time.monotonic(), handler.path, dict(handler.headers), len(found)))
            answer = self.answers.pop(0) if self.answers else take
        if answer(handler):
            with self.lock:
                self.taken += found

    def spans(self, trace=None):
        with self.lock:
            return [span for span in self.taken if trace in (None, span.trace)]

    def wait(self, enough, patience=PATIENCE):
        """The spans when `enough` of them holds."""
        end = time.monotonic() + patience
        while not enough(spans := self.spans()):
            assert time.monotonic() < end, f"{len(spans)} spans: {[span.name for span in spans][:50]}"
            time.sleep(0.02)
        return spans

    def request(self, trace, patience=PATIENCE):
        """The spans of the one request of a trace: its own, and those of its phases by name."""
        self.wait(lambda spans: any(span.trace == trace and span.is_server for span in spans), patience)
        # All spans of a request come with one export.
        spans = self.spans(trace)
        server = [span for span in spans if span.is_server]
        assert len(server) == 1
        phases = {span.name: span for span in spans if not span.is_server}
        assert len(phases) == len(spans) - 1
        return server[0], phases

    def close(self):
        self.server.shutdown()
        self.server.server_close()


# ---- answers -----------------------------------------------------------------------------------


def reply(handler, status, body=b"", **headers):
    handler.send_response(status)
    for name, value in {"content-type": "application/x-protobuf", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def take(handler):
    reply(handler, 200, trace_service_pb2.ExportTraceServiceResponse().SerializeToString())
    return True


def take_when(event):
    """Answers once the event is set, if ever within a minute."""

    def late(handler):
        event.wait(60)
        # The client may have given up.
        with contextlib.suppress(OSError):
            take(handler)
        return True

    return late


def refuse(status, **headers):
    def refused(handler):
        reply(handler, status, b"no", **headers)
        return False

    return refused


def take_some(rejected):
    def partial(handler):
        response = trace_service_pb2.ExportTraceServiceResponse()
        response.partial_success.rejected_spans = rejected
        response.partial_success.error_message = "too many"
        reply(handler, 200, response.SerializeToString())
        return True

    return partial


def take_with_garbage(handler):
    reply(handler, 200, b"\xff\xfe<html>what?")
    return True


def no_http(handler):
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")
    handler.close_connection = True
    return False


@contextlib.contextmanager
def collector(port=0, tls=None):
    running = Collector(port, tls)
    try:
        yield running
    finally:
        running.close()
