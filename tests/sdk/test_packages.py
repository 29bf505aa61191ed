"""The files with which operators deploy are sound: Dockerfile, compose files, nginx, systemd, examples.

Each file under docker/ and conf/ is named below with the test that fails when the file is broken. A tool that
is missing fails its test. test_compose.py runs the compose file, and test_unit.py the unit.
"""

import functools
import os
import re
import shutil
import sys
import tomllib

import pytest
import yaml

import compose
import dockerfile
import documents
import harness

ROOT = documents.ROOT
DOCKERFILE = ROOT / "docker/Dockerfile"
IGNORED = ROOT / "docker/Dockerfile.dockerignore"
DEPLOYING = documents.page("docs/deploying.md")

SDK, RUST = "tests/sdk", "tests/it"
# Each file with the test that holds it. Where a line ends with /, the test is for all files below.
CHECKS = {
    "conf/lb.yaml": (f"{RUST}/config/corpus.rs", "the_manual_as_shipped_starts"),
    "conf/vllm-lb.service": (f"{SDK}/test_unit.py", "test_systemd_finds_no_problem"),
    "conf/examples/": (f"{RUST}/config/corpus.rs", "the_shipped_examples_are_valid"),
    "conf/debian/": (f"{SDK}/test_debian.py", "test_the_scripts_are_sound"),
    "docker/Dockerfile": (f"{SDK}/test_packages.py", "test_hadolint_finds_no_problem"),
    "docker/Dockerfile.dockerignore": (
        f"{SDK}/test_packages.py", "test_what_the_build_needs_reaches_it",
    ),
    "docker/compose.yaml": (f"{SDK}/test_compose.py", "test_the_openai_sdk_gets_answers"),
    "docker/compose.vllm.yaml": (f"{SDK}/test_packages.py", "test_compose_reads_the_files"),
    "docker/keys.map": (f"{SDK}/test_compose.py", "test_a_call_without_a_known_key_is_401"),
    "docker/lb.yaml": (f"{SDK}/test_compose.py", "test_the_admin_api_needs_the_token"),
    "docker/nginx.conf": (
        f"{SDK}/test_compose.py", "test_a_client_beyond_its_rate_gets_429_and_others_go_on",
    ),
    "docker/prometheus/prometheus.yml": (f"{SDK}/test_compose.py", "test_prometheus_reads_both_balancers"),
    "docker/prometheus/alerts.yml": (f"{SDK}/test_prometheus.py", "test_every_rule_can_be_evaluated"),
    "docker/prometheus/alerts_test.yml": (
        f"{SDK}/test_monitoring.py", "test_the_rules_fire_as_their_tests_expect",
    ),
    "docker/grafana/vllm-lb.json": (f"{SDK}/test_prometheus.py", "test_a_panel_has_data"),
    "docker/grafana/provisioning/": (
        f"{SDK}/test_monitoring.py", "test_grafana_finds_prometheus_and_the_dashboard",
    ),
}


# ---- every file has a check --------------------------------------------------------------------


def unchecked(files, checks):
    """Files without a check, and checks without a file."""
    for file in files:
        if not any(file == name or (name.endswith("/") and file.startswith(name)) for name in checks):
            yield f"{file}: has no check: add one to CHECKS"
    for name in checks:
        if not any(file == name or (name.endswith("/") and file.startswith(name)) for file in files):
            yield f"{name}: has a check, and is not there"


def deployed():
    folders = [path for folder in ("docker", "conf") for path in (ROOT / folder).rglob("*")]
    return sorted(str(path.relative_to(ROOT)) for path in folders if path.is_file())


def test_every_file_has_a_check():
    assert list(unchecked(deployed(), CHECKS)) == []
    assert len(list(unchecked(["docker/new.yaml", "conf/lb.yaml"], {"conf/lb.yaml": 0, "conf/x/": 0}))) == 2


@pytest.mark.parametrize("name", CHECKS)
def test_the_check_of_a_file_is_there(name):
    file, test = CHECKS[name]
    assert re.search(rf"^(?:async )?(?:def|fn) {test}\(", (ROOT / file).read_text(), re.MULTILINE), test


# ---- Dockerfile --------------------------------------------------------------------------------


def hadolint(text):
    """What hadolint says of a Dockerfile; it comes with the other packages of the tests."""
    program = os.path.join(os.path.dirname(sys.executable), "hadolint")
    assert os.access(program, os.X_OK), f"{program} is missing: ./dev setup installs it"
    return compose.run([program, "--failure-threshold", "style", "-"], input=text)


def test_hadolint_finds_no_problem():
    assert hadolint(DOCKERFILE.read_text()) == (0, "")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("FROM debian:bookworm-slim", "FROM debian:latest"),
        ("--no-install-recommends ", ""),
        ('ENTRYPOINT ["vllm-lb"]', "ENTRYPOINT vllm-lb"),
        ("# hadolint ignore=DL3008", "#"),
    ],
)
def test_hadolint_finds_a_mistake(theirs, ours):
    text = DOCKERFILE.read_text()
    assert theirs in text
    assert hadolint(text.replace(theirs, ours))[0] != 0


@functools.cache
def image():
    """The stages of the image: the one that builds, and the one that runs."""
    build, final = dockerfile.stages(DOCKERFILE.read_text())
    return build, final


def test_the_image_runs_without_rights():
    final = image()[1]
    user, group = final.last("USER").value.split(":")
    # Kubernetes' runAsNonRoot needs numbers; the last USER counts.
    assert int(user) > 999 and int(group) > 999
    state = next(run for run in final.all("RUN") if "/var/lib/vllm-lb" in run.value)
    assert f"--owner={user} --group={group} --mode=0700" in state.value
    assert final.last("ENV").value == "STATE_DIRECTORY=/var/lib/vllm-lb"
    assert final.instructions.index(state) < final.instructions.index(final.last("USER"))


def test_the_image_starts_stops_and_checks_itself_with_the_binary():
    build, final = image()
    assert final.last("ENTRYPOINT").words == ["vllm-lb"] and final.last("STOPSIGNAL").value == "SIGTERM"
    kind, _, check = final.last("HEALTHCHECK").value.partition(" ")
    command = dockerfile.Instruction("CMD", {}, check).words
    assert kind == "CMD" and command[0] == "vllm-lb"
    # The command is understood: nothing listens there, so that it reports that, and no usage.
    [free] = harness.free_ports(1)
    code, said = compose.run([harness.binary(), *(word.replace("9090", str(free)) for word in command[1:])])
    assert code == 1 and f"127.0.0.1:{free}/live" in said
    copied = next(copy for copy in final.all("COPY") if copy.value.endswith(" /usr/local/bin/vllm-lb"))
    assert copied.flags["from"] == [build.name]
    [made] = [run.value for run in build.all("RUN") if "cargo build" in run.value]
    assert copied.value.split()[0] in made


def test_the_ports_of_the_image_are_the_defaults():
    keys = yaml.safe_load((ROOT / "conf/lb.yaml").read_text())
    [listen] = keys["listen"]
    addresses = [listen["address"], keys["admin"]["address"]]
    assert image()[1].last("EXPOSE").value.split() == [address.rsplit(":", 1)[1] for address in addresses]


def test_the_base_images_are_pinned_and_fit_together():
    build, final = image()
    rust, release = re.fullmatch(r"rust:(\d+\.\d+)-(\w+)", build.base).groups()
    # A binary of a later release needs a later C library.
    assert final.base == f"debian:{release}-slim"
    needed = re.search(r'^rust-version = "([\d.]+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    assert [int(part) for part in rust.split(".")] >= [int(part) for part in needed.split(".")]


def test_what_the_build_needs_reaches_it():
    ignored, copied = IGNORED.read_text(), set()
    for copy in image()[0].all("COPY"):
        *sources, _ = copy.value.split()
        copied |= set(sources)
        for source in sources:
            assert dockerfile.context(ignored, ROOT, source), source
    # jemalloc is configured in .cargo, and the features are those of Cargo.toml.
    assert copied >= {"Cargo.toml", "Cargo.lock", ".cargo", "src"}
    unneeded = ("target/debug/vllm-lb", ".dev/venv", "docs/design.md", "benches/results/siblings.md")
    assert [path for path in unneeded if dockerfile.is_sent(ignored, path)] == []
    # What the sources include lies within them.
    for path in (ROOT / "src").rglob("*.rs"):
        if path.name == "tests.rs":
            continue
        product = path.read_text().partition("#[cfg(test)]")[0]
        for included in re.findall(r'include_(?:str|bytes)!\(\s*"([^"]+)"', product):
            assert (path.parent / included).resolve().is_relative_to(ROOT / "src"), f"{path}: {included}"


def plan(folder, sources, *command):
    """What cargo would build in a folder with these sources alone; nothing is compiled."""
    ignored = IGNORED.read_text()
    for source in sources:
        for name in dockerfile.context(ignored, ROOT, source):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    command = command or ("cargo", "build", "--release", "--locked", "--offline", "--bin", "vllm-lb")
    # The plan is an unstable option, with which a stable cargo has to be asked.
    unstable = ["--unit-graph", "-Z", "unstable-options"]
    return compose.run(
        [compose.tool(command[0]), *command[1:], *unstable], cwd=folder,
        env={**os.environ, "RUSTC_BOOTSTRAP": "1"},
    )


def test_cargo_has_all_that_it_needs(tmp_path):
    copied = [copy.value.split()[:-1] for copy in image()[0].all("COPY")]
    sources = [source for each in copied for source in each]
    [run] = [one.value for one in image()[0].all("RUN") if "cargo build" in one.value]
    assert "cargo build --release --locked --bin vllm-lb " in run
    (tmp_path / "all").mkdir()
    code, said = plan(tmp_path / "all", sources)
    assert code == 0, said
    for number, source in enumerate(sources):
        # All but the settings of jemalloc and what prints the licences are missed.
        if not source.startswith((".cargo", ".ci/")):
            folder = tmp_path / str(number)
            folder.mkdir()
            assert plan(folder, [one for one in sources if one != source])[0] != 0, source


def test_the_image_has_the_licences_of_what_is_in_it(tmp_path):
    """The builder prints them of what reaches it, and they are those of a release."""
    build, final = image()
    [run] = [one for one in build.all("RUN") if ".ci/notices.py" in one.value]
    # The crates that the build has downloaded.
    assert "target=/usr/local/cargo/registry" in run.flags["mount"][0]
    command, _, made = run.value.partition(" >")
    for source in (source for copy in build.all("COPY") for source in copy.value.split()[:-1]):
        for name in dockerfile.context(IGNORED.read_text(), ROOT, source):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    values = {**os.environ, "FEATURES": ""}
    code, said = compose.run(["sh", "-euc", command], cwd=tmp_path, env=values)
    assert code == 0, said
    assert said == compose.run([ROOT / "dev", "notices"])[1] and "jemalloc/COPYING" in said
    placed = {copy.value for copy in final.all("COPY") if "/usr/share/doc/" in copy.value}
    assert placed == {
        "LICENSE /usr/share/doc/vllm-lb/",
        f"{made} /usr/share/doc/vllm-lb/THIRD-PARTY-NOTICES",
    }
    assert dockerfile.context(IGNORED.read_text(), ROOT, "LICENSE") == ["LICENSE"]
    # The script needs Python in the stage, whatever the base image has.
    assert any(" python3 " in one.value for one in build.all("RUN") if "apt-get install" in one.value)


def test_the_profiled_build_of_the_image_has_all_that_it_needs(tmp_path):
    """With PROFILED the builder runs benches/pgo.sh, which starts programs and reads files of benches."""
    script = (ROOT / "benches/pgo.sh").read_text()
    [run] = [one.value for one in image()[0].all("RUN") if "cargo build" in one.value]
    assert "$(benches/pgo.sh " in run
    sources = [source for copy in image()[0].all("COPY") for source in copy.value.split()[:-1]]
    example = re.search(r"^cargo build --locked --example (\w+)", script, re.MULTILINE)[1]
    code, said = plan(tmp_path, sources, "cargo", "build", "--locked", "--offline", "--example", example)
    assert code == 0, said
    named = {"benches/pgo.sh", *re.findall(r"benches/proxies/[\w-]+\.\w+", script)}
    assert "benches/proxies/routes.yaml" in named
    assert [name for name in sorted(named) if not (tmp_path / name).is_file()] == []
    assert os.access(ROOT / "benches/pgo.sh", os.X_OK)
    # Where the traffic's modules lie.
    assert {path.name for path in (ROOT / "benches/proxies").glob("*.rs")} == {
        path.name for path in (tmp_path / "benches/proxies").glob("*.rs")
    }


def test_the_image_has_the_features_of_a_release():
    """An argument of the build adds features of the crate to the default ones."""
    default = next(arg for arg in image()[0].all("ARG") if arg.value.startswith("FEATURES="))
    features = tomllib.loads((ROOT / "Cargo.toml").read_text())["features"]
    named = {name for name in default.value.partition("=")[2].strip('"').split(",") if name}
    assert named <= features.keys()
    [build] = [run.value for run in image()[0].all("RUN") if "cargo build" in run.value]
    assert '--features "$FEATURES"' in build and "--no-default-features" not in build
    # Discovery through Kubernetes, and memory that is given back.
    assert {"jemalloc", "kubernetes"} <= named | set(features["default"])


# ---- compose files -----------------------------------------------------------------------------

SETUPS = {
    "simulated": ((compose.COMPOSE,), {}),
    "vllm": (
        (compose.COMPOSE, compose.COMPOSE_VLLM),
        {"REDIS_PASSWORD": "x", "API_KEYS": str(ROOT / "docker/keys.map")},
    ),
}
setups = pytest.mark.parametrize("setup", SETUPS)


def services(setup):
    files, variables = SETUPS[setup]
    return compose.services(*files, **variables)


@setups
def test_compose_reads_the_files(setup):
    found = services(setup)
    assert {"nginx", "balancer-1", "balancer-2", "redis", "prometheus", "grafana"} <= set(found)
    assert [name for name in found if name.startswith("engine-")] >= ["engine-1", "engine-2"]


@pytest.mark.parametrize("name", SETUPS["vllm"][1])
def test_a_fleet_with_vllm_needs_its_secrets(name):
    files, variables = SETUPS["vllm"]
    code, said = compose.config(*files, **{key: value for key, value in variables.items() if key != name})
    assert code != 0 and name in said


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("restart: unless-stopped", "restarts: often"), ("services:\n", "services:\n  balancer-1: *nothing\n")],
)
def test_compose_finds_a_mistake(theirs, ours, tmp_path):
    text = compose.COMPOSE.read_text()
    assert theirs in text
    (tmp_path / "compose.yaml").write_text(text.replace(theirs, ours, 1))
    assert compose.config(tmp_path / "compose.yaml")[0] != 0


@setups
def test_every_mount_is_there(setup):
    mounts = [
        (service.name, source)
        for service in services(setup).values()
        for _, source in service.mounts()
        if service.kind != "engine"
    ]
    assert len(mounts) > 5
    assert [(name, str(source)) for name, source in mounts if not source.exists()] == []


@setups
def test_the_commands_of_the_balancers_are_understood(setup):
    for service in services(setup).values():
        if service.kind == "balancer":
            files = {target: str(source) for target, source in service.mounts()}
            # The words behind the name of the script are those of the binary.
            command = service.command[service.command.index("vllm-lb") + 1:]
            command = [files.get(word, word) for word in command]
            values = {**os.environ, **service.environment, "VLLM_LB_ADMIN_TOKEN": "x"}
            code, said = compose.run([harness.binary(), *command, "--test"], env=values)
            assert (code, said) == (0, "configuration ok\n"), service.name


@setups
def test_the_upstreams_of_the_balancers_are_services(setup):
    found = services(setup)
    for service in found.values():
        if service.kind == "balancer":
            upstreams = [word for word in service.command if word.startswith("http://")]
            names = [re.fullmatch(r"http://([\w-]+):8000", upstream)[1] for upstream in upstreams]
            active = [name for name in found if name.startswith("engine-") and not profiles(found[name])]
            assert names == active


def profiles(service):
    return service.settings.get("profiles", [])


@setups
def test_only_this_machine_reaches_the_ports(setup):
    published = [address for service in services(setup).values() for address in service.published()]
    assert len(published) == 3
    assert [address for address in published if not address.startswith("127.0.0.1:")] == []


@setups
def test_images_have_versions(setup):
    for service in services(setup).values():
        image = service.settings["image"]
        assert image == "vllm-lb" or re.search(r":v?\d+\.\d+", image), image


@setups
def test_the_user_of_redis_has_the_rights_that_the_page_gives(setup):
    [line] = [
        command for _, command in documents.page("docs/operating.md").commands() if "ACL SETUSER" in command
    ]
    documented = line.split("on '>secret' ")[1].replace("'", "").split()
    page = documents.page("docs/fleet-on-one-machine.md").text.replace("\\\n", " ")
    [by_hand] = re.findall(r"--user vllm-lb on '>secret' (.*) &$", page, re.MULTILINE)
    assert by_hand.replace("'", "").split() == documented
    command = services(setup)["redis"].command
    assert command[-len(documented):] == documented
    assert ["--user", "default", "off", "--user", "vllm-lb", "on"] == command[-len(documented) - 7:][:6]


def stop_seconds(service):
    """The time that Compose gives a container between its signal and SIGKILL."""
    minutes, seconds = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", service.settings["stop_grace_period"]).groups()
    return int(minutes or 0) * 60 + int(seconds or 0)


@setups
def test_requests_in_flight_may_finish(setup):
    """A balancer needs shutdown.drain, shutdown.grace and, for the last records of traces, 10 s more."""
    own = yaml.safe_load((ROOT / "docker/lb.yaml").read_text())
    assert "shutdown" not in own
    keys = yaml.safe_load((ROOT / "conf/lb.yaml").read_text())["shutdown"]
    assert keys == {"grace": "3m", "drain": 0}
    found = services(setup).values()
    longest = max(stop_seconds(service) for service in found if service.kind == "balancer")
    for service in found:
        if service.kind == "balancer":
            assert stop_seconds(service) > 180 + 10, service.name
        if service.kind == "nginx":
            assert stop_seconds(service) >= longest, service.name
        if service.kind == "engine":
            # Docker's own 10 s are not a choice.
            assert stop_seconds(service) > 10, service.name


def stops_before(found):
    """For each service those that Compose has stopped before it: all that depend on it, directly or not."""
    before = {name: set() for name in found}
    for _ in found:
        for name, service in found.items():
            for needed in service.settings.get("depends_on", ()):
                before[needed] |= {name} | before[name]
    return before


@setups
def test_a_stop_ends_nginx_then_the_balancers_then_the_engines(setup):
    before = stops_before(services(setup))
    balancers = {"balancer-1", "balancer-2"}
    assert {name: before[name] for name in balancers} == {name: {"nginx"} for name in balancers}
    # engine-3 has a profile in the file for vLLM, and docker-compose has no optional dependencies.
    for name in ("engine-1", "engine-2", "redis"):
        assert before[name] == {"nginx"} | balancers, name


def test_vllm_gets_flags_that_the_page_recommends_and_a_gpu_each():
    found, page = services("vllm"), (ROOT / "docs/getting-started.md").read_text()
    engines = [service for service in found.values() if service.kind == "engine" and not profiles(service)]
    devices = []
    for service in engines:
        for flag in ("--enable-prompt-tokens-details", "--enable-prefix-caching"):
            assert flag in service.command and flag in page
        # The image starts `vllm serve`, which takes the model as its first argument and refuses --model.
        assert service.command[0] == "Qwen/Qwen3-8B" and "--model" not in service.command
        # By default vLLM aborts requests in flight on SIGTERM; it gets the time that it may take for them.
        drain = int(service.command[service.command.index("--shutdown-timeout") + 1])
        assert drain >= 180 and stop_seconds(service) > drain
        assert "VLLM_ENABLE_RESPONSES_API_STORE" in service.environment
        [device] = service.settings["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and [["gpu"]] == [device["capabilities"]]
        devices += device["device_ids"]
    assert len(set(devices)) == len(engines) == 2


# ---- what pages say ----------------------------------------------------------------------------


def test_operators_learn_that_nginx_looks_names_up_once():
    """Containers that `up` has replaced have other addresses, and others may have theirs."""
    assert "    # Names are looked up once, " in (ROOT / "docker/nginx.conf").read_text()
    reload = "docker compose -f docker/compose.yaml exec nginx nginx -s reload"
    header = compose.COMPOSE.read_text().partition("\nx-")[0]
    assert f"#   {reload}\n" in header
    after = DEPLOYING.text.partition("Another `up` replaces containers")[2]
    assert f"$ {reload}\n" in after.partition("### ")[0]


def test_the_page_says_what_the_image_does_not_do_by_itself():
    image_section = DEPLOYING.text.partition("## One container")[2].partition("\n## ")[0]
    user = image()[1].last("USER").value
    assert f"`chown {user} FOLDER`" in image_section
    assert f"chown {user}" in DOCKERFILE.read_text()
    # An engine has no admin listener, and another address of that listener is not in the health check.
    assert "`engine` has no admin listener and needs `--no-healthcheck`" in image_section
    assert "`docker run -e VLLM_LB_ADMIN=" in image_section


def variables_of(text):
    """The variables that a compose file reads, with their defaults. A `$$` is a dollar of the container's."""
    return dict(re.findall(r"(?<!\$)\$\{(\w+)(?::-([^}]*))?", text))


def test_every_variable_is_documented():
    read = {}
    for file in (compose.COMPOSE, compose.COMPOSE_VLLM):
        text = "\n".join(line for line in file.read_text().splitlines() if not line.lstrip().startswith("#"))
        read |= variables_of(text)
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([^|]*) \|", DEPLOYING.text, re.MULTILINE))
    assert set(rows) == set(read)


def test_nginx_knows_the_balancers():
    nginx = (ROOT / "docker/nginx.conf").read_text()
    balancers = [name for name in services("simulated") if name.startswith("balancer-")]
    assert len(balancers) == 2
    for name in balancers:
        assert len(re.findall(rf"^ +server {name}:8000 ", nginx, re.MULTILINE)) == 2
