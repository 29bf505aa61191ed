"""The dashboard of Grafana and the alerts of Prometheus are sound, and name only what the product has.

Grafana's own types come from npm (`@grafana/schema`), and the TypeScript compiler checks the dashboard
against them. Grafana's dashboard-linter is in no package index, so its rules are written here again. promtool
parses every expression. test_prometheus.py runs the expressions against a real Prometheus.
"""

import copy
import itertools
import json
import os
import re
import subprocess

import pytest
import yaml

import documents
import harness
import monitoring
import test_docs

ROOT = monitoring.ROOT
SDK = ROOT / "tests/sdk"
BOARD = monitoring.dashboard()
COLUMNS = 24


# ---- checks of the dashboard: each gives the problems that it finds -----------------------------


def overlaps(board):
    places = [(panel["title"], panel["gridPos"]) for panel in board["panels"]]
    for title, place in places:
        if place["x"] + place["w"] > COLUMNS:
            yield f"{title}: is wider than the grid"
    for (left, one), (right, two) in itertools.combinations(places, 2):
        if all(one[at] < two[at] + two[size] and two[at] < one[at] + one[size] for at, size in ("xw", "yh")):
            yield f"{left} and {right}: overlap"


def repeated_ids(board):
    ids = [panel["id"] for panel in monitoring.panels_and_rows(board)]
    yield from (f"{one}: is the id of several panels" for one in sorted(set(ids)) if ids.count(one) > 1)


def missing_texts(board):
    for panel in monitoring.panels(board):
        defaults = panel["fieldConfig"]["defaults"]
        if not panel["title"] or not panel["description"].endswith("."):
            yield f"{panel['title']}: a panel has a title, and a description in sentences"
        if panel["type"] != "table" and not defaults.get("unit"):
            yield f"{panel['title']}: has no unit"
        if panel["type"] in ("timeseries", "state-timeline"):
            if not all(target["legendFormat"] for target in panel["targets"]):
                yield f"{panel['title']}: a line has no name"


def other_sources(board):
    """Data sources that are not the variable; the built-in annotations are Grafana's own."""
    def found(value):
        if isinstance(value, dict):
            if "datasource" in value:
                yield value["datasource"]
            yield from (inner for each in value.values() for inner in found(each))
        elif isinstance(value, list):
            yield from (inner for each in value for inner in found(each))

    for source in found(board):
        if source.get("uid") not in ("${datasource}", "-- Grafana --"):
            yield f"{source}: is not the variable"


def all_expressions(board):
    queries = (selector for selector, _ in monitoring.variables(board))
    return [*monitoring.panel_expressions(board), *monitoring.annotation_expressions(board), *queries]


def unknown_variables(board):
    names = {variable["name"] for variable in board["templating"]["list"]}
    used = {name for each in all_expressions(board) for name in re.findall(r"\$(\w+)", each.text)}
    yield from (f"${name}: is no variable" for name in used - names - {"__rate_interval"})
    yield from (f"${name}: is not used" for name in names - used - {"datasource"})


def unfiltered(board):
    """Selectors that leave out a variable although the series has the label."""
    for each in monitoring.panel_expressions(board):
        for selector, _ in monitoring.selectors(each.parsed()):
            labels = (monitoring.labels_of(selector.name) or set()) & {"job", "instance", "model", "upstream"}
            for label in sorted(labels):
                if monitoring.matched(selector).get(label) != f"${label}":
                    yield f'{each.place}: {selector.name} is not filtered by {label}=~"${label}"'


def wrong_rates(board):
    """Counters are seen through a rate over Grafana's interval, and gauges never are."""
    for each in monitoring.panel_expressions(board):
        for selector, functions in monitoring.selectors(each.parsed()):
            series = monitoring.series_of(selector.name)
            is_rate = functions[-1:] in (["rate"], ["increase"])
            if series and is_rate != (series.kind == "counter"):
                yield f"{each.place}: {selector.name} is a {series.kind}"
        for interval in re.findall(r"\[(.*?)\]", each.text):
            if interval != "$__rate_interval":
                yield f"{each.place}: the interval is {interval}, and not $__rate_interval"


def unknown_series(board):
    for each in all_expressions(board):
        yield from undocumented(each)


def wrong_legends(board):
    for each in [*monitoring.panel_expressions(board), *monitoring.annotation_expressions(board)]:
        parsed = each.parsed()
        labels = set(monitoring.grouped(parsed))
        if not labels:
            for selector, _ in monitoring.selectors(parsed):
                labels |= monitoring.labels_of(selector.name) or set()
        for label in re.findall(r"{{ *(\w+) *}}", each.legend):
            if label not in labels:
                yield f"{each.place}: its name has the label {label}, and its series have {sorted(labels)}"


def unparsable(board):
    """What promtool cannot parse, as rules that record the expressions."""
    texts = [(each.place, each.filled()) for each in all_expressions(board)]
    yield from promtool_problems(texts)


def undocumented(expression):
    """Series and labels of an expression that docs/metrics.md does not have."""
    parsed = expression.parsed()
    known = set()
    for selector, _ in monitoring.selectors(parsed):
        labels = monitoring.labels_of(selector.name)
        if labels is None:
            yield f"{expression.place}: {selector.name}: docs/metrics.md has no such metric"
            return
        known |= labels
        for label in monitoring.matched(selector).keys() - labels:
            yield f"{expression.place}: {selector.name} has no label {label}"
    for label in set(monitoring.grouped(parsed)) - known:
        yield f"{expression.place}: groups by {label}, which none of its series has"


def promtool_problems(texts):
    """What promtool rejects, in the form of rules that record the expressions."""
    rules = [{"record": f"expression:{at}", "expr": text} for at, (_, text) in enumerate(texts)]
    code, said = check_rules({"groups": [{"name": "expressions", "rules": rules}]})
    problems = re.findall(r'"expression:(\d+)": (.*)', said)
    yield from (f"{texts[int(at)][0]}: {problem}" for at, problem in problems)
    if code != 0 and not problems:
        yield said


def check_rules(content):
    command = ("promtool", "check", "rules", "--lint=none", "/dev/stdin")
    return monitoring.run(*command, input=json.dumps(content))


CHECKS = (
    overlaps, repeated_ids, missing_texts, other_sources, unknown_variables, unfiltered, wrong_rates,
    unknown_series, wrong_legends, unparsable,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_dashboard_is_sound(check):
    assert list(check(BOARD)) == []


def first(board, kind="timeseries"):
    return next(panel for panel in monitoring.panels(board) if panel["type"] == kind)


def with_expression(text, legend="a line"):
    return lambda board: first(board)["targets"][0].update(expr=text, legendFormat=legend)


S = 'job=~"$job",instance=~"$instance"'

# A mistake for each check.
MISTAKES = (
    (overlaps, lambda board: first(board)["gridPos"].update(y=first(board, "stat")["gridPos"]["y"], x=0)),
    (overlaps, lambda board: first(board)["gridPos"].update(w=25)),
    (repeated_ids, lambda board: first(board).update(id=board["panels"][0]["id"])),
    (missing_texts, lambda board: first(board).update(description="")),
    (missing_texts, lambda board: first(board, "stat")["fieldConfig"]["defaults"].update(unit="")),
    (missing_texts, lambda board: first(board)["targets"][0].update(legendFormat="")),
    (other_sources, lambda board: first(board).update(datasource={"type": "prometheus", "uid": "mine"})),
    (unknown_variables, with_expression('vllm_lb_queued{job=~"$jobs"}')),
    (unfiltered, with_expression('vllm_lb_queued{job=~"$job"}')),
    (unfiltered, with_expression(f"vllm_lb_upstream_active{{{S}}}")),
    (wrong_rates, with_expression(f"vllm_lb_signs_lost_total{{{S}}}")),
    (wrong_rates, with_expression(f"rate(vllm_lb_queued{{{S}}}[$__rate_interval])")),
    (wrong_rates, with_expression(f"rate(vllm_lb_signs_lost_total{{{S}}}[5m])")),
    (unknown_series, with_expression(f"vllm_lb_nothing{{{S}}}")),
    (unknown_series, with_expression(f'vllm_lb_queued{{{S},upstream="a"}}')),
    (unknown_series, with_expression(f"sum by (upstream) (vllm_lb_queued{{{S}}})")),
    (wrong_legends, with_expression(f"sum by (job) (vllm_lb_queued{{{S}}})", "{{instance}}")),
    (unparsable, with_expression(f"sum(vllm_lb_queued{{{S}}}) by")),
)


@pytest.mark.parametrize(("check", "mistake"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_each_check_finds_a_mistake(check, mistake):
    board = copy.deepcopy(BOARD)
    mistake(board)
    assert list(check(board))


def test_every_check_has_a_mistake():
    assert {check for check, _ in MISTAKES} == set(CHECKS)


def test_a_panel_or_an_alert_shows_every_documented_metric():
    expressions = [*monitoring.panel_expressions(BOARD), *monitoring.rule_expressions()]
    shown = {selector.name for each in expressions for selector, _ in monitoring.selectors(each.parsed())}
    shown |= {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    assert sorted(monitoring.documented().keys() - shown) == []


# ---- Grafana's own types ------------------------------------------------------------------------


def type_problems(boards, folder):
    """What the TypeScript compiler finds in each dashboard, by its name."""
    (folder / "node_modules").symlink_to(SDK / "node_modules")
    (folder / "dashboard_schema.ts").symlink_to(SDK / "dashboard_schema.ts")
    for name, board in boards.items():
        head = 'import type { Dashboard } from "./dashboard_schema";\nexport const dashboard: Dashboard = '
        (folder / f"{name}.ts").write_text(head + json.dumps(board, indent=1))
    flags = "--noEmit --strict --skipLibCheck --module esnext --target es2022 --moduleResolution bundler"
    compiler = ["node", SDK / "node_modules/typescript/bin/tsc", *flags.split(), "--preserveSymlinks"]
    code, said = monitoring.run(*compiler, *(f"{name}.ts" for name in boards), cwd=folder)
    problems = {name: re.findall(rf"^{name}\.ts\(.*", said, re.MULTILINE) for name in boards}
    assert (code != 0) == any(problems.values()), said
    return problems


# What Grafana would ignore, or not show.
TYPE_MISTAKES = {
    "dashboard_key": lambda board: board.update(rows=[]),
    "variable_key": lambda board: board["templating"]["list"][1].update(multiple=True),
    "panel_type": lambda board: first(board).update(type="graph"),
    "panel_key": lambda board: first(board).update(span=4),
    "place": lambda board: first(board)["gridPos"].update(w="8"),
    "style": lambda board: first(board)["fieldConfig"]["defaults"]["custom"].update(drawStyle="lines"),
    "option": lambda board: first(board)["options"]["tooltip"].update(mode="many"),
    "missing_option": lambda board: first(board, "heatmap")["options"].pop("color"),
    "target_key": lambda board: first(board)["targets"][0].update(query="up"),
}


def test_the_dashboard_has_the_types_of_grafana(tmp_path):
    boards = {"dashboard": BOARD}
    for name, mistake in TYPE_MISTAKES.items():
        boards[name] = copy.deepcopy(BOARD)
        mistake(boards[name])
    problems = type_problems(boards, tmp_path)
    assert problems.pop("dashboard") == []
    assert [name for name, found in problems.items() if not found] == []


def test_the_dashboard_has_the_form_of_the_grafana_that_is_started():
    """`@grafana/schema` has the version of the image, and the dashboard the newest form of that version."""
    image = compose()["services"]["grafana"]["image"]
    schema = SDK / "node_modules/@grafana/schema"
    version = json.loads((schema / "package.json").read_text())["version"]
    assert image == f"grafana/grafana:{version}"
    newest = (schema / "dist/esm/raw/dashboard/x/dashboard_types.gen.mjs").read_text()
    assert BOARD["schemaVersion"] == int(re.search(r"schemaVersion: (\d+)", newest)[1])


# ---- alerts -------------------------------------------------------------------------------------

ALERTS = [rule for rule in monitoring.rules() if "alert" in rule]


def test_prometheus_accepts_the_configuration_and_the_rules():
    for command in (["check", "config", monitoring.PROMETHEUS], ["check", "rules", monitoring.RULES]):
        code, said = monitoring.run("promtool", *command)
        assert code == 0, said


def test_the_rules_fire_as_their_tests_expect(tmp_path):
    code, said = monitoring.run("promtool", "test", "rules", monitoring.RULES_TEST)
    assert code == 0, said
    # The tests notice a rule that is wrong.
    (tmp_path / "alerts.yml").write_text(monitoring.RULES.read_text().replace("== 0\n", "== 2\n"))
    (tmp_path / "alerts_test.yml").write_text(monitoring.RULES_TEST.read_text())
    code, said = monitoring.run("promtool", "test", "rules", tmp_path / "alerts_test.yml")
    assert code != 0 and "VllmLbDown" in said and "VllmLbUpstreamNotReady" in said, said


def test_each_alert_has_a_time_at_which_it_fires_and_one_at_which_it_does_not():
    tests = yaml.safe_load(monitoring.RULES_TEST.read_text())["tests"]
    cases = [case for test in tests for case in test["promql_expr_test"]]

    def tested(fires):
        texts = [case["expr"] for case in cases if bool(case["exp_samples"]) == fires]
        return set(re.findall(r'ALERTS\{alertname="(\w+)",alertstate="firing"\}', " ".join(texts)))

    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names) > 20
    assert set(names) == tested(fires=True) == tested(fires=False)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_has_what_an_operator_needs(rule):
    notes = rule["annotations"]
    assert rule["alert"].startswith("VllmLb") and re.fullmatch(r"\d+[smh]", rule["for"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(notes) == {"summary", "description", "page"}
    assert notes["description"].endswith(".") and len(notes["summary"]) < 110
    expression = monitoring.Expression(rule["alert"], rule["expr"])
    assert list(undocumented(expression)) == []
    # What the texts name is there; the page is, with its heading.
    page = documents.Page("page", f"{notes['summary']}\n{notes['description']}\n[page]({notes['page']})\n")
    for check in (test_docs.unknown_metrics, test_docs.unknown_keys, test_docs.unknown_records,
                  test_docs.unknown_flags, test_docs.broken_links):
        assert list(check(page)) == []


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_the_texts_of_an_alert_use_labels_that_it_has(rule):
    parsed = monitoring.Expression(rule["alert"], rule["expr"]).parsed()
    labels = set(monitoring.grouped(parsed))
    for selector, _ in monitoring.selectors(parsed):
        labels |= monitoring.labels_of(selector.name)
    for label in re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())):
        assert label in labels, f"{label} is not one of {sorted(labels)}"


def test_the_recorded_series_are_of_documented_metrics():
    recorded = [rule for rule in monitoring.rules() if "record" in rule]
    problems = [undocumented(monitoring.Expression(rule["record"], rule["expr"])) for rule in recorded]
    assert [each for found in problems for each in found] == []


# ---- compose ------------------------------------------------------------------------------------


def compose():
    return yaml.safe_load((ROOT / "docker/compose.yaml").read_text())


def settings(path):
    return yaml.safe_load((ROOT / "docker" / path).read_text())


def test_the_files_that_compose_mounts_are_there():
    mounted = [volume for service in compose()["services"].values() for volume in service.get("volumes", [])]
    # A variable that is not set has its default.
    mounted = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume) for volume in mounted]
    files = [volume.split(":")[0] for volume in mounted if volume.startswith("./")]
    assert len(files) > 3
    assert [file for file in files if not (ROOT / "docker" / file).exists()] == []
    named = {volume.split(":")[0] for volume in mounted} - set(files)
    assert named == compose()["volumes"].keys()


def test_prometheus_reads_the_admin_listeners_of_both_balancers():
    services, job = compose()["services"], settings("prometheus/prometheus.yml")["scrape_configs"][0]
    port = settings("lb.yaml")["admin"]["address"].split(":")[1]
    [targets] = [group["targets"] for group in job["static_configs"]]
    assert targets == [f"{name}:{port}" for name in services if name.startswith("balancer-")]
    [down] = [rule["expr"] for rule in ALERTS if rule["alert"] == "VllmLbDown"]
    assert f'up{{job="{job["job_name"]}"}}' in down


def test_grafana_finds_prometheus_and_the_dashboard():
    services = compose()["services"]
    [source] = settings("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    intervals = settings("prometheus/prometheus.yml")["global"]
    assert source["jsonData"]["timeInterval"] == intervals["scrape_interval"]
    [variable] = [each for each in BOARD["templating"]["list"] if each["type"] == "datasource"]
    assert (source["type"], source["uid"]) == (variable["query"], variable["current"]["value"])
    [provider] = settings("grafana/provisioning/dashboards/vllm-lb.yaml")["providers"]
    assert f"./grafana:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{monitoring.DASHBOARD.name}"


def test_what_watches_is_pinned_asked_for_and_reached_from_this_machine_alone():
    services = compose()["services"]
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", services[name]["image"])
        assert services[name]["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
    published = {name for name, service in services.items() if "ports" in service}
    assert published == {"nginx", "prometheus", "grafana"}, "the admin listeners are not published"


def test_a_balancer_of_compose_has_the_operators_token_or_one_that_no_caller_knows(tmp_path):
    """The command of the containers, with a program in place of the balancer that prints what it got."""
    program = tmp_path / "vllm-lb"
    program.write_text('#!/bin/sh\necho "$VLLM_LB_ADMIN_TOKEN" "$#" "$1"\n')
    program.chmod(0o755)
    command = [part.replace("$$", "$") for part in compose()["services"]["balancer-1"]["entrypoint"]]

    def started(token):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VLLM_LB_ADMIN_TOKEN": token}
        code, said = monitoring.run(*command, "--config a b", "c", env=environment)
        assert code == 0, said
        return said.split(maxsplit=1)

    assert started("mine") == ["mine", "2 --config a b\n"]
    tokens = [started("")[0] for _ in range(2)]
    assert tokens[0] != tokens[1] and all(re.fullmatch("[0-9a-f]{64}", token) for token in tokens)


def test_the_settings_of_compose_are_accepted_only_with_a_token():
    check = [harness.binary(), "--config", ROOT / "docker/lb.yaml", "--test", "http://gpu-0:8000"]
    for token, expected in ((None, 64), ("", 64), ("mine", 0)):
        given = {} if token is None else {"VLLM_LB_ADMIN_TOKEN": token}
        done = subprocess.run(check, env=given, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == expected, done.stderr
