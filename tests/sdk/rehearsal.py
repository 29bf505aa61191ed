"""Runs the scripts of a workflow's job, with programs in place of those that reach registries.

Each of these programs notes its arguments. Those that are given files fail where there is none.
"""

import os
import pathlib
import re
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIGEST = "sha256:" + "ab" * 32

STUB = """#!/bin/bash
echo "{name} $*" >>"{log}"
{body}
"""

STUBS = {
    "docker": """
    case "$*" in
        "login "*) cat >/dev/null ;;
        "buildx build "*)
            [ -e docker/Dockerfile ] || exit 1
            printf '{{\\n  "containerimage.digest": "{digest}"\\n}}\\n' >metadata.json ;;
        "buildx imagetools inspect "*) echo {digest} ;;
    esac""",
    "helm": """
    case $1 in
        package) exec "{helm}" "$@" ;;
        push) [ -e "$2" ] && [ $# = 3 ] || exit 1; echo "Digest: {digest}" ;;
        registry) cat >/dev/null ;;
    esac""",
    "gh": """
    for word in "$@"; do
        case $word in dist/*) [ -s "$word" ] || exit 1 ;; esac
    done""",
}


class Rehearsal:
    """A folder like that of a checkout, and what the scripts of a job do in it."""

    def __init__(self, folder, values):
        self.folder, self.values, self.outputs = folder, values, {}
        self.log = folder / "log.txt"
        for name in ("dev", "charts", "docker", "conf", "Cargo.toml", "LICENSE"):
            (folder / name).symlink_to(ROOT / name)
        programs = folder / "programs"
        programs.mkdir()
        for name, body in STUBS.items():
            text = body.format(digest=DIGEST, helm=shutil.which("helm"))
            (programs / name).write_text(STUB.format(name=name, log=self.log, body=text))
            (programs / name).chmod(0o755)
        self.path = f"{programs}:{os.environ['PATH']}"

    def filled(self, text):
        """A text of the workflow with the values of its expressions."""
        def value(found):
            output = re.fullmatch(r"steps\.([\w-]+)\.outputs\.([\w-]+)", found[1])
            return self.outputs[output[1]][output[2]] if output else self.values[found[1]]

        return re.sub(r"\$\{\{ (.*?) \}\}", value, str(text))

    def run(self, workflow, job):
        """Runs the scripts of a job in their order, and fills in what actions are given."""
        given = []
        for step in workflow["jobs"][job]["steps"]:
            if "run" not in step:
                inputs = {key: self.filled(text) for key, text in step.get("with", {}).items()}
                given.append((step["uses"], inputs))
                continue
            outputs = self.folder / "outputs.txt"
            outputs.write_text("")
            variables = {**workflow.get("env", {}), **step.get("env", {})}
            environment = {name: self.filled(text) for name, text in variables.items()}
            environment |= {"PATH": self.path, "GITHUB_OUTPUT": str(outputs), "HOME": str(self.folder)}
            # What the runner makes of `shell: bash`.
            command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
            done = subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{step['run']}\n{done.stdout}{done.stderr}"
            if "id" in step:
                rows = outputs.read_text().splitlines()
                self.outputs[step["id"]] = dict(row.split("=", 1) for row in rows)
        return given

    def calls(self):
        return self.log.read_text().splitlines()
