"""Reads docker/grafana and docker/prometheus: the panels, the expressions and what they name."""

import dataclasses
import functools
import json
import pathlib
import re
import subprocess

import promql_parser
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "docker/grafana/vllm-lb.json"
PROMETHEUS = ROOT / "docker/prometheus/prometheus.yml"
RULES = ROOT / "docker/prometheus/alerts.yml"
RULES_TEST = ROOT / "docker/prometheus/alerts_test.yml"

# What Prometheus itself makes, with its labels.
PROMETHEUS_SERIES = {"up": set(), "ALERTS": {"alertname", "alertstate", "severity"}}
# Labels that Prometheus gives to every series of a target.
TARGET_LABELS = {"job", "instance"}

# What Grafana puts in place of its variables: all values, and an interval over several scrapes.
ALL = {"job": ".*", "instance": ".*", "model": ".*", "upstream": ".*", "__rate_interval": "1m"}


@dataclasses.dataclass(frozen=True)
class Expression:
    """An expression in PromQL, and where it stands."""

    place: str
    text: str
    legend: str = ""

    def filled(self, **values):
        """The expression as Prometheus gets it."""
        values = {**ALL, **values}
        return re.sub(r"\$(\w+)", lambda found: values[found[1]], self.text)

    def parsed(self):
        """The expression as a tree, in which `$job` is the value of a label."""
        return promql_parser.parse(self.text.replace("$__rate_interval", ALL["__rate_interval"]))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row of docs/metrics.md."""

    kind: str
    labels: frozenset


# ---- the files ---------------------------------------------------------------------------------


@functools.cache
def dashboard():
    return json.loads(DASHBOARD.read_text())


def panels_and_rows(board):
    return [*board["panels"], *(panel for row in board["panels"] for panel in row.get("panels", []))]


def panels(board):
    """All panels but the rows, those of collapsed rows too."""
    return [panel for panel in panels_and_rows(board) if panel["type"] != "row"]


def panel_expressions(board):
    for panel in panels(board):
        for target in panel["targets"]:
            place = f"{panel['title']}, {target['refId']}"
            yield Expression(place, target["expr"], target["legendFormat"])


def annotation_expressions(board):
    for annotation in board["annotations"]["list"]:
        if "expr" in annotation:
            yield Expression(annotation["name"], annotation["expr"], annotation["titleFormat"])


def variables(board):
    """The variables that are queries: name, selector, label."""
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]["query"]
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()
            yield Expression(f"variable {variable['name']}", selector), label


def rules(path=RULES):
    """The rules of all groups."""
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def rule_expressions(path=RULES):
    for rule in rules(path):
        yield Expression(rule.get("alert") or rule["record"], rule["expr"])


@functools.cache
def documented():
    """The metrics of docs/metrics.md."""
    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", text, re.MULTILINE)
    return {name: Metric(kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


@functools.cache
def recorded():
    """The series that the rules record, with their expressions."""
    return {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


# ---- PromQL ------------------------------------------------------------------------------------


def nodes(node, above=()):
    """The node and all nodes below it, each with those above it."""
    yield node, above
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "param", "vector_selector")]
    for child in [*children, *getattr(node, "args", [])]:
        if isinstance(child, promql_parser.Expr):
            yield from nodes(child, (*above, node))


def selectors(parsed):
    """The selectors of series: name, labels that are matched, and the functions around, innermost last."""
    for node, above in nodes(parsed):
        if isinstance(node, promql_parser.VectorSelector):
            functions = [each.func.name for each in above if isinstance(each, promql_parser.Call)]
            yield node, functions


def matched(selector):
    """The labels that a selector matches, with the values."""
    return {matcher.name: matcher.value for matcher in selector.matchers.matchers}


def grouped(parsed):
    """The labels by which an expression groups or joins."""
    for node, _ in nodes(parsed):
        modifier = getattr(node, "modifier", None)
        modifier = getattr(modifier, "matching", modifier)
        yield from getattr(modifier, "labels", None) or []


def series_of(name):
    """The kind and the labels of a documented series, or None."""
    if name in documented():
        return documented()[name]
    family, _, part = name.rpartition("_")
    metric = documented().get(family)
    if metric is None or metric.kind != "histogram" or part not in ("bucket", "sum", "count"):
        return None
    return Metric("counter", metric.labels | ({"le"} if part == "bucket" else set()))


def labels_of(name):
    """The labels that a series may have; None for a series that nothing exports."""
    if name in PROMETHEUS_SERIES:
        return TARGET_LABELS | PROMETHEUS_SERIES[name]
    if name in recorded():
        return set(grouped(promql_parser.parse(recorded()[name])))
    series = series_of(name)
    return None if series is None else TARGET_LABELS | series.labels


# ---- tools -------------------------------------------------------------------------------------


def run(*command, **settings):
    """Runs a command; its code, and what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **settings)
    return done.returncode, done.stdout + done.stderr
