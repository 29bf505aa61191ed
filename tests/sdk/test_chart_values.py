"""What single values of charts/vllm-lb make."""

import re

import pytest
import yaml

import chart

# User and groups of a pod.
OWNERS = dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), 65532)

SURGE = {"maxSurge": 1, "maxUnavailable": 0}
REPLACE = {"maxSurge": 0, "maxUnavailable": 1}


@pytest.mark.parametrize(
    ("settings", "strategy"),
    [
        ("antiAffinity=preferred", {"type": "RollingUpdate", "rollingUpdate": SURGE}),
        ("antiAffinity=required", {"type": "RollingUpdate", "rollingUpdate": REPLACE}),
        ("antiAffinity=required,strategy.type=Recreate", {"type": "Recreate"}),
        ("antiAffinity=required,affinity.a.b=c", {"type": "RollingUpdate", "rollingUpdate": SURGE}),
    ],
)
def test_pods_are_replaced_as_their_nodes_and_volumes_allow(settings, strategy):
    assert chart.named(chart.render("--set", settings), "Deployment")["spec"]["strategy"] == strategy


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ("{}", {}),
        ("{runAsUser: 1000680000}", {"runAsUser": 1000680000}),
        ("{runAsUser: null, runAsGroup: null, fsGroup: null}", dict.fromkeys(OWNERS)),
        ("{fsGroup: null, runAsX: null}", {"fsGroup": None}),
        ("{supplementalGroups: [5]}", {"supplementalGroups": [5]}),
    ],
)
def test_entries_of_the_security_context_are_replaced_and_removed(given, changed, tmp_path):
    values_file = tmp_path / "values.yaml"
    values_file.write_text(f"podSecurityContext: {given}\n")
    objects = chart.render("--values", values_file)
    usual = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}, **OWNERS}
    wanted = {key: value for key, value in {**usual, **changed}.items() if value is not None}
    for spec in (chart.pod(objects)["spec"], chart.named(objects, "Pod")["spec"]):
        assert spec["securityContext"] == wanted


def test_a_pod_has_time_to_store_its_traces_after_the_grace():
    text = (chart.ROOT / "src/app.rs").read_text()
    [longest] = re.findall(r"MAX_TRACES_STOP: Duration = Duration::from_secs\((\d+)\)", text)
    assert int(longest) < chart.SPARE_SECONDS


@pytest.mark.parametrize(("fewest", "most", "accepted"), [(5, 4, False), (4, 4, True), (1, 4, True)])
def test_the_fewest_servers_are_no_more_than_the_most(fewest, most, accepted):
    given = f"autoscaling.by=hpa,autoscaling.minReplicas={fewest},autoscaling.maxReplicas={most}"
    code, _, errors = chart.template("--set", given)
    assert (code == 0) is accepted
    assert accepted or "autoscaling.minReplicas: 5 is more than maxReplicas, 4" in errors


@pytest.mark.parametrize(
    ("limits", "threshold"),
    [
        ("{memory: 6Gi}", f"0.8 * {6 << 30}"),
        ("{memory: 1.5Gi}", f"0.8 * {3 << 29}"),
        ("{memory: 512Mi}", f"0.8 * {1 << 29}"),
        ("{memory: 6442450944}", f"0.8 * {6 << 30}"),
        ("{memory: 12G}", "0.8 * 12000000000"),
        ('{memory: "6e9"}', "8 * 1024 ^ 3"),
        ("{memory: null}", "8 * 1024 ^ 3"),
        ("null", "8 * 1024 ^ 3"),
    ],
)
def test_an_alert_on_memory_fires_below_the_limit(limits, threshold, tmp_path):
    values_file = tmp_path / "values.yaml"
    values_file.write_text(f"prometheusRule: {{enabled: true}}\nresources: {{limits: {limits}}}\n")
    rules = chart.named(chart.render("--values", values_file), "PrometheusRule")["spec"]["groups"]
    [alert] = [rule for group in rules for rule in group["rules"] if rule.get("alert") == "VllmLbMemory"]
    assert alert["expr"] == f'vllm_lb_resident_bytes{{job="serving/models-vllm-lb"}} > {threshold}'


def test_the_limit_of_memory_has_room_for_all_that_is_bounded():
    """By the bounds of conf/lb.yaml, and with the part from which the alert fires left for connections."""
    manual = (chart.ROOT / "conf/lb.yaml").read_text()
    settings = yaml.safe_load(manual)
    blocks, size = re.search(r"at most (\d+), where", manual.replace("\n#           ", " ")), 100
    assert f"of at most {size} bytes of memory each" in manual
    traces = re.search(r"key: +traces.memory\n(?:# .*\n)*?# default: +(\w+)", manual)
    bounds = [chart.in_bytes(settings["peek"]["memory"]), int(blocks[1]) * size, chart.in_bytes(traces[1])]
    limit = chart.container(chart.rendered("default"))["resources"]["limits"]["memory"]
    assert sum(bounds) < 0.8 * chart.in_bytes(limit)


# Names of a release, its namespace, and values: numbers, truths and dates of YAML, and names that are cut.
ODD_NAMES = (
    ("1234", "12", ""),
    ("1e3", "0x1f", ""),
    ("a.b", "true", "nameOverride=true"),
    ("2024-01-01", "null", "nameOverride=null"),
    ("vllm-lb", "1234", "fullnameOverride=true"),
    ("true", "12", "nameOverride=true,admin.existingSecret=12,redis.existingSecret=1e3,tls.existingSecret=0"),
    ("a", "b", "redis.existingSecret=r,redis.existingSecretKey=12,priorityClassName=true"),
    ("a", "b", "topologySpread={on}"),
    ("a", "b", "serviceAccount.name=12,admin.existingSecret=a,admin.existingSecretKey=no"),
    ("a" * 53, "b", ""),
    ("a" * 49 + "-abc", "b", ""),
    ("a" * 48 + "--ab", "b", ""),
    ("9" * 53, "b", ""),
    ("a" * 49 + ".abc", "b", ""),
    ("a", "b", f"nameOverride={'n' * 63}"),
)


@pytest.mark.parametrize(("release", "namespace", "settings"), ODD_NAMES, ids=lambda text: text[-12:])
@pytest.mark.parametrize("case", ["everything", "hpa"])
def test_odd_names_make_valid_objects(case, release, namespace, settings):
    # The name in a case would hide that of the release, and the URL of its Redis a Secret.
    given = ["--set-string", "fullnameOverride=,redis.url=", "--set-string", settings or "nameOverride="]
    given = [*chart.arguments_of(case), *given]
    code, out, errors = chart.helm("template", release, chart.CHART, "--namespace", namespace, *given)
    assert code == 0, errors
    objects = chart.objects_of(out)
    assert list(chart.invalid_objects(objects)) == []
    own = chart.named(objects, "Deployment")["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{,48}[a-z0-9])?", own)
    for each in objects:
        name = each["metadata"]["name"]
        # A Role has the limits of a file's path, all others those of a label.
        assert len(name) <= (253 if each["kind"].startswith("Role") else 63)
        assert each["kind"] != "Service" or re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", name)
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == release
    for text in strings_of(objects):
        assert isinstance(text, str)


def strings_of(node, key=""):
    """The values of keys that Kubernetes reads as texts, in all objects."""
    if isinstance(node, dict):
        for inner, value in node.items():
            texts = inner in ("labels", "annotations", "matchLabels")
            yield from value.values() if texts else strings_of(value, inner)
    elif isinstance(node, list):
        for value in node:
            yield from strings_of(value, key)
    elif key in ("name", "namespace", "key") or key.endswith(("Key", "Name")):
        yield node
