"""The Debian package: what is in it, and that it installs, works, upgrades and goes away without a trace.

dpkg installs it into a folder, whose database is empty. There is no systemd in it; programs in its place note
what the package asks for.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import time
import tomllib
import urllib.request

import pytest

import harness

ROOT = harness.ROOT
PACKAGE = "vllm-lb"

# How long a user may wait for the first answer after the installation began.
FIRST_ANSWER_SECONDS = 60

# Where a package of Debian may put files.
PLACES = ("/usr/bin/", "/usr/lib/systemd/system/", f"/usr/share/doc/{PACKAGE}/", f"/etc/{PACKAGE}/")

# The page whose commands use files of the folder docker.
FLEET_PAGE = ROOT / "docs/fleet-on-one-machine.md"

# Programs through which a package reaches a running systemd.
SYSTEMD = ("systemctl", "deb-systemd-invoke")


def run(*command, **settings):
    """Runs a command that has to go well; what it prints."""
    command = [str(each) for each in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **settings)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def build(folder, *options):
    """The package of the binary that the tests have."""
    profile = pathlib.Path(harness.binary()).parent
    environment = {**os.environ, "CARGO_TARGET_DIR": str(profile.parent)}
    name = {"debug": "dev"}.get(profile.name, profile.name)
    run(ROOT / "dev", "package", name, folder, "--fast", *options, cwd=ROOT, env=environment)
    [package] = folder.glob("*.deb")
    return package


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return build(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def unpacked(package, tmp_path_factory):
    """The files of the package, and below DEBIAN what controls it."""
    folder = tmp_path_factory.mktemp("unpacked")
    run("dpkg-deb", "--raw-extract", package, folder)
    return folder


def files(folder):
    """The files and links below a folder, as absolute names in it."""
    found = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    return {"/" + str(path.relative_to(folder)) for path in found}


def manifest():
    return tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]


# ---- what is in it -----------------------------------------------------------------------------


def fields(package):
    text = run("dpkg-deb", "--field", package)
    return dict(re.findall(r"^(\S+): (.*(?:\n .*)*)", text, re.MULTILINE))


def test_the_fields_say_what_it_is(package):
    found = fields(package)
    assert found["Package"] == PACKAGE
    assert found["Version"].rsplit("-", 1)[0] == manifest()["version"]
    assert found["Architecture"] == run("dpkg", "--print-architecture").strip()
    assert re.fullmatch(r"[^<]+ <[^@\s]+@[^\s>]+>", found["Maintainer"])
    summary, _, text = found["Description"].partition("\n")
    assert summary == manifest()["description"]
    assert len(summary) <= 80
    assert text.strip()


def test_it_depends_on_the_libraries_that_the_program_needs(package, unpacked):
    needed = re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", unpacked / "usr/bin/vllm-lb"))
    assert "libc.so.6" in needed
    depends = re.findall(r"([\w.+-]+)(?: \([^)]*\))?(?:, |$)", fields(package)["Depends"])
    owners = set()
    for library in needed:
        paths = run("dpkg-query", "--search", f"*/{library}")
        owners |= {owner.split(":")[0] for owner in paths.splitlines()}
    assert set(depends) <= owners
    assert "libc6" in depends
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", run("objdump", "-T", unpacked / "usr/bin/vllm-lb"))
    newest = max((int(major), int(minor)) for major, minor in versions)
    [least] = re.findall(r"libc6 \(>= (\d+)\.(\d+)\)", fields(package)["Depends"])
    assert tuple(map(int, least)) >= newest


def test_its_files_are_where_debian_has_them(package, unpacked):
    found = {name for name in files(unpacked) if not name.startswith("/DEBIAN/")}
    assert {name for name in found if not name.startswith(PLACES)} == set()
    documents = f"/usr/share/doc/{PACKAGE}"
    wanted = {"/usr/bin/vllm-lb", "/usr/lib/systemd/system/vllm-lb.service", "/etc/vllm-lb/lb.yaml"}
    wanted |= {f"{documents}/copyright", f"{documents}/lb.yaml", f"{documents}/docs/operating.md"}
    wanted |= {f"{documents}/examples/{path.name}" for path in (ROOT / "conf/examples").iterdir()}
    wanted |= {f"{documents}/docker/nginx.conf", f"{documents}/docker/keys.map"}
    wanted |= {f"{documents}/THIRD-PARTY-NOTICES"}
    assert wanted <= found
    listed = run("dpkg-deb", "--contents", package).splitlines()
    modes = {row.split()[5].lstrip("."): row.split()[:2] for row in listed}
    assert {owner for _, owner in modes.values()} == {"0/0"}
    assert modes["/usr/bin/vllm-lb"][0] == "-rwxr-xr-x"
    plain = {mode for name, (mode, _) in modes.items() if not name.endswith("/") and "/bin/" not in name}
    assert plain == {"-rw-r--r--"}
    assert {mode for name, (mode, _) in modes.items() if name.endswith("/")} == {"drwxr-xr-x"}


def test_the_program_is_stripped_and_not_of_another_place(unpacked):
    program = unpacked / "usr/bin/vllm-lb"
    assert ".symtab" not in run("objdump", "-h", program)
    assert run(program, "--version") == run(harness.binary(), "--version")


def test_links_of_the_pages_that_stay_inside_lead_to_files(unpacked):
    folder = unpacked / f"usr/share/doc/{PACKAGE}/docs"
    for page in folder.glob("*.md"):
        for target in re.findall(r"\]\((\w[\w-]*\.md)", page.read_text()):
            assert (folder / target).exists(), f"{page.name}: {target}"


def test_the_page_of_a_fleet_finds_its_files_in_the_package(unpacked, tmp_path):
    """Its commands take files of the checkout, and of the package where there is no checkout."""
    documents = f"/usr/share/doc/{PACKAGE}"
    blocks = [
        block.replace(documents, str(unpacked / documents.lstrip("/")))
        for block in re.findall(r"^```bash\n(.*?)^```$", FLEET_PAGE.read_text(), re.MULTILINE | re.DOTALL)
    ]
    choice = "".join(re.findall(r"^.*\bdocker=.*\n", "".join(blocks), re.MULTILINE))
    named = re.findall(r'"\$docker/([\w.-]+)"', "".join(blocks))
    assert {"nginx.conf", "keys.map"} <= set(named)
    for folder, source in [(tmp_path, unpacked / f"{documents.lstrip('/')}/docker"), (ROOT, ROOT / "docker")]:
        place = run("bash", "-euc", f'{choice}printf %s "$docker"', cwd=folder)
        assert place == str(source)
        for name in named:
            assert (source / name).read_bytes() == (ROOT / "docker" / name).read_bytes(), name


def test_the_licence_is_named(unpacked):
    text = (unpacked / f"usr/share/doc/{PACKAGE}/copyright").read_text()
    assert f"License: {manifest()['license']}" in text
    named = set(re.findall(r"/usr/share/common-licenses/[\w.-]*\w", text))
    assert len(named) == 1
    assert all(pathlib.Path(path).exists() for path in named)
    [notices] = re.findall(rf"/usr/share/doc/{PACKAGE}/[\w-]+", text)
    assert (unpacked / notices.lstrip("/")).read_text() == run(ROOT / "dev", "notices")


def test_the_unit_starts_the_programs_of_the_package(unpacked):
    unit = (unpacked / "usr/lib/systemd/system/vllm-lb.service").read_text()
    assert "/usr/local" not in unit
    settings = dict(re.findall(r"^(Exec\w+)=(.*)$", unit, re.MULTILINE))
    program, *arguments = settings["ExecStart"].split()
    assert (unpacked / program.lstrip("/")).exists()
    assert arguments == ["--config", "/etc/vllm-lb/lb.yaml"]
    shown = re.findall(r"(/\S*bin/vllm-lb)\b", unit)
    assert shown
    assert set(shown) == {program}
    # The rest is the unit of the tree, whose own tests hold it.
    own = (ROOT / "conf/vllm-lb.service").read_text()
    assert unit == own.replace("/usr/local/bin/", "/usr/bin/").replace(
        "/etc/systemd/system/", "/usr/lib/systemd/system/"
    )


def test_the_file_that_is_installed_is_one_that_starts(unpacked):
    file = unpacked / "etc/vllm-lb/lb.yaml"
    assert run(unpacked / "usr/bin/vllm-lb", "--config", file, "--test").strip() == "configuration ok"
    # Until an operator opens it, other machines reach neither models nor the admin API.
    addresses = re.findall(r"^(?:listen: |admin: .*address: \")([\d.]+):\d+", file.read_text(), re.MULTILINE)
    assert addresses == ["127.0.0.1", "127.0.0.1"]


def test_the_scripts_are_sound(unpacked):
    controls = (unpacked / "DEBIAN").iterdir()
    scripts = {path.name: path for path in controls if path.stat().st_mode & stat.S_IXUSR}
    assert set(scripts) == {"postinst", "prerm", "postrm"}
    for path in scripts.values():
        run("sh", "-n", path)
        assert "set -e" in path.read_text()
        assert "#DEBHELPER#" not in path.read_text()
    # A systemd that runs is asked for nothing else, and an upgrade stops nothing.
    asked = r"(?:systemctl|deb-systemd-invoke) (?:--\S+ )*([a-z-]+)"
    calls = {name: set(re.findall(asked, path.read_text())) for name, path in scripts.items()}
    assert calls == {"postinst": {"daemon-reload"}, "prerm": {"stop"}, "postrm": {"daemon-reload"}}
    assert '[ "$1" = remove ]; then\n\tdeb-systemd-invoke stop' in scripts["prerm"].read_text()
    assert (unpacked / "DEBIAN/conffiles").read_text().split() == ["/etc/vllm-lb/lb.yaml"]


# ---- what it does ------------------------------------------------------------------------------


class Machine:
    """A folder into which dpkg installs, with the calls of systemd that packages make."""

    def __init__(self, folder):
        self.root = folder / "root"
        self.log = folder / "systemd.log"
        self.log.touch()
        for name in ("info", "updates", "triggers"):
            (self.root / "var/lib/dpkg" / name).mkdir(parents=True)
        for name in ("status", "available"):
            (self.root / "var/lib/dpkg" / name).touch()
        stubs = folder / "stubs"
        stubs.mkdir()
        for name in SYSTEMD:
            (stubs / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{self.log}\n')
            (stubs / name).chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{stubs}:/usr/sbin:/sbin:{os.environ['PATH']}"}

    def state(self):
        return {name for name in files(self.root) if not name.startswith("/var/lib/dpkg/")}

    def dpkg(self, *arguments):
        user = [] if os.geteuid() == 0 else ["fakeroot"]
        options = ["--root", self.root, "--force-script-chrootless", "--force-depends", "--force-confold"]
        return run(*user, "dpkg", *options, *arguments, env=self.environment)

    def status(self):
        query = ["dpkg-query", "--root", self.root, "--show", "--showformat", "${Status} ${Version}", PACKAGE]
        return run(*query)

    def calls(self):
        return self.log.read_text().splitlines()

    def path(self, name):
        return self.root / name.lstrip("/")


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_it_is_installed_without_starting_anything(machine, package):
    machine.dpkg("--install", package)
    assert machine.status().startswith("install ok installed ")
    assert machine.path("/usr/bin/vllm-lb").exists()
    wanted = [name for name in machine.state() if ".wants/" in name]
    assert wanted == []
    assert [call for call in machine.calls() if re.search("start|enable", call)] == []


def test_the_first_answer_comes_within_a_minute(machine, package, record_property):
    listen, admin = harness.free_ports(2)
    began = time.monotonic()
    machine.dpkg("--install", package)
    demo = [machine.path("/usr/bin/vllm-lb"), "--demo"]
    demo += ["--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}"]
    with harness.process(demo, f"http://127.0.0.1:{admin}/ready"):
        question = {"model": "sim", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
        request = urllib.request.Request(
            f"http://127.0.0.1:{listen}/v1/chat/completions",
            json.dumps(question).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"]
        took = time.monotonic() - began
    record_property("seconds", took)
    print(f"the first answer came {took:.1f} s after the installation began")
    assert took < FIRST_ANSWER_SECONDS


def test_an_upgrade_keeps_the_configuration_and_ends_no_request(machine, package, tmp_path):
    machine.dpkg("--install", package)
    config = machine.path("/etc/vllm-lb/lb.yaml")
    config.write_text("upstreams: [http://10.0.0.7:8000]\n")
    folder = tmp_path / "next"
    folder.mkdir()
    machine.dpkg("--install", reversioned(package, folder))
    assert machine.status() == "install ok installed 99.0-1"
    assert config.read_text() == "upstreams: [http://10.0.0.7:8000]\n"
    assert [call for call in machine.calls() if re.search("stop|start", call)] == []


def reversioned(package, folder):
    """The same package with a later version."""
    run("dpkg-deb", "--raw-extract", package, folder / "tree")
    control = folder / "tree/DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .*$", "Version: 99.0-1", control.read_text()))
    made = folder / "vllm-lb.deb"
    run("dpkg-deb", "--build", "--root-owner-group", "-Znone", folder / "tree", made)
    shutil.rmtree(folder / "tree")
    return made


def test_a_removal_keeps_the_configuration_and_a_purge_keeps_nothing(machine, package):
    machine.dpkg("--install", package)
    config, env = machine.path("/etc/vllm-lb/lb.yaml"), machine.path("/etc/vllm-lb/env")
    env.write_text("KEY=secret\n")
    traces = machine.path("/var/lib/private/vllm-lb/traces.db")
    traces.parent.mkdir(parents=True)
    traces.touch()
    machine.dpkg("--remove", PACKAGE)
    assert machine.status().startswith("deinstall ok config-files ")
    assert config.exists() and env.exists() and traces.exists()
    assert not machine.path("/usr/bin/vllm-lb").exists()
    stops = [call for call in machine.calls() if "stop vllm-lb.service" in call]
    # The script looks for a running systemd on this machine.
    assert bool(stops) == pathlib.Path("/run/systemd/system").is_dir()
    machine.dpkg("--purge", PACKAGE)
    assert {name for name in machine.state() if PACKAGE in name} == set()
    assert not machine.path("/etc/vllm-lb").exists()
    with contextlib.suppress(FileNotFoundError):
        assert list(machine.path("/var/lib/private").iterdir()) == []


def test_what_another_package_owns_stays(machine, package):
    other = machine.path("/etc/other.conf")
    other.parent.mkdir(parents=True)
    other.write_text("a\n")
    machine.dpkg("--install", package)
    machine.dpkg("--purge", PACKAGE)
    assert other.read_text() == "a\n"
