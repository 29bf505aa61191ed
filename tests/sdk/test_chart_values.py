"""What single values of charts/vllm-lb make."""

import re

import pytest

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
