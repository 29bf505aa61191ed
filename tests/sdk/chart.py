"""Renders charts/vllm-lb with helm, and looks for problems in what it makes.

A check is given all objects of a release and yields the problems that it finds.
"""

import base64
import functools
import json
import math
import pathlib
import re
import shutil
import subprocess

import kubernetes_validate
import promql_parser
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

import monitoring

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/vllm-lb"
RELEASE, NAMESPACE = "models", "serving"

# Value files of the chart's checks; the default is no file.
CASES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*.yaml"))}
CASES["default"] = None

# Kinds of others, with models of their definitions.
FOREIGN = {"ScaledObject": ScaledObject, "ServiceMonitor": ServiceMonitor, "PrometheusRule": PrometheusRule}

# Each file of schemas is megabytes, and is read for each object otherwise.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)

# What a pod has beyond the time that its balancer may take.
SPARE_SECONDS = 20

DURATION = {"": 1, "ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


# ---- helm --------------------------------------------------------------------------------------


class Strict(yaml.SafeLoader):
    """Reads YAML in which no key is given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


def helm(*arguments):
    """Runs helm; its code, what it prints, and its errors."""
    program = shutil.which("helm")
    assert program, "there is no helm: run ./dev setup"
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def template(*arguments, chart=CHART):
    """What helm says of a chart with these arguments, as with a value file."""
    return helm("template", RELEASE, chart, "--namespace", NAMESPACE, *arguments)


def objects_of(text):
    return [each for each in yaml.load_all(text, Loader=Strict) if each]  # noqa: S506


def render(*arguments, chart=CHART):
    """All objects of a release."""
    code, out, errors = template(*arguments, chart=chart)
    assert code == 0, errors
    return objects_of(out)


def arguments_of(case):
    return ["--values", CASES[case]] if CASES[case] else []


@functools.cache
def rendered(case):
    return render(*arguments_of(case))


# ---- objects -----------------------------------------------------------------------------------


def of_kind(objects, kind):
    return [each for each in objects if each["kind"] == kind]


def named(objects, kind, name=None):
    """The one object of a kind, with this name where there are several."""
    found = [each for each in of_kind(objects, kind) if name in (None, each["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects {kind} {name}"
    return found[0]


def pod(objects):
    return named(objects, "Deployment")["spec"]["template"]


def container(objects):
    [one] = pod(objects)["spec"]["containers"]
    return one


def config_text(objects):
    """The file lb.yaml."""
    return named(objects, "ConfigMap", named(objects, "Deployment")["metadata"]["name"])["data"]["lb.yaml"]


def config(objects):
    return yaml.load(config_text(objects), Loader=Strict)  # noqa: S506


def selects(selector, labels):
    return bool(selector) and selector.items() <= labels.items()


def service_of(objects, component):
    found = [
        each
        for each in of_kind(objects, "Service")
        if each["metadata"]["labels"]["app.kubernetes.io/component"] == component
    ]
    assert len(found) == 1, f"{len(found)} Services for {component}"
    return found[0]


def seconds(duration):
    number, unit = re.fullmatch(r"(\d+)([a-z]*)", str(duration)).groups()
    return int(number) * DURATION[unit]


# ---- checks ------------------------------------------------------------------------------------


def invalid_objects(objects, version="1.37"):
    """Objects that the API of Kubernetes, or the definition of a foreign kind, does not accept."""
    for each in objects:
        place = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] in FOREIGN:
            yield from (f"{place}: {problem}" for problem in foreign_problems(each))
            continue
        try:
            kubernetes_validate.validate(each, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{place}: {'.'.join(map(str, error.path))}: {error.message}"


def foreign_problems(each):
    """A model drops keys that it does not know, so it is compared with what it was made from."""
    try:
        model = FOREIGN[each["kind"]].model_validate(each)
    except ValueError as error:
        return [str(error)]
    kept = json.loads(model.model_dump_json(by_alias=True, exclude_unset=True))
    return list(lost(each, kept, ""))


def lost(given, kept, path):
    if isinstance(given, dict):
        for key, value in given.items():
            if key not in kept:
                yield f"{path}.{key}: unknown"
            else:
                yield from lost(value, kept[key], f"{path}.{key}")
    elif isinstance(given, list):
        for at, value in enumerate(given):
            yield from lost(value, kept[at], f"{path}[{at}]")


def wrong_selectors(objects):
    """Selectors that do not select what they are for, and that alone."""
    labels = pod(objects)["metadata"]["labels"]
    spec = pod(objects)["spec"]
    found = {"Deployment": named(objects, "Deployment")["spec"]["selector"]["matchLabels"]}
    for each in of_kind(objects, "Service"):
        found[f"Service {each['metadata']['name']}"] = each["spec"]["selector"]
    for each in of_kind(objects, "PodDisruptionBudget"):
        found["PodDisruptionBudget"] = each["spec"]["selector"]["matchLabels"]
    for each in of_kind(objects, "NetworkPolicy"):
        found["NetworkPolicy"] = each["spec"]["podSelector"]["matchLabels"]
    for each in spec.get("topologySpreadConstraints", []):
        found[f"spread over {each['topologyKey']}"] = each["labelSelector"]["matchLabels"]
    for each in anti_affinity(spec):
        found["anti-affinity"] = each["labelSelector"]["matchLabels"]
    others = [each["metadata"]["labels"] for each in of_kind(objects, "Pod")]
    for place, selector in found.items():
        if not selects(selector, labels):
            yield f"{place}: {selector} does not select the balancers"
        if any(selects(selector, other) for other in others):
            yield f"{place}: {selector} selects the pod of helm test too"
        if RELEASE not in selector.values():
            yield f"{place}: {selector} selects the pods of other releases"


def anti_affinity(spec):
    rules = spec.get("affinity", {}).get("podAntiAffinity", {})
    yield from rules.get("requiredDuringSchedulingIgnoredDuringExecution", [])
    for each in rules.get("preferredDuringSchedulingIgnoredDuringExecution", []):
        yield each["podAffinityTerm"]


def wrong_monitors(objects):
    """A ServiceMonitor has to select the Service of the admin listener alone, by the name of its port."""
    for monitor in of_kind(objects, "ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        services = of_kind(objects, "Service")
        services = [each for each in services if selects(selector, each["metadata"]["labels"])]
        if services != [service_of(objects, "admin")]:
            yield f"selects {[each['metadata']['name'] for each in services]}"
        ports = [port["name"] for each in services for port in each["spec"]["ports"]]
        # Without the namespace, two releases of one name are one fleet for the alerts.
        if job_of(objects) != (job := expected_job(objects)):
            yield f"the job {job_of(objects)} in place of {job}"
        for endpoint in monitor["spec"]["endpoints"]:
            if endpoint["port"] not in ports:
                yield f"there is no port {endpoint['port']}"
            if endpoint["path"] != "/metrics":
                yield f"there are no metrics at {endpoint['path']}"


def wrong_ports(objects):
    """The ports of the configuration, of the container, and of all that names them."""
    one, settings = container(objects), config(objects)
    numbers = {port["name"]: port["containerPort"] for port in one["ports"]}
    [listen] = settings["listen"]
    served = {"http": listen["address"], "admin": settings["admin"]["address"]}
    for name, address in served.items():
        if not address.endswith(f":{numbers.get(name)}"):
            yield f"{name}: the container has {numbers.get(name)}, the configuration {address}"
    targets = {"clients": "http", "admin": "admin"}
    for component, name in targets.items():
        [port] = service_of(objects, component)["spec"]["ports"]
        if port["targetPort"] != name:
            yield f"the Service for {component} leads to {port['targetPort']}"
    for probe in ("livenessProbe", "readinessProbe"):
        if one[probe]["httpGet"]["port"] != "admin":
            yield f"{probe} asks {one[probe]['httpGet']['port']}"
    for policy in of_kind(objects, "NetworkPolicy"):
        rules = {rule["ports"][0]["port"]: rule.get("from", []) for rule in policy["spec"]["ingress"]}
        if rules.keys() != numbers.keys():
            yield f"NetworkPolicy: ports {sorted(rules)}"
        # Without peers, a rule is for all of them.
        allowed = [peer["podSelector"]["matchLabels"] for peer in rules["admin"] if "podSelector" in peer]
        for tested in of_kind(objects, "Pod"):
            if not any(selects(selector, tested["metadata"]["labels"]) for selector in allowed):
                yield f"NetworkPolicy: the admin port for {rules['admin']}"


def public_admin_listeners(objects):
    """The admin listener is reached from inside of the cluster only, and asks for a token."""
    service = service_of(objects, "admin")
    if service["spec"]["type"] != "ClusterIP" or service["metadata"].get("annotations"):
        yield f"the Service of the admin listener is {service['spec']}"
    if config(objects)["admin"].get("token") != "${VLLM_LB_ADMIN_TOKEN}":
        yield "the admin listener has no token"
    for pods in [container(objects), *(each["spec"]["containers"][0] for each in of_kind(objects, "Pod"))]:
        tokens = [each for each in pods["env"] if each["name"] == "VLLM_LB_ADMIN_TOKEN"]
        if [list(each.get("valueFrom", {})) for each in tokens] != [["secretKeyRef"]]:
            yield f"the token comes from {tokens}"
    [port] = service_of(objects, "clients")["spec"]["ports"]
    if port["targetPort"] == "admin":
        yield "clients reach the admin listener"


def wrong_grace_periods(objects):
    """A pod has the time that the balancer may take, and SPARE_SECONDS for the process to end."""
    spec, shutdown = pod(objects)["spec"], config(objects)["shutdown"]
    hook = container(objects).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    needed = hook + math.ceil(seconds(shutdown["drain"])) + math.ceil(seconds(shutdown["grace"]))
    given = spec["terminationGracePeriodSeconds"]
    if given != needed + SPARE_SECONDS:
        yield f"{given} s for {needed} s"


def late_readiness(objects):
    """The endpoints have to be told within `shutdown.drain`, where there is one."""
    probe = container(objects)["readinessProbe"]
    noticed = probe["periodSeconds"] * probe["failureThreshold"]
    drain = seconds(config(objects)["shutdown"]["drain"])
    if drain > 5 and noticed >= drain:
        yield f"readiness fails after {noticed} s of {drain} s"


def loose_pods(objects):
    """Pods that may do more than a balancer needs."""
    for spec in [pod(objects)["spec"], *(each["spec"] for each in of_kind(objects, "Pod"))]:
        [one] = spec["containers"]
        of_pod, own = spec["securityContext"], one["securityContext"]
        wanted = (
            (of_pod.get("runAsNonRoot"), True),
            (of_pod.get("runAsUser", 0) > 0 or chosen_by_the_cluster(of_pod), True),
            (of_pod.get("seccompProfile"), {"type": "RuntimeDefault"}),
            (own.get("allowPrivilegeEscalation"), False),
            (own.get("readOnlyRootFilesystem"), True),
            (own.get("capabilities"), {"drop": ["ALL"]}),
            (own.get("privileged", False), False),
            (any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), False),
            (any("hostPath" in volume for volume in spec.get("volumes", [])), False),
        )
        for got, expected in wanted:
            if got != expected:
                yield f"{one['name']}: {got} in place of {expected}"


def chosen_by_the_cluster(context):
    """Whether user and groups are those of the namespace, as OpenShift sets them."""
    return not {"runAsUser", "runAsGroup", "fsGroup"} & context.keys()


def misplaced_tests(objects):
    """The pod of helm test gets its image as the balancers do, and runs on nodes where they may run."""
    def placed(spec):
        nodes = spec.get("affinity", {}).get("nodeAffinity")
        return [nodes, *map(spec.get, ("nodeSelector", "tolerations", "imagePullSecrets"))]

    wanted = placed(pod(objects)["spec"])
    for each in of_kind(objects, "Pod"):
        if placed(each["spec"]) != wanted:
            yield f"{placed(each['spec'])} in place of {wanted}"


def stuck_rollouts(objects):
    """A rollout that has to start a pod before it ends one, where the new one may find no node."""
    deployment = named(objects, "Deployment")["spec"]
    rules = deployment["template"]["spec"].get("affinity", {}).get("podAntiAffinity", {})
    update = deployment["strategy"].get("rollingUpdate")
    required = "requiredDuringSchedulingIgnoredDuringExecution" in rules
    wanted = {"maxSurge": 0, "maxUnavailable": 1} if required else {"maxSurge": 1, "maxUnavailable": 0}
    if deployment["strategy"]["type"] == "RollingUpdate" and update != wanted:
        yield f"pods are replaced with {update}"


def dangling_names(objects):
    """Mounts without a volume, and objects of the release that something names and that are not there."""
    spec, one = pod(objects)["spec"], container(objects)
    volumes = {volume["name"] for volume in spec["volumes"]}
    mounts = {mount["name"] for mount in one["volumeMounts"]}
    if volumes != mounts:
        yield f"volumes {sorted(volumes)}, mounts {sorted(mounts)}"
    folders = {mount["mountPath"] for mount in one["volumeMounts"]}
    file = one["args"][one["args"].index("--config") + 1]
    if str(pathlib.PurePath(file).parent) not in folders or not file.endswith("/lb.yaml"):
        yield f"{file} is not mounted"
    own = named(objects, "Deployment")["metadata"]["name"]
    made = {(each["kind"], each["metadata"]["name"]) for each in objects}
    used = [("ConfigMap", volume["configMap"]["name"]) for volume in spec["volumes"] if "configMap" in volume]
    used += [("Secret", ref["name"]) for ref in secret_refs(one) if ref["name"].startswith(own)]
    if spec["serviceAccountName"].startswith(own):
        used += [("ServiceAccount", spec["serviceAccountName"])]
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            used += [("Service", metric["object"]["describedObject"]["name"])]
    yield from (f"there is no {name}" for name in used if name not in made)


def secret_refs(one):
    return [each["valueFrom"]["secretKeyRef"] for each in one["env"] if "valueFrom" in each]


def wrong_rights(objects):
    """Roles that are not exactly what the discovery needs, where it needs it."""
    watched = set()
    for item in config(objects)["upstreams"]:
        service = item.get("kubernetes") if isinstance(item, dict) else None
        # A kubeconfig brings rights of its own, perhaps in another cluster.
        if service and "kubeconfig" not in service:
            watched.add(service["namespace"])
    spec = pod(objects)["spec"]
    if spec["automountServiceAccountToken"] != bool(watched):
        yield f"the token of the account is mounted: {spec['automountServiceAccountToken']}"
    if {each["metadata"]["namespace"] for each in of_kind(objects, "Role")} != watched:
        yield f"the Roles are not in {sorted(watched)}"
    if of_kind(objects, "ClusterRole") or of_kind(objects, "ClusterRoleBinding"):
        yield "there are rights over the whole cluster"
    groups, verbs = ["discovery.k8s.io"], ["get", "list", "watch"]
    rule = {"apiGroups": groups, "resources": ["endpointslices"], "verbs": verbs}
    for role in of_kind(objects, "Role"):
        if role["rules"] != [rule]:
            yield f"the rules are {role['rules']}"
    subject = {"kind": "ServiceAccount", "name": spec["serviceAccountName"], "namespace": NAMESPACE}
    bound = []
    for each in of_kind(objects, "RoleBinding"):
        bound.append((each["metadata"]["namespace"], each["roleRef"]["kind"], each["roleRef"]["name"]))
        if each["subjects"] != [subject]:
            yield f"bound to {each['subjects']}"
    roles = [each["metadata"] for each in of_kind(objects, "Role")]
    roles = [(each["namespace"], "Role", each["name"]) for each in roles]
    if sorted(bound) != sorted(roles):
        yield f"Roles {roles}, bound {bound}"


def expected_job(objects):
    return f"{NAMESPACE}/{named(objects, 'Deployment')['metadata']['name']}"


def job_of(objects):
    """The name of the job that a ServiceMonitor makes."""
    [endpoint] = named(objects, "ServiceMonitor")["spec"]["endpoints"]
    [job] = [each["replacement"] for each in endpoint["relabelings"] if each["targetLabel"] == "job"]
    return job


def thresholds(objects):
    """Expressions of alerts on memory, and those of a release: about its own balancers and their limits."""
    job = f'{{job="{job_of(objects)}"}}'
    bodies = in_bytes(config(objects).get("peek", {}).get("memory", "2GiB"))
    limit = container(objects)["resources"].get("limits", {}).get("memory")
    memory = f"0.8 * {in_bytes(limit)}" if limit else "8 * 1024 ^ 3"
    return {
        "vllm_lb_peeked_bytes > 1.6 * 1024 ^ 3": f"vllm_lb_peeked_bytes{job} > 0.8 * {bodies}",
        "vllm_lb_resident_bytes > 8 * 1024 ^ 3": f"vllm_lb_resident_bytes{job} > {memory}",
    }


def in_bytes(size):
    number, unit, binary = re.fullmatch(r"([\d.]+)([kKMGT]?)(i?)B?", str(size)).groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def other_alerts(objects):
    """The alerts are those of docker/prometheus, but for the name of the job and two thresholds."""
    for rule in of_kind(objects, "PrometheusRule"):
        text = monitoring.RULES.read_text().replace('job="vllm-lb"', f'job="{job_of(objects)}"')
        for usual, own in thresholds(objects).items():
            assert usual in text
            text = text.replace(usual, own)
        if rule["spec"] != yaml.safe_load(text):
            yield "the alerts are not those of docker/prometheus/alerts.yml"
        jobs = set(re.findall(r'job="([^"]*)"', json.dumps(rule["spec"]).replace('\\"', '"')))
        if jobs != {job_of(objects)}:
            yield f"the alerts are about the jobs {sorted(jobs)}"


def other_dashboards(objects):
    for each in of_kind(objects, "ConfigMap"):
        for name, text in each["data"].items():
            if name.endswith(".json") and json.loads(text) != monitoring.dashboard():
                yield f"{name} is not the dashboard of docker/grafana"
            if len(text) > 1_000_000:
                yield f"{name} is too large for a ConfigMap"


def wrong_scaling(objects):
    """Metrics that are no gauges of the balancers, and labels that their series do not have."""
    gauges = {name for name, metric in monitoring.documented().items() if metric.kind == "gauge"}
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            if metric["object"]["metric"]["name"] not in gauges:
                yield f"{metric['object']['metric']['name']}: there is no such gauge"
    deployment = named(objects, "Deployment")["metadata"]["name"]
    for scaler in of_kind(objects, "ScaledObject"):
        for trigger in scaler["spec"]["triggers"]:
            parsed = promql_parser.parse(trigger["metadata"]["query"])
            if not isinstance(parsed, promql_parser.AggregateExpr) or parsed.modifier:
                yield f"{trigger['name']}: more than one value"
            for selector, _ in monitoring.selectors(parsed):
                if selector.name not in gauges:
                    yield f"{selector.name}: there is no such gauge"
                if monitoring.matched(selector) != {"job": expected_job(objects), "namespace": NAMESPACE}:
                    yield f"{trigger['name']}: of {monitoring.matched(selector)}"
    targets = of_kind(objects, "ScaledObject") + of_kind(objects, "HorizontalPodAutoscaler")
    if any(each["spec"]["scaleTargetRef"]["name"] == deployment for each in targets):
        yield "scales the balancers in place of the servers"


def weak_tokens(objects):
    for secret in of_kind(objects, "Secret"):
        token = base64.b64decode(secret["data"]["token"]).decode()
        if len(set(token)) < 15 or len(token) < 32:
            yield f"a token of {len(token)} characters"


CHECKS = (
    invalid_objects, wrong_selectors, wrong_monitors, wrong_ports, public_admin_listeners,
    wrong_grace_periods, late_readiness, loose_pods, misplaced_tests, stuck_rollouts, dangling_names,
    wrong_rights, other_alerts, other_dashboards, wrong_scaling, weak_tokens,
)
