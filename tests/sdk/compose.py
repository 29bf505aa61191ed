"""Reads the compose files as Docker Compose does, and runs their services as processes of this machine.

A process gets the command, the environment and the files that the compose file gives its container. Only
addresses and paths differ: NAME:PORT becomes a port of 127.0.0.1, and the path of a mount becomes the path of
what is mounted.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import time

import yaml

import harness

DOCKER = harness.ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
COMPOSE_VLLM = DOCKER / "compose.vllm.yaml"

# Where the services listen in their containers.
PORTS = {
    "engine": (8000,), "balancer": (8000, 9090), "redis": (6379,), "nginx": (8000,), "prometheus": (9090,),
}

# nginx as any user: its package compiles in folders that only its own user can write.
NGINX_FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")

PATIENCE = 60.0


# ---- the files ---------------------------------------------------------------------------------


def tool(name):
    """The path of a program that the tests need."""
    path = shutil.which(name)
    assert path, f"{name} is missing: ./dev setup installs it"
    return path


def run(command, **settings):
    """Runs a command; its code, and what it prints."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, check=False, **settings
    )
    return done.returncode, done.stdout + done.stderr


def config(*files, **variables):
    """What `docker-compose config` makes of the files: its exit code, and its output."""
    named = [word for file in files for word in ("--file", str(file))]
    known = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    known["COMPOSE_PROFILES"] = "monitoring,simulated"
    done = subprocess.run(
        [tool("docker-compose"), *named, "config"],
        capture_output=True, text=True, timeout=120, check=False, env={**known, **variables},
    )
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


@functools.cache
def services(*files, **variables):
    """The services by their names, as the containers of all files together."""
    code, said = config(*files, **variables)
    assert code == 0, said
    return {name: Service(name, settings) for name, settings in yaml.safe_load(said)["services"].items()}


def words(value):
    """A command in either of its forms, as words. Compose writes a dollar twice."""
    listed = shlex.split(value) if isinstance(value, str) else value or []
    return [str(word).replace("$$", "$") for word in listed]


@dataclasses.dataclass(frozen=True)
class Service:
    """A service of the compose files."""

    name: str
    settings: dict

    @property
    def kind(self):
        return re.sub(r"-\d+$", "", self.name)

    @property
    def command(self):
        return [*words(self.settings.get("entrypoint")), *words(self.settings.get("command"))]

    @property
    def environment(self):
        values = self.settings.get("environment") or {}
        return {name: str(value).replace("$$", "$") for name, value in values.items()}

    @property
    def health(self):
        """The command of the health check."""
        kind, *command = words(self.settings["healthcheck"]["test"])
        assert kind == "CMD", self.name
        return command

    def mounts(self):
        """The files and folders of this tree that are mounted: path in the container, path here."""
        for volume in self.settings.get("volumes", []):
            if isinstance(volume, str):
                source, target, *_ = volume.split(":")
            else:
                source, target = volume.get("source", ""), volume["target"]
            if source.startswith("/"):
                yield target, pathlib.Path(source)

    def published(self):
        """The addresses of this machine at which the service is reached."""
        for port in self.settings.get("ports", []):
            if isinstance(port, str):
                yield port.rsplit(":", 1)[0]
            else:
                yield f"{port.get('host_ip', '0.0.0.0')}:{port['published']}"


# ---- the processes -----------------------------------------------------------------------------


def accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


class Fleet:
    """The services of a compose file as processes. `overrides` are files in place of mounted ones."""

    def __init__(self, files, folder, overrides=(), **variables):
        self.services = services(*files, **variables)
        self.folder = folder
        self.overrides = dict(overrides)
        self.children = {}
        named = [
            (service.name, port) for service in self.services.values() for port in PORTS.get(service.kind, ())
        ]
        self.ports = dict(zip(named, harness.free_ports(len(named)), strict=True))
        tools = folder / "bin"
        tools.mkdir()
        (tools / "vllm-lb").symlink_to(harness.binary())

    def url(self, name, port=8000):
        return f"http://127.0.0.1:{self.ports[name, port]}"

    def localized(self, text):
        """A text with the addresses of this machine in place of those of the containers."""
        names = "|".join(map(re.escape, self.services))
        return re.sub(
            rf"\b({names}):(\d+)\b", lambda at: f"127.0.0.1:{self.ports[at[1], int(at[2])]}", text
        )

    def mounted(self, service, target):
        """What is mounted at this path, as a file with the addresses of this machine."""
        source = self.overrides.get(target) or dict(service.mounts())[target]
        copy = self.folder / f"{service.name}-{source.name}"
        copy.write_text(self.localized(source.read_text()))
        return copy

    def command(self, service):
        """The command of a service here: with its environment, its addresses and its files."""
        build = {"engine": self.engine, "balancer": self.balancer, "redis": self.redis}
        command = {**build, "nginx": self.nginx, "prometheus": self.prometheus}[service.kind](service)
        values = [f"{name}={self.localized(value)}" for name, value in service.environment.items()]
        return ["env", f"PATH={self.folder / 'bin'}:{os.environ['PATH']}", *values, *map(str, command)]

    def engine(self, service):
        own = {"0.0.0.0": "127.0.0.1", "8000": self.ports[service.name, 8000]}
        return ["vllm-lb", *(own.get(word, word) for word in service.command)]

    def balancer(self, service):
        listen, admin = (f"127.0.0.1:{self.ports[service.name, port]}" for port in (8000, 9090))
        files = {target: self.mounted(service, target) for target, _ in service.mounts()}
        command = [self.localized(str(files.get(word, word))) for word in service.command]
        return [*command, "--listen", listen, "--admin", admin]

    def redis(self, service):
        return [*service.command, "--bind", "127.0.0.1", "--port", self.ports[service.name, 6379]]

    def nginx(self, service):
        """The daemon of the image in the foreground, with folders that any user can write."""
        conf = self.mounted(service, "/etc/nginx/nginx.conf")
        (self.folder / "keys.map").write_text(self.mounted(service, "/etc/nginx/keys.map").read_text())
        text = conf.read_text()
        folders = "".join(f"    {kind}_temp_path {self.folder}/{kind};\n" for kind in NGINX_FOLDERS)
        for theirs, ours in (
            ("listen 8000;", f"listen 127.0.0.1:{self.ports[service.name, 8000]};"),
            ("/run/nginx.pid", f"{self.folder}/nginx.pid"),
            ("/var/log/nginx/", f"{self.folder}/"),
            ("\nhttp {\n", f"\nhttp {{\n{folders}"),
        ):
            assert theirs in text, f"{theirs!r} stands in docker/nginx.conf"
            text = text.replace(theirs, ours)
        conf.write_text(text)
        # One process: as root, nginx runs its workers as a user without the right to write here.
        alone = "daemon off; master_process off;"
        return ["nginx", "-g", alone, "-p", self.folder, "-e", self.folder / "error.log", "-c", conf]

    def prometheus(self, service):
        folder = dict(service.mounts())["/etc/prometheus"]
        settings = yaml.safe_load(self.localized((folder / "prometheus.yml").read_text()))
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings["rule_files"] = [str(folder / file) for file in settings["rule_files"]]
        file = self.folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(settings))
        address = f"127.0.0.1:{self.ports[service.name, 9090]}"
        data = self.folder / "prometheus-data"
        flags = [f"--web.listen-address={address}", f"--storage.tsdb.path={data}", "--log.level=warn"]
        return ["prometheus", f"--config.file={file}", *flags]

    def health(self, service):
        """The health check of a service here."""
        command = [word for word in service.health]
        if command == ["vllm-lb", "health"]:
            command.append(self.url(service.name, 9090))
        for port in PORTS[service.kind]:
            theirs, ours = f"127.0.0.1:{port}", f"127.0.0.1:{self.ports[service.name, port]}"
            command = [word.replace(theirs, ours) for word in command]
        if command[0] == "redis-cli":
            command[1:1] = ["-p", str(self.ports[service.name, 6379])]
        values = [f"{name}={value}" for name, value in service.environment.items()]
        return ["env", f"PATH={self.folder / 'bin'}:{os.environ['PATH']}", *values, *command]

    def start(self, name):
        """Starts a service, and waits until its first port accepts connections."""
        service = self.services[name]
        with open(self.folder / f"{name}.log", "ab") as log:
            child = subprocess.Popen(
                self.command(service), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        self.children[name] = child
        self.wait(lambda: accepts(self.ports[name, PORTS[service.kind][0]]), f"{name} listens", name)

    def wait(self, condition, what, name=None):
        """Waits until the condition holds, and that the process goes on meanwhile."""
        end = time.monotonic() + PATIENCE
        while not condition():
            ended = name and self.children[name].poll()
            log = (self.folder / f"{name}.log").read_text(errors="replace") if name else ""
            assert ended is None, f"{name} ended with {ended}\n{log}"
            assert time.monotonic() < end, f"{what}: not within {PATIENCE:.0f} s\n{log}"
            time.sleep(0.05)

    def is_healthy(self, name):
        """Whether the service's own health check says so."""
        done = subprocess.run(
            self.health(self.services[name]), capture_output=True, timeout=30, check=False
        )
        return done.returncode == 0

    def kill(self, name):
        """Ends a service without a chance to finish anything."""
        child = self.children.pop(name)
        child.kill()
        child.wait()

    def end(self, name):
        """Stops a service, which finishes what it does."""
        child = self.children.pop(name)
        harness.stop(child)
        assert child.returncode == 0, (self.folder / f"{name}.log").read_text()

    def stop(self):
        """Stops all services, the last one first, and returns how those ended that should end with 0."""
        ended = {}
        for name, child in reversed(self.children.items()):
            harness.stop(child)
            ended[name] = child.returncode
        self.children.clear()
        return ended


@contextlib.contextmanager
def fleet(files, folder, overrides=(), **variables):
    """Runs the services that this machine has programs for, in the order in which they need each other."""
    running = Fleet(files, folder, overrides, **variables)
    try:
        for kind in ("redis", "engine", "balancer", "nginx", "prometheus"):
            for name, service in running.services.items():
                if service.kind == kind:
                    running.start(name)
        yield running
    finally:
        running.stop()
