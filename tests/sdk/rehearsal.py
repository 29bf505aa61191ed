"""Runs the scripts of a workflow's job, with programs in place of those that reach registries.

Each of these programs notes its arguments. Those that are given files fail where there is none. An image runs
as the program of the tests, or as another command that a test gives.
"""

import os
import pathlib
import re
import shutil
import subprocess

import harness

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of the image of both architectures, and of that of each runner.
DIGEST = "sha256:" + "ab" * 32
DIGESTS = {"ubuntu-24.04": "sha256:" + "cd" * 32, "ubuntu-24.04-arm": "sha256:" + "ef" * 32}

# What buildx writes of an image that it has built.
METADATA = '{\n  "containerimage.digest": "%s"\n}\n'

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
            cp metadata.of.the.build metadata.json ;;
        "buildx imagetools inspect "*) echo {digest} ;;
        "run --rm --network host "*) shift 5; {image} ;;
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
    """A folder like that of a checkout with these tags, and what the scripts of a job do in it."""

    def __init__(self, folder, values, tags=(), metadata=METADATA, image='exec "{binary}" "$@"'):
        self.folder, self.values, self.outputs = folder, values, {}
        self.metadata = metadata
        self.log = folder / "log.txt"
        for name in ("dev", ".ci", "charts", "docker", "conf", "Cargo.toml", "LICENSE"):
            (folder / name).symlink_to(ROOT / name)
        self.git("init", "--quiet")
        self.git("commit", "--quiet", "--allow-empty", "--message", "A commit")
        for tag in tags:
            self.git("tag", tag)
        image = image.format(binary=harness.binary())
        programs = folder / "programs"
        programs.mkdir()
        for name, body in STUBS.items():
            text = body.format(digest=DIGEST, helm=shutil.which("helm"), image=image)
            (programs / name).write_text(STUB.format(name=name, log=self.log, body=text))
            (programs / name).chmod(0o755)
        self.path = f"{programs}:{os.environ['PATH']}"

    def git(self, *words):
        author = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]
        subprocess.run(["git", *author, *words], cwd=self.folder, check=True)

    def run_for_each_runner(self, workflow, job):
        """Runs the scripts of a job that has a matrix of runners; what each uploads is in one folder."""
        for runner in workflow["jobs"][job]["strategy"]["matrix"]["runner"]:
            self.values["matrix.runner"] = runner
            (self.folder / "metadata.of.the.build").write_text(self.metadata.replace("%s", DIGESTS[runner]))
            self.run(workflow, job)

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
