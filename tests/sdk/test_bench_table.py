"""The table of `./dev bench`: what `benches/table/report.py` makes of samples, and when it refuses them."""

import pathlib
import subprocess
import sys

import pytest

import documents

ROOT = documents.ROOT
REPORT = pathlib.Path(ROOT, "benches/table/report.py")
RESULTS = pathlib.Path(ROOT, "benches/results")

HEAD = """date: 2026-01-02
commit: 0123456
command: ./dev bench --quick
seconds: 12
machine: 2 cores, a processor, Linux 6.1
versions: nginx 1, vllm-lb 1
proxies: {proxies}
"""


def request_samples(proxies):
    lines = []
    for at, name in enumerate(["direct", *proxies]):
        for body in ("1600", "17000", "100000", "400000"):
            lines.append(f"{body} {name} {10 + at} 0.01 30000 0.9 0.8")
            lines.append(f"first-{body} {name} {20 + at} 0.01 1500 0.2 0.1 {100 + 50 * at} {900 + 50 * at}")
        gaps = f"20000 {21000 + 500 * at} 30.0 0"
        lines.append(f"events {name} {12 + at} 0.01 {50000 - 9000 * at} 0.6 0.5 {gaps}")
    for name in proxies:
        lines.append(f"resident {name} 2048")
    return lines


def idle_samples(proxies):
    rows = [f"idle-1000 {name} 30.5 1000" for name in proxies]
    return rows + [f"idle-10000 {name} 29.5 9900" for name in proxies]


def routed_samples(proxies):
    row = "800 0 {mean} 0.7 2.5 6.0 0.23 9.1 1.2 0.3 0.6 0.1"
    lines = ["traffic rag 8 10 4", "rag clock 800 0 1.1 0.7 2.5 6.0 0.23 9.1 1.2"]
    return lines + [f"rag {name} {row.format(mean=1.5 + at)}" for at, name in enumerate(proxies)]


@pytest.fixture
def samples(tmp_path):
    """Writes the samples of all parts, with changes, and returns their directory."""

    def write(change=lambda name, lines: lines):
        (tmp_path / "table").mkdir(exist_ok=True)
        proxies = ["haproxy", "vllm-lb"]
        parts = {
            "requests": request_samples(proxies),
            "idle": idle_samples(proxies),
            "crowd": ["crowd-10000 two 20.0 0.01 20000 0.5 0.9 500000 530000 25.0 0"],
            "routing": routed_samples(proxies),
        }
        for name, lines in parts.items():
            head = HEAD.format(proxies=" ".join(proxies))
            head += "disturbance: none\n" if name == "requests" else ""
            (tmp_path / f"table/{name}.txt").write_text(head + "\n" + "\n".join(change(name, lines)) + "\n")
        return tmp_path

    return write


def report(*arguments):
    return subprocess.run(
        [sys.executable, REPORT, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_table_has_a_row_for_every_proxy_and_its_plots(samples):
    directory = samples()
    made = report(directory)
    assert (made.returncode, made.stderr) == (0, "")
    table = (directory / "table.md").read_text()
    assert "@" not in table
    # CPU and its multiple of haproxy's, requests a second, added times.
    assert "| vllm-lb | 12.0 (1.09) | 12.0 (1.09) | 12.0 (1.09) | 12.0 (1.09) |" in table
    assert "| direct | 30000 | 30000 | 30000 | 30000 |" in table
    assert "| haproxy | 50 / 50 | 50 / 50 | 50 / 50 | 50 / 50 |" in table
    assert "|  | of 1,000 | of 9,900 |" in table
    assert "| vllm-lb | 30.5 | 29.5 |" in table
    # The pace of events, the added gap and memory.
    assert "| vllm-lb | 14.0 (1.08) | 32000 (does not keep the pace) | 1.00 | 2 |" in table
    assert "| 10,000 | 20000 | 20.0 | 0.50 | 0.90 | 25.0 | 500 | 530 | 0 |" in table
    assert "| vllm-lb | 800 | 2.50 | 0.70 | 2.50 | 23.0 % | 9.10 | 1.20 | 0 | 1.00 |" in table
    for name in ("table-requests.svg", "table-streams.svg", "table-routing.svg"):
        picture = (directory / name).read_text()
        assert "0123456, 2026-01-02, 2 cores, a processor" in picture
        assert "prefers-color-scheme: dark" in picture
    assert report(directory, "--check").returncode == 0
    (directory / "table.md").write_text(table.replace("30000", "60000"))
    assert report(directory, "--check").returncode == 1


def without(case, name):
    return lambda _, lines: [line for line in lines if not line.startswith(f"{case} {name} ")]


def replaced(old, new):
    return lambda _, lines: [line.replace(old, new) for line in lines]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without("17000", "vllm-lb"), "requests: no sample of 17000 with vllm-lb"),
        (without("first-400000", "direct"), "requests: no sample of first-400000 with direct"),
        (without("idle-10000", "haproxy"), "idle: no sample of idle-10000 with haproxy"),
        (without("rag", "haproxy"), "routing: no sample of rag with haproxy"),
        (without("crowd-10000", "two"), "crowd: no sample of crowd with two"),
        (replaced("25.0 0", "25.0 3"), "crowd: crowd-10000 with two cannot be"),
        (replaced("rag vllm-lb 800 0", "rag vllm-lb 799 1"), "routing: rag with vllm-lb cannot be"),
        (replaced("rag haproxy 800 0", "rag haproxy 300 500"), "routing: rag with haproxy cannot be"),
        (replaced("resident vllm-lb 2048", "resident vllm-lb 0"), "requests: resident with vllm-lb cannot"),
        (replaced("1600 direct 10 ", "1600 direct 0 "), "requests: 1600 with direct cannot be"),
        (replaced("0.1 150 950", "0.1 99 9"), "requests: first-1600 with haproxy cannot be"),
    ],
)
def test_a_row_that_is_missing_or_cannot_be_is_an_error(samples, change, problem):
    made = report(samples(change))
    assert made.returncode == 2
    assert f"table: {problem}" in made.stderr


def test_a_part_that_was_not_measured_is_said_to_be_so(samples):
    directory = samples()
    (directory / "table/routing.txt").unlink()
    assert report(directory).returncode == 0
    assert "Not measured." in (directory / "table.md").read_text()
    assert not (directory / "table-routing.svg").exists()


def test_the_committed_table_and_plots_are_those_of_the_committed_samples():
    assert list((RESULTS / "table").glob("*.txt"))
    assert report(RESULTS, "--check").returncode == 0
