"""The balancer's metrics, read by the parsers that Prometheus' own client has.

The parser of OpenMetrics is strict: it rejects names without the suffix of their type, families that are
there twice or mixed, units that the name does not end in, and pages without an end.
"""

import math
import urllib.parse
import urllib.request

import prometheus_client.openmetrics.parser
import prometheus_client.parser
import pytest

import harness
from conftest import MODEL, Clients

OPEN = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


# What may differ between two pages without a request between them.
MOVING = {
    "vllm_lb_connections",
    "vllm_lb_in_flight",
    "vllm_lb_probes_total",
    "vllm_lb_resident_bytes",
    "vllm_lb_upstream_kv_usage",
    "vllm_lb_upstream_unaccounted_requests",
}


def page(stack, accept):
    request = urllib.request.Request(stack.admin + "/metrics", headers={"accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers["content-type"], answer.read().decode()


@pytest.fixture(scope="module")
def pages():
    """A page of each format behind traffic of all kinds."""
    with harness.stack() as stack:
        client = Clients(stack.balanced).openai
        for number in range(4):
            messages = [{"role": "user", "content": f"number {number} " * 200}]
            client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3)
            stream = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=9, stream=True)
            assert list(stream)
        for path in ("/nowhere", '/v1/models/a"b\\c'):
            harness.status(stack.balanced.url + urllib.parse.quote(path))
        # A request is counted when it is over, which its client may know first.
        counted = f'_first_byte_seconds_count{{model="{MODEL}"}} 8\n'
        harness.until(lambda: counted in page(stack, "text/plain")[1], "all are counted")
        texts = {accept: page(stack, accept) for accept in (OPEN, "text/plain")}
    yield texts


def families(pages, accept, parser):
    kind, text = pages[accept]
    return kind, list(parser.text_string_to_metric_families(text))


def test_openmetrics_is_read_by_the_strict_parser(pages):
    kind, found = families(pages, OPEN, prometheus_client.openmetrics.parser)
    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    by_name = {family.name: family for family in found}
    assert len(by_name) == len(found) > 30
    assert by_name["vllm_lb_requests"].type == "counter"
    assert by_name["vllm_lb_build"].type == "info"
    for family in found:
        assert family.documentation and "`" not in family.documentation, family.name
        assert family.samples, family.name
    units = {family.name: family.unit for family in found if family.unit}
    assert units["vllm_lb_request_seconds"] == "seconds"
    assert units["vllm_lb_resident_bytes"] == "bytes"


def test_the_text_format_is_read_by_its_parser(pages):
    kind, found = families(pages, "text/plain", prometheus_client.parser)
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    names = [family.name for family in found]
    assert len(names) == len(set(names)) > 30


def bound(written):
    return float(written.replace("+Inf", "inf"))


def test_both_formats_have_the_same_samples(pages):
    """But for what moves by itself, and for how a bucket's bound is written."""

    def samples(accept, parser):
        found = {}
        for family in families(pages, accept, parser)[1]:
            for sample in family.samples:
                labels = dict(sample.labels)
                if "le" in labels:
                    labels["le"] = bound(labels["le"])
                found[sample.name, tuple(sorted(labels.items()))] = sample.value
        return found

    one = samples(OPEN, prometheus_client.openmetrics.parser)
    other = samples("text/plain", prometheus_client.parser)
    assert set(one) == set(other) and len(one) > 200
    for key, value in one.items():
        assert key[0] in MOVING or other[key] == value, key


def test_histograms_are_consistent(pages):
    for family in families(pages, OPEN, prometheus_client.openmetrics.parser)[1]:
        if family.type != "histogram":
            continue
        series = {}
        for sample in family.samples:
            key = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
            sample_of = (sample.name.removeprefix(family.name), sample.labels.get("le"))
            series.setdefault(key, {})[sample_of] = sample.value
        for key, values in series.items():
            buckets = [(bound(le), count) for (suffix, le), count in values.items() if suffix == "_bucket"]
            assert buckets == sorted(buckets) and buckets[-1][0] == math.inf, (family.name, key)
            counts = [count for _, count in buckets]
            assert counts == sorted(counts) and counts[-1] == values["_count", None], (family.name, key)


def test_traffic_is_in_the_histograms(pages):
    found = {family.name: family for family in families(pages, OPEN, prometheus_client.openmetrics.parser)[1]}

    def count(name):
        samples = found[name].samples
        return sum(sample.value for sample in samples if sample.name == f"{name}_count")

    assert count("vllm_lb_first_byte_seconds") == 8
    assert count("vllm_lb_added_latency_seconds") == 8
    assert 1 <= count("vllm_lb_inter_token_seconds") <= 4
