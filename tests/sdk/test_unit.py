"""conf/vllm-lb.service: systemd accepts it, finds it hardened, and what it runs works as a service would.

No running systemd is needed. These tests take its part as far as that goes: the user, the modes of folders,
the environment, the filter of system calls, and the socket of notifications.
"""

import ctypes
import ctypes.util
import errno
import functools
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile

import pytest

import compose
import harness

UNIT = harness.ROOT / "conf/vllm-lb.service"
PROGRAM, CONFIG = "/usr/local/bin/vllm-lb", "/etc/vllm-lb/lb.yaml"

# The exposure that `systemd-analyze security` may find, of 100. It was 19 with systemd 252.
MAX_EXPOSURE = 20

# A user as DynamicUser makes one: of a number that no package uses.
DYNAMIC_USER = 61184


def settings(text=None):
    """The settings of the unit, in their order; a name may come several times."""
    return re.findall(r"^(\w+)=(.*)$", text or UNIT.read_text(), re.MULTILINE)


def setting(name):
    [value] = [value for known, value in settings() if known == name]
    return value


def reload_by_upgrade():
    """The ExecReload that the header of the unit shows for upgrades."""
    [shown] = re.findall(r"^#   (ExecReload=.+)$", UNIT.read_text(), re.MULTILINE)
    return shown.removeprefix("ExecReload=")


# ---- what systemd finds ------------------------------------------------------------------------


def verify(folder, text):
    """What `systemd-analyze verify` says of a unit whose program is there."""
    unit = folder / "vllm-lb.service"
    unit.write_text(text.replace(PROGRAM, harness.binary()))
    return compose.run([compose.tool("systemd-analyze"), "verify", "--man=no", unit])


def test_systemd_finds_no_problem(tmp_path):
    assert verify(tmp_path, UNIT.read_text()) == (0, "")


def test_systemd_accepts_the_reload_by_upgrade(tmp_path):
    text = UNIT.read_text().replace("ExecReload=/bin/kill -HUP $MAINPID", f"ExecReload={reload_by_upgrade()}")
    assert verify(tmp_path, text) == (0, "")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Type=notify", "Type=notifies"),
        ("TimeoutStopSec=200", "TimeoutStopSec=long"),
        (f"ExecStart={PROGRAM}", "ExecStart=/nowhere/vllm-lb"),
        ("ProtectSystem=strict", "ProtectsSystem=strict"),
    ],
)
def test_systemd_finds_a_mistake(theirs, ours, tmp_path):
    text = UNIT.read_text()
    assert theirs in text
    code, said = verify(tmp_path, text.replace(theirs, ours))
    assert code != 0 or said


def exposure(folder, text):
    """What `systemd-analyze security` says, and whether the unit is within the limit."""
    unit = folder / "vllm-lb.service"
    unit.write_text(text)
    command = ["security", "--no-pager", "--offline=yes", f"--threshold={MAX_EXPOSURE}", unit]
    return compose.run([compose.tool("systemd-analyze"), *command])


def test_the_unit_is_hardened(tmp_path):
    code, said = exposure(tmp_path, UNIT.read_text())
    assert code == 0, said


@pytest.mark.parametrize("name", ["DynamicUser", "CapabilityBoundingSet", "SystemCallFilter"])
def test_a_unit_without_a_restriction_is_found(name, tmp_path):
    text = re.sub(rf"^{name}=.*\n", "", UNIT.read_text(), flags=re.MULTILINE)
    assert exposure(tmp_path, text)[0] != 0


# ---- as a service ------------------------------------------------------------------------------


@functools.cache
def system_calls():
    """The sets of system calls that systemd knows, each with its members."""
    code, said = compose.run([compose.tool("systemd-analyze"), "--no-pager", "syscall-filter"])
    assert code == 0, said
    sets, name = {}, None
    for line in said.splitlines():
        word = line.strip()
        if line.startswith("@"):
            name = word
            sets[name] = []
        elif name and word and not word.startswith("#") and line.startswith(" "):
            sets[name].append(word)
    return sets


def members(name):
    if not name.startswith("@"):
        return {name}
    return {call for member in system_calls()[name] for call in members(member)}


def permitted():
    """The system calls that the unit's filters leave: the first list allows, the second takes away."""
    allowed = members("@default")
    for known, value in settings():
        if known == "SystemCallFilter":
            listed = {call for name in value.lstrip("~").split() for call in members(name)}
            allowed = allowed - listed if value.startswith("~") else allowed | listed
    return allowed


class SystemCallFilter:
    """Loads a filter into a process; what is not permitted fails with EPERM, as the unit says."""

    ALLOW, NO_ARGUMENTS = 0x7FFF0000, 0

    def __init__(self, names):
        library = ctypes.util.find_library("seccomp")
        assert library, "libseccomp is missing: systemd needs it too"
        self.library = ctypes.CDLL(library)
        self.library.seccomp_init.restype = ctypes.c_void_p
        assert setting("SystemCallErrorNumber") == "EPERM"
        self.context = ctypes.c_void_p(self.library.seccomp_init(0x00050000 | 1))
        # Also without root's rights a process may load it: libseccomp sets no_new_privs.
        numbers = (self.library.seccomp_syscall_resolve_name(name.encode()) for name in sorted(names))
        known = [number for number in numbers if number >= 0]
        assert len(known) > 200
        for number in known:
            self.library.seccomp_rule_add(self.context, self.ALLOW, number, self.NO_ARGUMENTS)

    def load(self):
        assert self.library.seccomp_load(self.context) == 0


class Service:
    """The unit's program as systemd would run it, in folders of a test."""

    def __init__(self, folder, engine):
        self.folder = folder
        self.program = folder / "vllm-lb"
        # A user of the system need not reach the folder of the build.
        shutil.copy(harness.binary(), self.program)
        for kind, mode in (("Configuration", None), ("Runtime", None), ("State", None)):
            self.make(kind, int(setting(f"{kind}DirectoryMode"), 8))
        self.listen, self.admin = (f"127.0.0.1:{port}" for port in harness.free_ports(2))
        self.config = folder / "Configuration/lb.yaml"
        self.config.write_text(
            f"listen: '{self.listen}'\nadmin: {{address: '{self.admin}', token: '${{ADMIN_TOKEN}}'}}\n"
            f"upgrade_socket: {folder}/Runtime/upgrade.sock\nupstreams: ['{engine}']\n"
            "traces: {store: sqlite}\n"
        )
        self.config.chmod(0o644)
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.bind(str(folder / "notify"))
        (folder / "notify").chmod(0o777)
        self.notices.settimeout(60)
        self.filter = SystemCallFilter(permitted())
        self.log = open(folder / "log", "wb")
        self.main = None

    def make(self, kind, mode):
        """A folder as systemd makes it: all but that of the configuration belong to the user."""
        path = self.folder / kind
        path.mkdir()
        path.chmod(mode)
        if os.getuid() == 0 and kind != "Configuration":
            os.chown(path, DYNAMIC_USER, DYNAMIC_USER)

    def environment(self):
        state = self.folder / "State"
        return {
            "PATH": "/usr/bin:/bin", "STATE_DIRECTORY": str(state), "ADMIN_TOKEN": "secret",
            "NOTIFY_SOCKET": str(self.folder / "notify"), "MAINPID": str(self.main.pid if self.main else ""),
        }

    def restrict(self):
        os.umask(int(setting("UMask"), 8))
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(DYNAMIC_USER)
            os.setuid(DYNAMIC_USER)
        self.filter.load()

    def run(self, command):
        """Runs a command of the unit with the restrictions of the service."""
        for theirs, ours in ((PROGRAM, str(self.program)), (CONFIG, str(self.config))):
            command = command.replace(theirs, ours)
        environment = self.environment()
        words = [re.sub(r"\$(\w+)", lambda name: environment[name[1]], word) for word in shlex.split(command)]
        return subprocess.Popen(
            words, env=environment, cwd="/", preexec_fn=self.restrict,
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )

    def hears(self, wanted):
        """Waits for a notification with this line; all lines of it."""
        try:
            while True:
                lines = self.notices.recv(4096).decode().splitlines()
                if wanted in [line if "=" in wanted else line.split("=")[0] for line in lines]:
                    return dict(line.split("=", 1) for line in lines)
        except TimeoutError:
            raise AssertionError(f"no {wanted}\n{self.said()}") from None

    def said(self):
        return (self.folder / "log").read_text()

    def answers(self):
        return harness.status(f"http://{self.listen}/v1/models") == 200


@pytest.fixture
def service(engine):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        running = Service(folder, engine)
        running.main = running.run(setting("ExecStart"))
        try:
            yield running
        finally:
            harness.stop(running.main)
            running.log.close()
            running.notices.close()


def test_the_service_starts_reloads_and_stops(service):
    service.hears("READY=1")
    harness.until(service.answers, "it serves", service.said)
    assert "WARN" not in service.said().upper(), service.said()
    # The state of the service is its own.
    state = service.folder / "State/traces.db"
    assert stat.S_IMODE(state.stat().st_mode) & 0o077 == 0

    service.config.write_text(service.config.read_text() + "log: {requests: true}\n")
    assert service.run(setting("ExecReload")).wait(timeout=60) == 0
    service.hears("RELOADING=1")
    service.hears("READY=1")
    harness.until(lambda: "reloaded" in service.said(), "the reload is logged", service.said)
    assert "reload failed" not in service.said()
    assert service.answers()

    service.main.send_signal(signal.SIGTERM)
    service.hears("STOPPING=1")
    assert service.main.wait(timeout=60) == 0


def test_a_reload_by_upgrade_makes_the_new_process_the_main_one(service):
    service.hears("READY=1")
    harness.until(service.answers, "it serves", service.said)
    assert service.run(reload_by_upgrade()).wait(timeout=60) == 0
    heard = service.hears("MAINPID")
    successor = int(heard["MAINPID"])
    assert heard["READY"] == "1" and successor != service.main.pid
    # Its requests are done, so it ends, and well: systemd goes on with the new one.
    assert service.main.wait(timeout=60) == 0, service.said()
    assert service.answers()
    os.kill(successor, signal.SIGTERM)
    service.hears("STOPPING=1")
    harness.until(lambda: not service.answers(), "the new one ends")


def test_a_wrong_configuration_ends_with_the_code_that_prevents_a_restart(service):
    service.hears("READY=1")
    service.main.terminate()
    service.main.wait(timeout=60)
    service.config.write_text("nothing: 1\n")
    service.main = service.run(setting("ExecStart"))
    assert service.main.wait(timeout=60) == int(setting("RestartPreventExitStatus"))


def test_a_folder_that_only_root_reads_would_keep_the_service_from_its_configuration(service):
    """Regression: the unit asked for a folder of root with the mode 0750."""
    if os.getuid() != 0:
        pytest.skip("only root can take the part of another user")
    service.hears("READY=1")
    service.main.terminate()
    service.main.wait(timeout=60)
    (service.folder / "Configuration").chmod(0o750)
    service.main = service.run(setting("ExecStart"))
    assert service.main.wait(timeout=60) == 64


def traced(restrict):
    """The error of a system call that any user may make, in a process that this function restricts."""
    library = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        restrict()
        library.ptrace(0, 0, 0, 0)
        os._exit(ctypes.get_errno())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_the_filter_does_not_permit_fails():
    assert not {"mount", "ptrace", "reboot"} & permitted()
    assert traced(lambda: None) == 0
    assert traced(SystemCallFilter(permitted()).load) == errno.EPERM


def test_the_unit_names_all_that_keeps_other_users_from_a_socket():
    """A wider UMask alone does not help: only the service's user gets into the folder."""
    assert setting("RuntimeDirectoryMode") == "0700" and setting("UMask") == "0077"
    comment = re.search(r"((?:^#.*\n)+)UMask=", UNIT.read_text(), re.MULTILINE)[1]
    assert "unix: listener" in comment and "RuntimeDirectoryMode" in comment


def test_the_service_gets_more_time_to_stop_than_its_requests():
    # shutdown.grace, and 10 s for the last records of traces.
    assert int(setting("TimeoutStopSec")) > 180 + 10
