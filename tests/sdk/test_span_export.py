"""The export of spans towards collectors that fail, and its end with the process."""

import contextlib
import threading

import certificates
import collector as otel
import harness
from spans import burst, complete, ended, ends, over, trace_id


def two_failures(running):
    """Waits until an export has failed, and the next one."""
    harness.until(lambda: running.metric("vllm_lb_span_export_failures_total") >= 2, "two exports fail")


def all_counted(running, sink):
    """Waits until the balancer has read the answers to the exports that the collector took."""
    harness.until(lambda: running.spans("exported") == len(sink.spans()), "all are counted")


# ---- collectors --------------------------------------------------------------------------------


def test_no_span_of_a_thousand_requests_is_lost(engine):
    with otel.collector() as sink, over(engine, {"endpoint": sink.url}) as running:
        burst(running, 1000, first=10_000)
        spans = sink.wait(lambda spans: complete(spans, 10_000, 1000))
        assert len({(span.trace, span.id) for span in spans}) == len(spans)
        all_counted(running, sink)
        assert running.metric("vllm_lb_span_export_failures_total") == 0
        assert len(sink.exports) < 100, "spans are sent in batches"


def test_a_collector_that_is_down_delays_no_request(engine):
    (port,) = harness.free_ports(1)
    with over(engine, {"endpoint": f"http://127.0.0.1:{port}"}) as running:
        assert burst(running, 50, first=20_000) < 5
        two_failures(running)
        assert running.spans("exported") == 0
        with otel.collector(port) as sink:
            sink.wait(lambda spans: complete(spans, 20_000, 50))
            all_counted(running, sink)
        assert running.spans("collector") == 0


def test_a_collector_that_answers_late_delays_no_request(engine):
    with otel.collector() as sink:
        answers = threading.Event()
        sink.answers = [otel.take_when(answers)]
        with over(engine, {"endpoint": sink.url, "timeout": "1m"}) as running:
            assert burst(running, 50, first=30_000) < 5
            harness.until(lambda: sink.exports, "an export comes")
            assert burst(running, 50, first=30_050) < 5
            assert sink.spans() == []
            answers.set()
            sink.wait(lambda spans: complete(spans, 30_000, 100))


def test_a_collector_that_is_slower_than_the_limit_gets_the_batch_again(engine):
    with otel.collector() as sink:
        sink.answers = [late_refusal(sink)]
        with over(engine, {"endpoint": sink.url, "timeout": "1s"}) as running:
            burst(running, 5, first=35_000)
            sink.wait(lambda spans: complete(spans, 35_000, 5))
            assert running.metric("vllm_lb_span_export_failures_total") == 1


def late_refusal(sink):
    """Answers once the batch has come again, and takes nothing."""

    def late(handler):
        harness.until(lambda: len(sink.exports) > 1, "the batch comes again")
        with contextlib.suppress(OSError):
            otel.reply(handler, 200)
        return False

    return late


def test_a_collector_that_is_busy_is_left_alone_for_as_long_as_it_asks(engine):
    with otel.collector() as sink:
        sink.answers = [otel.refuse(503, retry_after="2"), otel.refuse(429)]
        with over(engine, {"endpoint": sink.url}) as running:
            burst(running, 5, first=40_000)
            sink.wait(lambda spans: complete(spans, 40_000, 5))
            first, second, third = (at for at, *_ in sink.exports)
            assert second - first >= 2 and third - second >= 0.5
            assert running.metric("vllm_lb_span_export_failures_total") == 2


def test_answers_that_are_garbage(engine):
    with otel.collector() as sink:
        sink.answers = [otel.take_with_garbage, otel.no_http, otel.no_http, otel.take]
        sink.answers += [otel.refuse(400), otel.take_some(1)]
        with over(engine, {"endpoint": sink.url}) as running:

            def one(number):
                burst(running, 1, first=50_000 + number)

            one(1)
            sink.request(trace_id(50_001))
            # No HTTP: on the kept connection, and on a new one.
            one(2)
            sink.request(trace_id(50_002))
            assert running.metric("vllm_lb_span_export_failures_total") == 1
            # Refused for good.
            one(3)
            harness.until(lambda: running.spans("collector") > 0, "they are refused for good")
            one(4)
            sink.request(trace_id(50_004))
            harness.until(lambda: running.spans("rejected") == 1, "one is rejected")
            assert sink.spans(trace_id(50_003)) == []


# ---- TLS ---------------------------------------------------------------------------------------


def test_spans_are_exported_over_tls_to_a_collector_that_is_trusted(engine, tmp_path):
    tls = certificates.server(tmp_path)
    trusted = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
    with otel.collector(tls=tls) as sink:
        assert sink.url.startswith("https://")
        with over(engine, {"endpoint": sink.url}, environment=trusted) as running:
            burst(running, 100, first=90_000)
            sink.wait(lambda spans: complete(spans, 90_000, 100))
            assert running.metric("vllm_lb_span_export_failures_total") == 0
            # The connection is kept, and a new one follows when the collector ends it.
            sink.answers = [otel.no_http]
            burst(running, 1, first=91_000)
            sink.request(trace_id(91_000))


def test_nothing_is_exported_to_a_collector_that_is_not_trusted(engine, tmp_path):
    tls = certificates.server(tmp_path)
    (tmp_path / "other").mkdir()
    certificates.server(tmp_path / "other")
    other = {"SSL_CERT_FILE": str(tmp_path / "other/ca.pem")}
    with otel.collector(tls=tls) as sink, ends(over(engine, {"endpoint": sink.url}, environment=other)) as (
        running,
        raised,
    ):
        assert burst(running, 5, first=92_000) < 5
        two_failures(running)
        assert (sink.exports, running.spans("exported")) == ([], 0)
        assert ended(running, 20) < 8
    assert "certificate" in str(raised.value).lower()


# ---- the end -----------------------------------------------------------------------------------


def test_what_waits_is_exported_at_the_end(engine):
    with otel.collector() as sink, ends(over(engine, {"endpoint": sink.url})) as (running, _):
        burst(running, 20, first=60_000)
        assert ended(running, 20) < 10
        assert complete(sink.spans(), 60_000, 20)


def test_the_end_waits_five_seconds_for_a_collector(engine):
    with otel.collector() as sink:
        sink.answers = [otel.take_when(threading.Event())] * 3
        with ends(over(engine, {"endpoint": sink.url, "timeout": "1m"})) as (running, raised):
            burst(running, 3, first=70_000)
            harness.until(lambda: sink.exports, "an export comes")
            assert 4 < ended(running, 20) < 12
        assert "spans lost: the collector did not take them before the end" in str(raised.value)


def test_the_end_does_not_wait_for_a_collector_that_is_down(engine):
    (port,) = harness.free_ports(1)
    with ends(over(engine, {"endpoint": f"http://127.0.0.1:{port}"})) as (running, raised):
        burst(running, 3, first=80_000)
        two_failures(running)
        assert ended(running, 20) < 4
    logged = str(raised.value)
    assert logged.count("spans cannot be exported: they wait") == 1
    assert "spans are dropped" not in logged, "one record for the change"
