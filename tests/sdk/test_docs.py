"""The pages for people are true: their commands run, and what they name is there."""

import functools
import json
import os
import pathlib
import re
import signal
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import documents
import harness

ROOT = documents.ROOT
PAGES = documents.pages()

# Flags of vLLM and of tools that pages recommend.
FOREIGN_FLAGS = {
    "--enable-prompt-tokens-details",
    "--enable-prefix-caching",
    "--enable-force-include-usage",
    "--served-model-name",
    "--gpu-memory-utilization",
    "--kv-cache-memory-bytes",
    "--data-parallel-size",
    "--shutdown-timeout",
    "--no-healthcheck",
    *("--doc", "--lib", "--locked", "--path", "--test"),
}

# Commands that have flags of their own.
SUBCOMMANDS = (["engine"], ["simulate"], ["traces"], ["doctor"], ["top"], ["health"])

# Paths that a balancer answers with 404 unless `passthrough` names them: the pages say so.
CONTROL_PATHS = {"/sleep", "/wake_up", "/reset_prefix_cache", "/abort_requests", "/get_inner_vllm_config"}

# Paths that pages name for all that is below them; /proc is the operating system's.
BEGINNINGS = {"/traces", "/proc"}

# Paths of WebSockets, which answer 404 to anything else.
SOCKETS = {"/v1/realtime"}

# Words in code style that look like keys or metrics of this product and are something else.
OTHER_NAMES = {"traces.db", "vllm_lb_session"}

PORTS = re.compile(r"\b(800[0-2]|909[0-2]|6380|81\d\d)\b")


def by_name(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


# ---- what the product has ----------------------------------------------------------------------


def run(command, **settings):
    """Runs a command in the tree; its code, and all that it says."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, **settings
    )
    return done.returncode, done.stdout + done.stderr


@functools.cache
def helps():
    """What `--help` says of each command."""
    commands = ([], ["traces", "export"], *SUBCOMMANDS)
    return "\n".join(run([harness.binary(), *command, "--help"])[1] for command in commands)


@functools.cache
def known_flags():
    return FOREIGN_FLAGS | set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", helps()))


@functools.cache
def known_keys():
    manual = (ROOT / "conf/lb.yaml").read_text()
    keys = set(re.findall(r"^# (?:key|later): +(\S+)$", manual, re.MULTILINE))
    keys |= set(re.findall(r"^# alias: +(\S+) =", manual, re.MULTILINE))
    parents = {key.rsplit(".", depth)[0] for key in keys for depth in range(key.count(".") + 1)}
    return keys | parents | {parent.removesuffix("[]") for parent in parents}


@functools.cache
def known_metrics():
    return set(re.findall(r"^\| `(\w+)`", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))


@functools.cache
def source():
    return "\n".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.rs")))


# ---- checks of a page: each gives the problems that it finds -----------------------------------


def unknown_languages(page):
    for block in page.blocks():
        if block.language not in documents.LANGUAGES:
            yield f"{block.line}: a block is {block.language!r}: known are {sorted(documents.LANGUAGES)}"


def broken_links(page):
    folder = (ROOT / page.name).parent
    for line, target in page.links():
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else ROOT / page.name
        if not file.exists():
            yield f"{line}: {target}: there is no such file"
        elif anchor:
            linked = page if not path else documents.Page(path, file.read_text())
            if anchor not in set(linked.anchors()):
                yield f"{line}: {target}: there is no such heading"


def missing_files(page):
    folders = "src|tests|conf|docs|benches|docker|fuzz|charts|.github"
    for line, text in [*page.spans(), *page.commands()]:
        for name in re.findall(rf"(?:^|\s)((?:{folders})/[\w./*-]*)", text):
            if not list(ROOT.glob(name.rstrip("/"))):
                yield f"{line}: {name}: there is no such file"


def unknown_tasks(page):
    """Commands of `./dev`, what they take, and the groups of tests that `cargo` is to run."""
    tasks = documents.dev_tasks()
    for line, text in [*page.spans(), *page.commands()]:
        for task, name in re.findall(r"(?:^|\s)\./dev ([a-z]+)(?: ([a-z]+))?", text):
            if task not in tasks or (task == "bench" and name and not (ROOT / f"benches/{name}.sh").exists()):
                yield f"{line}: {text}: ./dev does no such thing"
        for group in re.findall(r"^cargo .*--test ([a-z]+)", text):
            if not (ROOT / f"tests/it/{group}/main.rs").exists():
                yield f"{line}: {text}: there is no such group of tests"


def unknown_metrics(page):
    metrics = known_metrics()
    for line, text in enumerate(page.text.splitlines(), 1):
        for name in re.findall(r"\bvllm_lb_[a-z_]*[a-z]\b", text):
            family = re.sub("_(bucket|sum|count)$", "", name)
            if not {name, family} & (metrics | OTHER_NAMES):
                yield f"{line}: {name}: docs/metrics.md has no such metric"


def unknown_keys(page):
    keys = known_keys()
    sections = {re.split(r"[.\[]", key)[0] for key in keys}
    for line, span in page.spans():
        path = re.match(r"^[a-z_]+(\[\])?(\.[a-z_]+(\[\])?)+$", span)
        if path and re.split(r"[.\[]", span)[0] in sections and span not in keys | OTHER_NAMES:
            yield f"{line}: {span}: conf/lb.yaml has no such key"


def unknown_flags(page):
    flags = known_flags()
    texts = [(line, span) for line, span in page.spans() if span.startswith(("-", "vllm-lb "))]
    texts += [(line, command) for line, command in page.commands() if command.startswith("vllm-lb ")]
    for line, text in texts:
        for flag in re.findall(r"(?:^|\s)(--?[a-zA-Z][\w-]*)", text):
            if flag not in flags:
                yield f"{line}: {flag}: --help names no such flag"


def unknown_variables(page):
    files = ("tests/it/config/corpus.rs", "tests/it/common/redis.rs")
    tests = "".join((ROOT / file).read_text() for file in files)
    # The operator chooses how the names of variables with keys end.
    keys = re.search(r'KEY_VARIABLE_PREFIX: &str = "(\w+)"', source())[1]
    for line, text in page.prose():
        for name in re.findall(r"\bVLLM_LB_[A-Z_]+\b", text):
            if name not in helps() + tests and not name.startswith(keys):
                yield f"{line}: {name}: neither --help nor the tests name such a variable"


def unknown_records(page):
    code = source()
    for line, record in records(page):
        if f'"{record}"' not in code:
            yield f"{line}: {record!r}: the product logs no such record"


def records(page):
    """The log records that a page names: behind the word, or in the column of that name."""
    column = None
    for line, text in page.lines():
        cells = [cell.strip() for cell in text.strip("| ").split(" | ")]
        if not text.startswith("|"):
            column = None
            for record in re.findall(r"records? `([^`]+)`", text):
                yield line, record
        elif "log record" in cells:
            column = cells.index("log record")
        elif column is not None and column < len(cells):
            for record in documents.SPAN.findall(cells[column]):
                if "=" not in record and not record.startswith("-"):
                    yield line, record


def wrong_commands(page):
    """Commands that are not run: the command line of each is at least understood, and its files are there."""
    for line, command in page.commands():
        words = command.split("#")[0].split()
        if words[:1] != ["vllm-lb"] or words[1:2] in SUBCOMMANDS:
            continue
        given = [word for word in words[1:] if word not in ("-t", "--test", "&")]
        given = [re.sub(r"^/etc/vllm-lb/lb\.yaml$|^lb\.yaml$", "conf/lb.yaml", word) for word in given]
        code, said = run([harness.binary(), *given, "--test"])
        if code != 0:
            yield f"{line}: {command}: {said}"


def wrong_settings(page):
    for block in page.blocks():
        if block.language == "yaml" and not block.chart:
            said = problem_of(block.text)
            if said:
                yield f"{block.line}: {said}"


def problem_of(settings):
    """What `--test` says of a configuration, which may be a part of one."""
    if not re.search(r"^upstreams:", settings, re.MULTILINE):
        settings += "\nupstreams: [http://gpu-0:8000]\n"
    variables = {name: "x" for name in re.findall(r"\$\{(\w+)", settings)}
    check = [harness.binary(), "--config", "/dev/stdin", "--test"]
    code, said = run(check, input=settings, env={**os.environ, **variables})
    return "" if code == 0 else said or f"ended with {code}"


def unreadable_json(page):
    for block in page.blocks():
        if block.language == "json":
            try:
                json.loads(block.text)
            except ValueError as error:
                yield f"{block.line}: {error}"


CHECKS = (
    unknown_languages, broken_links, missing_files, unknown_tasks, unknown_metrics, unknown_keys,
    unknown_flags, unknown_variables, unknown_records, wrong_commands, wrong_settings, unreadable_json,
)


@by_name([*PAGES, documents.page("CHANGELOG.md")])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_a_page_names_is_there(page, check):
    assert list(check(page)) == []


# A mistake for each check.
MISTAKES = (
    (unknown_languages, "```sh\nls\n```\n"),
    (broken_links, "[a](nowhere.md)\n"),
    (broken_links, "[a](routing.md#nothing)\n"),
    (missing_files, "See `src/nothing.rs`.\n"),
    (missing_files, "```console\n$ docker build -f docker/nothing .\n```\n"),
    (unknown_tasks, "Run `./dev nothing`.\n"),
    (unknown_tasks, "Run `./dev bench nothing`.\n"),
    (unknown_tasks, "```console\n$ cargo nextest run --test nothing\n```\n"),
    (unknown_metrics, "The metric `vllm_lb_nothing_total` counts it.\n"),
    (unknown_keys, "Set `balance.nothing`.\n"),
    (unknown_flags, "Use `--nothing`.\n"),
    (unknown_flags, "```console\n$ vllm-lb engine --nothing\n```\n"),
    (unknown_variables, "Set `VLLM_LB_NOTHING`.\n"),
    (unknown_records, "The log has the record `nothing of this kind`.\n"),
    (unknown_records, "| a | log record |\n| --- | --- |\n| b | `nothing of this kind` |\n"),
    (wrong_commands, "```console\n$ vllm-lb gpu-0:8000\n```\n"),
    (wrong_settings, "```yaml\nbalance: {nothing: 1}\n```\n"),
    (unreadable_json, "```json\n{\n```\n"),
)


@pytest.mark.parametrize(("check", "text"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_each_check_finds_a_mistake(check, text):
    assert len(list(check(documents.Page("docs/page.md", text)))) == 1


def test_every_check_has_a_mistake():
    assert {check for check, _ in MISTAKES} == set(CHECKS)


# ---- commands ----------------------------------------------------------------------------------


def runnable(page):
    return [block for block in page.blocks() if block.language in ("bash", "python")]


# The README's commands are run against `./dev demo`, in test_readme.py.
RUN = [page for page in PAGES if page.name != "README.md" and runnable(page)]


def script_of(page):
    """The blocks of a page as one script, which prints a separator behind each."""
    parts = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || :; wait' EXIT"]
    for block in runnable(page):
        text = block.text
        if block.language == "python":
            text = f"{sys.executable} - <<'PYTHON'\n{text}PYTHON\n"
        # A process in the background has its own words.
        parts += [re.sub(r"(?m)^(.*\S) &$", r'\1 >>"$BACKGROUND_LOG" 2>&1 &', text), r"printf '\036'"]
    return "\n".join(parts) + "\n"


def with_free_ports(texts):
    """The same texts, with a free port in place of each that they name."""
    named = sorted({port for text in texts for port in PORTS.findall(text)})
    free = dict(zip(named, map(str, harness.free_ports(len(named))), strict=True))
    return [PORTS.sub(lambda found: free[found[1]], text) for text in texts]


def run_group(command, folder, environment):
    """Runs a command with all that it starts; its code, and what it prints."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)
    try:
        out, errors = child.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, errors = child.communicate()
    return child.returncode, out, errors


def run_page(page, folder):
    """Runs the blocks of a page beside `docker`, as in a checkout; the problems with what they print."""
    blocks, files = runnable(page), [block for block in page.blocks() if block.file]
    shown = [block.output or "" for block in blocks]
    script, *texts = with_free_ports([script_of(page), *(block.text for block in files), *shown])
    for block, text in zip(files, texts, strict=False):
        (folder / block.file).write_text(text)
    tools = folder / "bin"
    tools.mkdir()
    (tools / "vllm-lb").symlink_to(harness.binary())
    (folder / "docker").symlink_to(ROOT / "docker")
    log = folder / "background.log"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "BACKGROUND_LOG": str(log)}
    code, out, errors = run_group(["bash", "-c", script], folder, environment)
    printed = out.split("\x1e")
    outputs = zip(blocks, texts[len(files):], printed, strict=False)
    problems = [
        f"{page.name}:{block.line} printed\n{said}\nand not\n{output}"
        for block, output, said in outputs
        if block.output is not None and not documents.matches(output, said)
    ]
    if code != 0:
        words = log.read_text() if log.exists() else ""
        line = blocks[min(len(printed) - 1, len(blocks) - 1)].line
        problems.append(f"{page.name}:{line} ended with {code}\n{out}{errors}{words}")
    return problems


@by_name(RUN)
def test_the_commands_of_a_page_do_what_it_shows(page, tmp_path):
    problems = run_page(page, tmp_path)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "text",
    ["```bash\nfalse\n```\n", "```bash\necho a b\n```\n\n```text\na c\n```\n", "```python\n1 / 0\n```\n"],
)
def test_a_command_that_does_something_else_is_a_problem(text, tmp_path):
    assert len(run_page(documents.Page("docs/page.md", text), tmp_path)) == 1


def test_output_is_compared():
    assert documents.matches("a … c\n…\nlast\n", "a b c\nx\ny\nlast\n")
    assert documents.matches("…\nlast\n", "last\n")
    assert not documents.matches("a\nb\n", "a\n")
    assert not documents.matches("a …\n", "b c\n")


def test_there_is_something_to_run():
    pages = "getting-started routing virtual-models sessions operating fleet-on-one-machine".split()
    assert {page.name for page in RUN} >= {f"docs/{name}.md" for name in pages}
    assert any(block.output for page in RUN for block in runnable(page))


# ---- paths, and the statements over traces -----------------------------------------------------


def named_paths():
    """`METHOD /path` and `/path` in code style, with where they stand, unless only a beginning is named."""
    for page in PAGES:
        for line, span in page.spans():
            path = r"/(?!run/|etc/|usr/|var/)[a-z][\w/{}.…?=&-]*"
            found = re.match(rf"^(?:(GET|POST|PATCH|DELETE) )?({path})$", span)
            if found and not found[2].endswith(("/", "/v1")) and found[2] not in BEGINNINGS:
                yield f"{page.name}:{line}", found[1], found[2]


def call(url, method):
    request = urllib.request.Request(url, method=method, data=None if method == "GET" else b"")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            # A stream of events has no end.
            endless = answer.headers.get_content_type() == "text/event-stream"
            return answer.status, b"" if endless else answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def is_served(admin, method, path):
    """Whether a listener knows a path, whatever it says to a call without a body for what is not there."""
    path = re.sub(r"\{\w+\}|NAME", "nothing", path).replace("/v1/…", "/v1/models").replace("…", "nothing")
    for tried in [method] if method else ["GET", "POST"]:
        status, body = call(admin + path, tried)
        if status != 405 and b'"detail":"Not Found"' not in body.replace(b": ", b":"):
            return True
    return False


def test_the_paths_that_pages_name_are_served(stack):
    named = list(named_paths())
    assert len(named) > 30
    unknown = [
        (place, method, path)
        for place, method, path in named
        if path not in CONTROL_PATHS | SOCKETS and not is_served(stack.admin, method, path)
    ]
    assert not unknown
    assert not is_served(stack.admin, None, "/admin/nothing")
    assert not is_served(stack.admin, "DELETE", "/admin/usage")
    assert not any(is_served(stack.admin, None, path) for path in CONTROL_PATHS)


def test_the_statements_over_traces_find_them(tmp_path):
    engine, listen, admin = harness.free_ports(3)
    store = tmp_path / "traces.db"
    config = tmp_path / "lb.yaml"
    config.write_text(f'traces: {{store: "sqlite:{store}"}}\nupstreams: ["http://127.0.0.1:{engine}"]\n')
    engines = [harness.binary(), "engine", "--instant", "--port", str(engine)]
    balancer = [harness.binary(), "-c", config, "-l", f"127.0.0.1:{listen}", "-a", f"127.0.0.1:{admin}"]
    statements = [block for block in documents.page("docs/traces.md").blocks() if block.language == "sql"]
    assert len(statements) == 3
    with (
        harness.process(engines, f"http://127.0.0.1:{engine}/health"),
        harness.process(balancer, f"http://127.0.0.1:{listen}/health"),
    ):
        messages = [{"role": "user", "content": "Hello!"}]
        for _ in range(2):
            answer = ask(f"http://127.0.0.1:{listen}/sessions/rollout-17/v1/chat/completions", messages)
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "And then?"}]
        assert call(f"http://127.0.0.1:{admin}/admin/flush", "POST")[0] == 200
        last = json.loads(call(f"http://127.0.0.1:{admin}/sessions/rollout-17/traces", "GET")[1])[-1]
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as database:
            of_session, of_messages, of_ids = (rows(database, block.text, last) for block in statements)
    assert [row[0] for row in of_session] == ["rollout-17"] * 2
    said = [message["content"] for message in last["messages"]]
    assert [json.loads(turn)["content"] for _, turn in of_messages] == said
    assert [row[1] for row in of_ids] == last["prompt_token_ids"]


def rows(database, statement, trace):
    values = (trace["trace_id"],) if "?1" in statement else ()
    return database.execute(statement, values).fetchall()


def ask(url, messages):
    body = json.dumps({"model": "sim", "messages": messages, "max_tokens": 8}).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


# ---- the code, and pictures --------------------------------------------------------------------


def test_the_plot_is_drawn_from_the_committed_figures():
    plot = pathlib.Path(ROOT, "docs/plot.py")
    assert subprocess.run([sys.executable, plot, "--check"], timeout=60, check=False).returncode == 0


def test_the_design_page_has_a_row_for_every_module():
    crate = (ROOT / "src/lib.rs").read_text()
    modules = re.findall(r"^(?:pub(?:\(crate\))? )?mod (\w+);", crate, re.MULTILINE)
    spans = {span for _, span in documents.page("docs/design.md").spans()}
    assert len(modules) > 10
    assert [name for name in modules if not {f"src/{name}", f"src/{name}.rs"} & spans] == []


@pytest.mark.parametrize("name", ["README.md", "docs/routing.md"])
def test_measured_times_are_committed_figures(name):
    results = [(ROOT / f"benches/results/{name}.md").read_text() for name in ("simulate", "table")]
    figures = set(re.findall(r"\d+(?:\.\d+)?", " ".join(results)))
    text = " ".join(line for _, line in documents.page(name).lines())
    times = re.findall(r"\b(\d+(?:\.\d+)?) s\b", text)
    assert len(times) > 1
    assert [time for time in times if time not in figures] == []
