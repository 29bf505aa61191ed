"""Looks for problems in the workflows of .github. A check is given a workflow and yields what it finds."""

import pathlib
import re
import subprocess

import yaml

import documents

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github/workflows"

KEYS = {"name", "on", "permissions", "defaults", "concurrency", "env", "jobs"}
JOB_KEYS = {
    "needs", "strategy", "runs-on", "container", "timeout-minutes", "permissions", "steps", "uses",
}
STEP_KEYS = {"name", "id", "if", "uses", "with", "env", "run"}
RUNNERS = {"ubuntu-24.04", "ubuntu-24.04-arm", "${{ matrix.runner }}"}

# What each job may do with the repository, and nothing more.
RIGHTS = {
    "advisories": {"check": {"contents": "read"}},
    "ci": {"test": {"contents": "read"}, "containers": {"contents": "read"}},
    "release": {
        "test": {"contents": "read"},
        "packages": {"contents": "read"},
        "image": {"contents": "read", "packages": "write"},
        "publish": {
            "contents": "write", "packages": "write", "id-token": "write", "attestations": "write",
        },
    },
}

# Variables that the runner sets.
RUNNER_VARIABLES = {"GITHUB_OUTPUT", "HOME", "PATH"}


def read(path):
    """A workflow; the key `on` is a boolean in YAML 1.1."""
    found = yaml.safe_load(path.read_text())
    found["on"] = found.pop(True)
    return found


def workflows():
    return {path.stem: read(path) for path in sorted(FOLDER.glob("*.yaml"))}


def steps(workflow):
    """The steps of all jobs, each with its job."""
    for name, job in workflow["jobs"].items():
        for step in job.get("steps", []):
            yield name, job, step


def scripts(workflow):
    for name, job, step in steps(workflow):
        if "run" in step:
            yield name, job, step, step["run"]


# ---- checks ------------------------------------------------------------------------------------


def unknown_keys(workflow):
    yield from (f"{key}: unknown" for key in workflow.keys() - KEYS)
    if workflow.get("defaults") != {"run": {"shell": "bash"}}:
        yield "a shell that goes on when a command before a pipe fails"
    for name, job in workflow["jobs"].items():
        yield from (f"{name}.{key}: unknown" for key in job.keys() - JOB_KEYS)
        if "uses" not in job and job.get("runs-on") not in RUNNERS:
            yield f"{name}: runs on {job.get('runs-on')}"
        if "uses" not in job and not job.get("timeout-minutes", 0) > 0:
            yield f"{name}: no limit of its time"
    for name, _, step in steps(workflow):
        yield from (f"{name}: {key}: unknown" for key in step.keys() - STEP_KEYS)
        if ("uses" in step) == ("run" in step):
            yield f"{name}: a step with {sorted(step)}"


def other_rights(workflow):
    if workflow["permissions"] != {}:
        yield f"every job has {workflow['permissions']}"
    given = {name: job.get("permissions") for name, job in workflow["jobs"].items()}
    if given != RIGHTS[workflow["name"]]:
        yield f"the jobs have {given}"
    for name, _, step in steps(workflow):
        is_checkout = step.get("uses", "").startswith("actions/checkout@")
        if is_checkout and step.get("with", {}).get("persist-credentials") is not False:
            yield f"{name}: later steps find the token in .git"


def foreign_actions(workflow):
    """Actions that are not GitHub's own, or without a version, or files that are not there."""
    used = [(name, step["uses"]) for name, _, step in steps(workflow) if "uses" in step]
    used += [(name, job["uses"]) for name, job in workflow["jobs"].items() if "uses" in job]
    for name, action in used:
        if action.startswith("./"):
            if not (ROOT / action).is_file():
                yield f"{name}: there is no {action}"
        elif not re.fullmatch(r"actions/[\w-]+@v\d+", action):
            yield f"{name}: {action}"


def dangling_references(workflow):
    """Expressions that name a job, a step, an output or a row of the matrix that is not there."""
    for name, job in workflow["jobs"].items():
        needs = job.get("needs", [])
        needs = [needs] if isinstance(needs, str) else needs
        yield from (f"{name}: needs {other}" for other in needs if other not in workflow["jobs"])
        made = {}
        for step in job.get("steps", []):
            text = yaml.safe_dump(step)
            for where, output in re.findall(r"steps\.([\w-]+)\.outputs\.([\w-]+)", text):
                if f'echo "{output}=' not in made.get(where, ""):
                    yield f"{name}: no step {where} before has an output {output}"
            if "id" in step:
                made[step["id"]] = step.get("run", "")
        rows = job.get("strategy", {}).get("matrix", {})
        for row in re.findall(r"matrix\.(\w+)", yaml.safe_dump(job)):
            if row not in rows:
                yield f"{name}: matrix.{row}"
    uploaded = {re.sub(r"\$.*", "", name) for name in artifacts(workflow, "upload")}
    for pattern in artifacts(workflow, "download"):
        if pattern.removesuffix("*") not in uploaded:
            yield f"no job uploads {pattern}"


def artifacts(workflow, action):
    for _, _, step in steps(workflow):
        if step.get("uses", "").startswith(f"actions/{action}-artifact"):
            yield step["with"].get("name") or step["with"]["pattern"]


def unsound_scripts(workflow):
    """Scripts that bash does not read, that expressions change, or with variables that nothing sets."""
    for name, _, step, script in scripts(workflow):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            yield f"{name}: {done.stderr}"
        if "${{" in script:
            yield f"{name}: an expression becomes part of a script: {script}"
        known = RUNNER_VARIABLES | set(workflow.get("env") or ()) | set(step.get("env") or ())
        known |= set(re.findall(r"^\s*(\w+)=", script, re.MULTILINE))
        known |= set(re.findall(r"mapfile -t (\w+)", script))
        for variable in re.findall(r"\$\{?(\w+)", re.sub(r"'[^']*'", "", script)):
            if variable not in known:
                yield f"{name}: ${variable} is not set"


def missing_programs(workflow):
    """Tasks of ./dev and files that a script names and that are not there."""
    tasks = documents.dev_tasks()
    for name, _, _, script in scripts(workflow):
        for task in re.findall(r"\./dev (\S+)", script):
            if task.strip(')"') not in tasks:
                yield f"{name}: ./dev {task}"
        for file in re.findall(r"(?:^|\s)((?:docker|conf|charts|\.ci|benches)/[\w./-]+)", script):
            if not (ROOT / file).exists():
                yield f"{name}: there is no {file}"


CHECKS = (
    unknown_keys, other_rights, foreign_actions, dangling_references, unsound_scripts, missing_programs,
)
