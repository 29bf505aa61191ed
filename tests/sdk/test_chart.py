"""charts/vllm-lb makes what Kubernetes accepts, what the balancer reads, and what fits together."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
import tomllib
import urllib.request

import pytest
import yaml

import chart
import documents
import harness
import monitoring
from chart_mistakes import MISTAKES

# What the chart's own values do not give to the configuration of a case.
SECRETS = {"VLLM_LB_ADMIN_TOKEN": "token", "VLLM_LB_REDIS": "redis://redis:6379", "VLLM_LB_KEY_GPU9": "key"}

# A hook that sleeps is younger than the rest of the chart.
NEEDS = {"everything": "1.30"}


def every_case():
    return pytest.mark.parametrize("case", sorted(chart.CASES))


# ---- what Kubernetes gets ----------------------------------------------------------------------


def oldest():
    """The oldest Kubernetes that the chart installs on."""
    wanted = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())["kubeVersion"]
    return re.fullmatch(r">=(\d+\.\d+)\.0-0", wanted)[1]


@every_case()
def test_helm_finds_nothing_to_say(case):
    code, out, errors = chart.helm("lint", "--strict", chart.CHART, *chart.arguments_of(case))
    assert code == 0, out + errors
    assert not re.search(r"\[(WARNING|ERROR)\]", out)


@every_case()
@pytest.mark.parametrize("check", chart.CHECKS, ids=lambda check: check.__name__)
def test_a_release_has_no_problem(check, case):
    assert list(check(chart.rendered(case))) == []


@every_case()
def test_the_oldest_kubernetes_accepts_a_release(case):
    version = NEEDS.get(case, oldest())
    assert list(chart.invalid_objects(chart.rendered(case), version)) == []


def test_a_younger_field_is_refused_by_an_older_kubernetes():
    problems = chart.invalid_objects(chart.rendered("everything"), oldest())
    assert any("sleep" in problem for problem in problems)


@pytest.mark.parametrize(
    ("check", "file", "text", "other", "case"),
    [(check, *mistake) for check, made in MISTAKES.items() for mistake in made],
    ids=lambda text: text[:20].strip(),
)
def test_each_check_finds_a_mistake(check, file, text, other, case, tmp_path):
    copy = shutil.copytree(chart.CHART, tmp_path / "vllm-lb")
    template = copy / "templates" / file
    before = template.read_text()
    assert text in before
    template.write_text(before.replace(text, other))
    objects = chart.render(*chart.arguments_of(case), chart=copy)
    assert list(getattr(chart, check)(objects))


def test_every_check_has_a_mistake():
    assert set(MISTAKES) == {check.__name__ for check in chart.CHECKS}


# ---- what the balancer gets --------------------------------------------------------------------


def has_kubernetes():
    """Whether the program knows the API of Kubernetes: a feature, which releases have."""
    features = tomllib.loads((chart.ROOT / "Cargo.toml").read_text())["features"]
    return "kubernetes" in features.get("default", [])


def environment(objects):
    """The variables of the container, with values in place of references to Secrets."""
    entries = chart.container(objects)["env"]
    given = {each["name"]: each.get("value", SECRETS.get(each["name"])) for each in entries}
    return {"PATH": os.environ["PATH"], **given}


def started(objects, folder, text=None):
    """The command of the container, with its file and its certificates in a folder."""
    text = text or chart.config_text(objects)
    for name in ("tls.crt", "tls.key"):
        text = text.replace(f"/etc/vllm-lb-tls/{name}", str(folder / name))
    (folder / "lb.yaml").write_text(text)
    mounted = {"/etc/vllm-lb/lb.yaml": str(folder / "lb.yaml")}
    return [harness.binary(), *(mounted.get(each, each) for each in chart.container(objects)["args"])]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", folder / "tls.key", "-out", folder / "tls.crt", "-subj", "/CN=vllm-lb"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@every_case()
def test_the_balancer_accepts_its_arguments_and_its_file(case, certificates):
    objects = chart.rendered(case)
    command = [*started(objects, certificates), "--test"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(objects), timeout=60, check=False
    )
    problems = (done.stdout + done.stderr).strip().splitlines()
    found = [item for item in chart.config(objects)["upstreams"] if "kubernetes" in item]
    if found and not has_kubernetes():
        assert done.returncode == 64
        assert ["without the feature kubernetes" in line for line in problems] == [True] * len(found)
    else:
        assert (done.returncode, problems) == (0, ["configuration ok"])


def test_a_wrong_setting_is_a_problem(certificates):
    objects = chart.render("--set", "config.balance.activ=1", "--set", "upstreams={http://a:1}")
    command = [*started(objects, certificates), "--test"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(objects), timeout=60, check=False
    )
    assert done.returncode == 64
    assert "balance.activ" in done.stdout + done.stderr


def test_everything_reaches_the_file_as_it_was_given():
    given = yaml.safe_load(chart.CASES["everything"].read_text())
    settings = chart.config(chart.rendered("everything"))
    assert given["config"].items() <= settings.items()
    assert settings["listen"][0]["tls"]["certificate"].endswith("tls.crt")
    found = settings["upstreams"]
    assert found[2]["kubernetes"].pop("namespace") == chart.NAMESPACE
    assert found == given["upstreams"]


def test_servers_of_another_cluster_need_no_rights_in_this_one():
    other = {"service": "vllm", "kubeconfig": "/etc/other/config", "context": "east"}
    given = [f"upstreams[0].kubernetes.{key}={value}" for key, value in other.items()]
    objects = chart.render("--set", ",".join(given), "--set", "upstreams[1].kubernetes.service=own")
    assert [item["kubernetes"] for item in chart.config(objects)["upstreams"]] == [
        other, {"service": "own", "namespace": chart.NAMESPACE},
    ]
    assert len(chart.of_kind(objects, "Role")) == 1
    alone = chart.render("--set", ",".join(given))
    assert not chart.of_kind(alone, "Role")
    assert list(chart.wrong_rights(objects)) + list(chart.wrong_rights(alone)) == []


# What a stop takes here: long enough for a reader of the probes, short enough for a test.
DRAIN = 3


def test_a_pod_drains_as_its_probes_and_its_grace_period_say(tmp_path):
    """On SIGTERM readiness fails at once, and requests are answered until the drain is over."""
    engine, listen, admin = harness.free_ports(3)
    objects = chart.render(
        "--set", f"upstreams={{http://127.0.0.1:{engine}}}", "--set", f"shutdown.drain={DRAIN}s"
    )
    text = chart.config_text(objects).replace("0.0.0.0:8000", f"127.0.0.1:{listen}")
    command = started(objects, tmp_path, text.replace("0.0.0.0:9090", f"127.0.0.1:{admin}"))
    one = chart.container(objects)
    paths = {name: one[name]["httpGet"]["path"] for name in one if name.endswith("Probe")}
    probe = {name: f"http://127.0.0.1:{admin}{path}" for name, path in paths.items()}
    engines = [harness.binary(), "engine", "--instant", "--port", str(engine)]
    with harness.process(engines, f"http://127.0.0.1:{engine}/health"):
        balancer = subprocess.Popen(command, env=environment(objects), stderr=subprocess.DEVNULL)
        try:
            harness.until(lambda: harness.status(probe["readinessProbe"]) == 200, "it is ready")
            assert harness.status(probe["livenessProbe"]) == 200
            stopped = time.monotonic()
            balancer.send_signal(signal.SIGTERM)
            harness.until(lambda: harness.status(probe["readinessProbe"]) == 503, "it leaves")
            assert time.monotonic() - stopped < DRAIN
            assert harness.status(probe["livenessProbe"]) == 200
            assert asks(f"http://127.0.0.1:{listen}") == 200
            assert balancer.wait(timeout=30) == 0
            took = time.monotonic() - stopped
            assert DRAIN <= took < chart.pod(objects)["spec"]["terminationGracePeriodSeconds"]
        finally:
            harness.stop(balancer)


# Addresses for documentation: no packet to them is answered.
NOWHERE = ("upstreams={http://192.0.2.1:8000}", "redis.url=redis://192.0.2.2:6379", "shutdown.drain=0")


def test_a_pod_is_live_and_not_ready_without_servers_and_redis(tmp_path):
    """The liveness probe begins at once, so the process has to answer before it has found anything."""
    listen, admin = harness.free_ports(2)
    objects = chart.render(*(word for each in NOWHERE for word in ("--set", each)))
    text = chart.config_text(objects).replace("0.0.0.0:8000", f"127.0.0.1:{listen}")
    command = started(objects, tmp_path, text.replace("0.0.0.0:9090", f"127.0.0.1:{admin}"))
    probe = chart.container(objects)["livenessProbe"]
    began = time.monotonic()
    balancer = subprocess.Popen(command, env=environment(objects), stderr=subprocess.DEVNULL)
    try:
        live = f"http://127.0.0.1:{admin}{probe['httpGet']['path']}"
        harness.until(lambda: harness.status(live) == 200, "it is live")
        assert time.monotonic() - began < probe["periodSeconds"] * probe["failureThreshold"] / 4
        assert harness.status(f"http://127.0.0.1:{admin}/ready") == 503
    finally:
        harness.stop(balancer)


def asks(url):
    body = json.dumps({"model": "sim", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4})
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", body.encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.status


@pytest.mark.parametrize(("token", "code"), [("the-token", 0), ("a-guess", 1)])
def test_helm_test_succeeds_with_the_token_alone(token, code, tmp_path):
    [one] = chart.named(chart.rendered("default"), "Pod")["spec"]["containers"]
    listen, admin = harness.free_ports(2)
    config = tmp_path / "lb.yaml"
    config.write_text(json.dumps({"admin": {"token": "the-token"}}))
    command = [harness.binary(), "--config", config, "--demo", "1"]
    command += ["--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}"]
    with harness.process(command, f"http://127.0.0.1:{admin}/ready"):
        service = f"{chart.service_of(chart.rendered('default'), 'admin')['metadata']['name']}:9090"
        given = [each.replace(service, f"127.0.0.1:{admin}") for each in one["args"]]
        assert given != one["args"]
        done = subprocess.run(
            [harness.binary(), *given],
            env={"VLLM_LB_ADMIN_TOKEN": token},
            capture_output=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == code, done.stdout + done.stderr


# ---- values ------------------------------------------------------------------------------------

# Values that are refused, with what helm says of them.
WRONG = (
    ("replicaCount=0", "replicaCount"),
    ("replicas=3", "replicas"),
    ("upstreams=null", "upstreams"),
    ("upstreams[0]=gpu-0:8000", "upstreams"),
    ("upstreams[0].kubernetes.port=http,upstreams[0].kubernetes.service=null", "upstreams"),
    ("config.listen=x", "listen"),
    ("config.redis=x", "redis"),
    ("shutdown.drain=15x", "drain"),
    ("shutdown.grace=", "grace"),
    ("redis.url=http://redis", "redis"),
    ("redis.url=redis://a,redis.existingSecret=b", "redis"),
    ("env[0].name=VLLM_LB_ADMIN_TOKEN", "env"),
    ("podLabels.app\\.kubernetes\\.io/name=x", "podLabels|propertyName"),
    ("image.tag=a b", "tag"),
    ("service.type=ExternalName", "type"),
    ("autoscaling.by=both", "by"),
    ("fullnameOverride=1a", "fullnameOverride"),
    ("fullnameOverride=a.b", "fullnameOverride"),
    (f"fullnameOverride={'a' * 51}", "fullnameOverride"),
    ("nameOverride=a-", "nameOverride"),
    (f"nameOverride={'a' * 64}", "nameOverride"),
    ("podDisruptionBudget.maxUnavailable=0%", "maxUnavailable"),
    ("podDisruptionBudget.maxUnavailable=00%", "maxUnavailable"),
    ("podDisruptionBudget.maxUnavailable=0", "maxUnavailable"),
    ("autoscaling.minReplicas=0", "minReplicas"),
    ("antiAffinity=hard", "antiAffinity"),
    ("strategy.type=OnDelete", "strategy"),
    ("strategy.maxSurge=1", "strategy|propertyName"),
)


@pytest.mark.parametrize(("setting", "named"), WRONG, ids=lambda each: each[:40])
def test_a_wrong_value_is_refused(setting, named):
    code, _, errors = chart.template("--set", setting)
    assert code != 0
    problems = [line for line in errors.splitlines() if line.startswith("- ")]
    assert any(re.search(named, line) for line in problems), errors


def leaves(value, schema, path=""):
    """The values that a user sets: those whose objects' properties are all in the schema."""
    properties = schema.get("properties", {})
    if not isinstance(value, dict) or schema.get("additionalProperties") is not False:
        yield path, value
        return
    assert set(properties) == set(value), f"{path}: {sorted(set(properties) ^ set(value))}"
    if path in descriptions():
        yield path, value
        return
    for key, inner in value.items():
        yield from leaves(inner, properties[key], f"{path}.{key}".lstrip("."))


def values():
    """All values with their defaults, in the order of the file."""
    schema = json.loads((chart.CHART / "values.schema.json").read_text())
    # Helm puts it there for charts above this one.
    del schema["properties"]["global"]
    return list(leaves(yaml.safe_load((chart.CHART / "values.yaml").read_text()), schema))


@functools.cache
def descriptions():
    """What the comments of values.yaml say, by the path of the value behind them."""
    found, above, comment = {}, [], []
    for line in (chart.CHART / "values.yaml").read_text().splitlines():
        text, key = re.match(r" *# (.*)", line), re.match(r"( *)(\w+):", line)
        if text and (comment or text[1].startswith("-- ")):
            comment.append(text[1].removeprefix("-- "))
        elif key:
            above = [*above[: len(key[1]) // 2], key[2]]
            if comment:
                found[".".join(above)], comment = " ".join(comment), []
    return found


def table():
    """The values as a table of README.md."""
    rows = ["| value | default | what it is |", "| --- | --- | --- |"]
    said = descriptions()
    for path, value in values():
        default = json.dumps(value, ensure_ascii=False).replace("|", "\\|")
        rows.append(f"| `{path}` | `{default}` | {said[path]} |")
    return "\n".join(rows) + "\n"


def test_every_value_is_described_and_has_a_form():
    assert set(descriptions()) == {path for path, _ in values()}


def test_the_page_of_the_chart_has_all_values():
    """VLLM_LB_BLESS=1 writes the table anew."""
    page = chart.CHART / "README.md"
    head, _, _ = page.read_text().partition("| value | default |")
    if os.environ.get("VLLM_LB_BLESS"):
        page.write_text(head + table())
    assert page.read_text() == head + table()


@pytest.mark.parametrize("change", ["config.expose=true", "upstreams={http://a:1}", "shutdown.drain=20s"])
def test_a_change_of_the_configuration_replaces_the_pods(change):
    def annotations(*arguments):
        return chart.pod(chart.render(*arguments))["metadata"]["annotations"]

    before = annotations()["checksum/config"]
    # The random token is another one each time.
    assert annotations()["checksum/config"] == before
    assert annotations("--set", change)["checksum/config"] != before
    assert not annotations("--set", f"{change},restartOnConfigChange=false")


def test_the_image_has_the_version_of_the_product():
    version = tomllib.loads((chart.ROOT / "Cargo.toml").read_text())["package"]["version"]
    described = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    assert (described["version"], described["appVersion"]) == (version, version)
    assert chart.container(chart.rendered("default"))["image"] == f"vllm-lb:{version}"
    tagged = chart.render("--set", "image.repository=r/i,image.tag=t")
    assert {chart.container(tagged)["image"]} == {"r/i:t"}
    assert "@sha256:" in chart.container(chart.rendered("everything"))["image"]


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ((), ["vllm-lb.serving:80/v1", "without a Redis", "no registry"], ["https"]),
        (("redis.url=redis://r",), ["vllm-lb.serving:80/v1"], ["without a Redis"]),
        (("replicaCount=1", "image.repository=r/i"), ["helm -n serving test"], ["NOTE"]),
        (("tls.existingSecret=t", "admin.existingSecret=other"), ["https://", "secret other"], []),
    ],
)
def test_the_notes_say_what_to_do(settings, said, unsaid, tmp_path):
    given = [word for setting in settings for word in ("--set", setting)]
    given += ["--show-only", "templates/notes.yaml"]
    code, out, errors = chart.template(*given, chart=with_notes(tmp_path))
    assert code == 0, errors
    assert [text for text in said if text not in out] == []
    assert [text for text in unsaid if text in out] == []


def with_notes(folder):
    """A copy of the chart in which the notes are an object, since `helm template` does not print them."""
    copy = shutil.copytree(chart.CHART, folder / "vllm-lb")
    notes = (copy / "templates/NOTES.txt").read_text()
    lines = notes.replace("\n", "\n    ")
    (copy / "templates/notes.yaml").write_text(
        f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: notes}}\ndata:\n  notes: |\n    {lines}\n"
    )
    return copy


# ---- files -------------------------------------------------------------------------------------


def test_every_template_makes_something_in_some_case():
    used = set()
    for case in chart.CASES:
        code, out, errors = chart.template(*chart.arguments_of(case))
        assert code == 0, errors
        used |= set(re.findall(r"^# Source: vllm-lb/(.*)$", out, re.MULTILINE))
    templates = {str(path.relative_to(chart.CHART)) for path in chart.CHART.glob("templates/**/*.yaml")}
    assert used == templates


def test_alerts_and_dashboard_are_those_of_the_compose_file():
    linked = {path.name: path.resolve() for path in (chart.CHART / "files").iterdir()}
    assert linked == {"alerts.yml": monitoring.RULES, "dashboard.json": monitoring.DASHBOARD}
    assert all(path.is_symlink() for path in (chart.CHART / "files").iterdir())


def test_every_file_of_the_chart_is_one_that_a_check_reads():
    files = {str(path.relative_to(chart.CHART)) for path in chart.CHART.rglob("*") if not path.is_dir()}
    known = {"Chart.yaml", ".helmignore", "README.md", "values.yaml", "values.schema.json"}
    known |= {"templates/_helpers.tpl", "templates/NOTES.txt", "files/alerts.yml", "files/dashboard.json"}
    known |= {str(path.relative_to(chart.CHART)) for path in chart.CASES.values() if path}
    known |= {str(path.relative_to(chart.CHART)) for path in chart.CHART.glob("templates/**/*.yaml")}
    assert files == known


def test_a_package_has_the_files_and_no_links(tmp_path):
    code, out, errors = chart.helm("package", chart.CHART, "--destination", tmp_path)
    assert code == 0, out + errors
    [package] = tmp_path.glob("vllm-lb-*.tgz")
    with tarfile.open(package) as archive:
        names = {member.name.removeprefix("vllm-lb/"): member for member in archive.getmembers()}
        assert not [name for name, member in names.items() if not member.isfile()]
        packed = archive.extractfile("vllm-lb/files/alerts.yml").read()
    assert packed == monitoring.RULES.read_bytes()
    assert not [name for name in names if name.startswith("ci/")]
    assert "values.schema.json" in names


def test_prometheus_accepts_the_alerts_of_a_release(tmp_path):
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump(chart.named(chart.rendered("everything"), "PrometheusRule")["spec"]))
    code, said = monitoring.run("promtool", "check", "rules", rules)
    assert code == 0, said


# ---- pages -------------------------------------------------------------------------------------


def value_files():
    """Blocks of the page on Kubernetes that are values of the chart."""
    blocks = documents.page("docs/kubernetes.md").blocks()
    return [block for block in blocks if block.chart]


def test_the_page_on_kubernetes_has_values():
    assert len(value_files()) > 2


@pytest.mark.parametrize("block", value_files(), ids=lambda block: f"line {block.line}")
def test_values_of_a_page_make_a_release_without_problems(block, tmp_path):
    file = tmp_path / "values.yaml"
    file.write_text(block.text)
    objects = chart.render("--values", file)
    assert [problem for check in chart.CHECKS for problem in check(objects)] == []


@pytest.mark.parametrize("case", ["default", "everything"])
def test_commands_of_the_page_name_objects_of_a_release(case):
    """`kubectl … service/NAME` and the like, for a release with the name of the page."""
    names = re.findall(r"\b(deployment|service)/([\w-]+)", documents.page("docs/kubernetes.md").text)
    assert names
    objects = chart.render(*chart.arguments_of(case), "--set", "fullnameOverride=vllm-lb")
    for kind, name in names:
        chart.named(objects, kind.capitalize(), name)


def test_a_reload_goes_to_every_balancer_of_the_release_with_its_token():
    text = documents.page("docs/kubernetes.md").text
    pods = re.search(r"^\$ PODS=(\S+)$", text, re.MULTILINE)[1]
    selector = dict(each.split("=") for each in pods.split(","))
    _, out, _ = chart.helm("template", "vllm-lb", chart.CHART)
    objects = chart.objects_of(out)
    assert chart.selects(selector, chart.pod(objects)["metadata"]["labels"])
    assert not chart.selects(selector, chart.named(objects, "Pod")["metadata"]["labels"])
    assert 0 < text.index("TOKEN=$(kubectl") < text.index("Bearer $TOKEN")
