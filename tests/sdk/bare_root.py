"""Runs docker/Dockerfile, or the README's way to a first answer, in a bare Debian without Docker.

    bare_root.py image [--binary FILE]   the instructions of each stage in a bare root of its own; then the
                                         image's command with --demo, as its user, to a first answer. With a
                                         binary that is there already, the build of the Dockerfile is left out
    bare_root.py demo                    `./dev demo` to a first answer, the Rust toolchain being there

With `--base FOLDER` the bare Debian is kept there, or taken from there.

It needs root, mmdebstrap and unshare, and takes packages from where apt takes them on this machine. All that
is mounted or started is gone at the end. `./dev trial` calls it.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

import dockerfile

ROOT = pathlib.Path(__file__).resolve().parents[2]

# What the image `rust` has beside the toolchain, as far as a build needs it; and what the README's first
# command needs.
BUILDER_PACKAGES = ["gcc", "libc6-dev", "make", "ca-certificates"]
CURL_PACKAGES = ["ca-certificates", "curl"]

# A build takes minutes on a machine with other work.
BUILD_LIMIT = 3600
START_LIMIT = 60


def say(text):
    print(f"trial: {text}", flush=True)


class Stopwatch:
    """Prints how long a step took."""

    def __init__(self):
        self.steps = []

    @contextlib.contextmanager
    def step(self, name):
        say(name)
        begun = time.monotonic()
        yield
        self.steps.append((name, time.monotonic() - begun))

    def report(self):
        for name, seconds in self.steps:
            print(f"{seconds:9.1f} s  {name}")


# ---- roots -------------------------------------------------------------------------------------


def apt_sources():
    """The files in which apt finds Debian here, and its settings about the network."""
    folder = pathlib.Path("/etc/apt")
    sources = [path for path in [folder / "sources.list", *sorted(folder.glob("sources.list.d/*"))]
               if path.is_file() and "debian" in path.read_text() and path.suffix in (".list", ".sources")]
    assert sources, "apt has no source of Debian on this machine"
    settings = [path for path in sorted((folder / "apt.conf.d").iterdir()) if "Acquire" in path.read_text()]
    return sources, settings


def bare(path, release="bookworm"):
    """Makes a bare Debian, with this machine's way to Debian's packages."""
    sources, settings = apt_sources()
    options = [f"--aptopt={file}" for file in settings]
    command = ["mmdebstrap", "--variant=minbase", *options, release, str(path), *map(str, sources)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise SystemExit(f"mmdebstrap failed:\n{made.stderr[-4000:]}")
    for file in settings:
        shutil.copy(file, path / "etc/apt/apt.conf.d")
    shutil.copy("/etc/resolv.conf", path / "etc/resolv.conf")


class Root:
    """A bare Debian in a folder, in which commands are run: a copy of `base` with packages."""

    def __init__(self, path, base, packages=()):
        self.path = path
        subprocess.run(["cp", "--archive", str(base), str(path)], check=True)
        for name in ("proc", "dev"):
            self.bind(pathlib.Path("/", name), f"/{name}")
        if packages:
            install = "apt-get update -qq && apt-get install -qq --yes --no-install-recommends"
            environment = self.environment(DEBIAN_FRONTEND="noninteractive")
            self.run(["/bin/sh", "-c", f"{install} {' '.join(packages)} >/dev/null"], environment)
            # A machine may have authorities of its own.
            shutil.copy("/etc/ssl/certs/ca-certificates.crt", self.inside("/etc/ssl/certs"))

    def inside(self, path):
        return self.path / str(path).lstrip("/")

    def bind(self, source, target):
        self.inside(target).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--rbind", str(source), str(self.inside(target))], check=True)

    def bind_toolchain(self):
        """Puts the Rust toolchain of this machine to where PATH finds it, without what was downloaded."""
        found = subprocess.run(["rustc", "--print", "sysroot"], check=True, capture_output=True, text=True)
        self.bind(found.stdout.strip(), "/usr/local/toolchain")
        home = pathlib.Path(os.environ.get("CARGO_HOME") or pathlib.Path.home() / ".cargo")
        own = self.inside("/usr/local/cargo")
        own.mkdir(parents=True, exist_ok=True)
        for name in ("config.toml", "config"):
            if (home / name).exists():
                shutil.copy(home / name, own / name)
        return home

    def environment(self, **values):
        """A clean environment, with what this machine says of proxies, and of the profile of a release."""
        proxies = {name: value for name, value in os.environ.items()
                   if name.lower().endswith("_proxy") or name.startswith("CARGO_PROFILE_RELEASE_")}
        path = "/usr/local/toolchain/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {**proxies, "PATH": path, "HOME": "/", "CARGO_HOME": "/usr/local/cargo", **values}

    def command(self, words, user=None, folder="/"):
        """A command in the root, as this user, in this folder."""
        becomes = ["setpriv", f"--reuid={user[0]}", f"--regid={user[1]}", "--clear-groups",
                   "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"] if user else []
        # The tools are those of the root.
        go = f'cd {folder} && exec "$@"'
        return ["chroot", str(self.path), *becomes, "/bin/sh", "-c", go, "sh", *words]

    def run(self, words, environment, **where):
        subprocess.run(self.command(words, **where), env=environment, check=True, timeout=BUILD_LIMIT)


# ---- the image ---------------------------------------------------------------------------------


class Image:
    """The stages of the Dockerfile, each in a root."""

    def __init__(self, work, base, binary, watch):
        self.work, self.base, self.binary, self.watch = work, base, binary, watch
        self.roots = {}
        self.ignored = (ROOT / "docker/Dockerfile.dockerignore").read_text()

    def build(self):
        for stage in dockerfile.stages((ROOT / "docker/Dockerfile").read_text()):
            self.stage(stage)
        return self.roots[stage.name], stage

    def stage(self, stage):
        assert "bookworm" in stage.base, stage.base
        builds = stage.base.startswith("rust:")
        with self.watch.step(f"a bare root in place of {stage.base}"):
            packages = BUILDER_PACKAGES if builds else ()
            root = self.roots[stage.name] = Root(self.work / stage.name, self.base, packages)
            cargo = root.bind_toolchain() if builds else None
        values, folder = {}, "/"
        for one in stage.instructions:
            if one.name in ("ENV", "ARG"):
                name, _, value = one.value.partition("=")
                values[name] = value.strip('"')
            elif one.name == "WORKDIR":
                folder = one.value
                root.inside(folder).mkdir(parents=True, exist_ok=True)
            elif one.name == "COPY":
                self.copy(root, one, folder)
            elif one.name == "RUN" and self.binary and "cargo build" in one.value:
                say(f"left out: {one.value}")
                root.inside("/out").mkdir()
                shutil.copy(self.binary, root.inside("/out/vllm-lb"))
            elif one.name == "RUN":
                self.mount_caches(root, one, cargo)
                with self.watch.step(f"RUN {one.value}"):
                    root.run(["/bin/sh", "-c", one.value], root.environment(**values), folder=folder)

    def mount_caches(self, root, instruction, cargo):
        """A cache that is mounted: the crates of this machine, else an empty folder."""
        for mount in instruction.flags.get("mount", []):
            options = dict(option.split("=") for option in mount.split(","))
            assert options["type"] == "cache", mount
            registry = cargo / "registry" if cargo and options["target"].endswith("/registry") else None
            empty = self.work / "caches" / options["target"].replace("/", "_")
            empty.mkdir(parents=True, exist_ok=True)
            root.bind(registry if registry and registry.is_dir() else empty, options["target"])

    def copy(self, root, instruction, folder):
        *sources, target = instruction.value.split()
        origin = instruction.flags.get("from")
        for source in sources:
            there = root.inside(pathlib.PurePosixPath(folder, target))
            if origin:
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.roots[origin[0]].inside(source), there)
                continue
            sent = dockerfile.context(self.ignored, ROOT, source)
            if not sent:
                raise SystemExit(f"{source} does not reach the builder: see Dockerfile.dockerignore")
            # The contents of a folder go to the target, a file by its name.
            below = source if (ROOT / source).is_dir() else str(pathlib.PurePosixPath(source).parent)
            for name in sent:
                file = there / pathlib.PurePosixPath(name).relative_to(below)
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, file)


def first_answer(url):
    """Asks as the README does, until an answer comes. Returns it."""
    question = {"model": "sim", "messages": [{"role": "user", "content": "Hello!"}]}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(question).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]
    except OSError:
        return None


def wait_for_answer(child, url, limit):
    end = time.monotonic() + limit
    while not (said := first_answer(url)):
        if child.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"no answer: {child.poll()} after {limit} s at the most")
        time.sleep(0.1)
    return said


def free_addresses():
    # The harness holds the ports until all are found.
    import harness

    return [f"127.0.0.1:{port}" for port in harness.free_ports(2)]


def image(work, base, arguments, watch):
    root, stage = Image(work, base, arguments.binary, watch).build()
    user = stage.last("USER").value.split(":")
    values = dict(one.value.split("=", 1) for one in stage.all("ENV"))
    listen, admin = free_addresses()
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **values}
    entry = [*stage.last("ENTRYPOINT").words, "--demo", "--listen", listen, "--admin", admin]
    with watch.step("the image's command with --demo, to a first answer"):
        child = subprocess.Popen(root.command(entry, user=user), env=environment)
        say(f"answered: {wait_for_answer(child, f'http://{listen}', START_LIMIT)!r}")
    check = stage.last("HEALTHCHECK").value.partition(" ")[2]
    check = [word.replace("127.0.0.1:9090", admin) for word in json.loads(check)]
    with watch.step(f"the health check of the image: {' '.join(check)}"):
        subprocess.run(root.command(check, user=user), env=environment, check=True, timeout=START_LIMIT)
    owner = pathlib.Path(f"/proc/{child.pid}/status").read_text()
    uid = next(line.split()[1] for line in owner.splitlines() if line.startswith("Uid:"))
    capabilities = next(line.split()[1] for line in owner.splitlines() if line.startswith("CapEff:"))
    assert (uid, int(capabilities, 16)) == (user[0], 0), owner
    stop = stage.last("STOPSIGNAL").value
    with watch.step(f"an end with {stop}"):
        subprocess.run(["kill", "-s", stop.removeprefix("SIG"), str(child.pid)], check=True)
        assert child.wait(timeout=START_LIMIT) == 0
    after = subprocess.run(root.command(check, user=user), env=environment, capture_output=True, check=False)
    assert after.returncode == 1, "the health check notices the end"
    binary = root.inside("/usr/local/bin/vllm-lb").stat().st_size
    size = subprocess.run(["du", "-sxm", str(root.path)], check=True, capture_output=True, text=True)
    say(f"the binary has {binary / 1e6:.1f} MB, the final root {size.stdout.split()[0]} MB")


# ---- the README's way --------------------------------------------------------------------------


def demo(work, base, _, watch):
    with watch.step("a bare root with curl, which the README's first command needs"):
        root = Root(work / "demo", base, CURL_PACKAGES)
        root.bind_toolchain()
        checkout = root.inside("/vllm-lb")
        checkout.mkdir()
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).exists() and not fnmatch.fnmatch(name, "benches/results/*"):
                (checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, checkout / name)
    listen, admin = free_addresses()
    with watch.step("./dev demo, to a first answer"):
        command = root.command(["./dev", "demo", "--listen", listen, "--admin", admin], folder="/vllm-lb")
        child = subprocess.Popen(command, env=root.environment())
        say(f"answered: {wait_for_answer(child, f'http://{listen}', BUILD_LIMIT)!r}")
    child.terminate()
    assert child.wait(timeout=START_LIMIT) == 0


# ---- the program -------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("what", choices=["image", "demo"])
    parser.add_argument("--binary", type=pathlib.Path, help="a binary in place of the Dockerfile's build")
    parser.add_argument("--base", type=pathlib.Path, help="a bare root to keep or to use")
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if os.getuid() != 0:
        raise SystemExit("a bare root needs root")
    for tool in ("mmdebstrap", "unshare", "setpriv", "chroot"):
        if not shutil.which(tool):
            raise SystemExit(f"{tool} is missing: install it with apt-get")
    if arguments.work:
        watch, base = Stopwatch(), arguments.base or arguments.work / "bare"
        if not base.exists():
            with watch.step("a bare Debian"):
                bare(base)
        {"image": image, "demo": demo}[arguments.what](arguments.work, base, arguments, watch)
        watch.report()
        return
    with tempfile.TemporaryDirectory(prefix="vllm-lb-trial-") as work:
        # Mounts and processes live in namespaces that end with this command.
        apart = ["unshare", "--mount", "--propagation=private", "--pid", "--mount-proc"]
        apart += ["--fork", "--kill-child"]
        again = [sys.executable, __file__, *sys.argv[1:], f"--work={work}"]
        raise SystemExit(subprocess.run([*apart, *again], check=False).returncode)


if __name__ == "__main__":
    main()
