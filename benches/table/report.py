#!/usr/bin/env python3
"""Makes table.md and its plots from the samples of benches/table.sh.

    benches/table/report.py DIRECTORY            writes them beside DIRECTORY/table, which has the samples
    benches/table/report.py DIRECTORY --check    ends with 1 when what is there is not what the samples give

It ends with 2 when a row is missing, or when a number cannot be. A line of samples has a case, the name of
a proxy or balancer, and numbers: benches/proxies/traffic.rs and benches/table/player.rs say which.
"""

import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import plot  # noqa: E402

BODIES = {"1600": "1.6 KB", "17000": "17 KB", "100000": "100 KB", "400000": "400 KB"}
NAMES = {
    "pingora": "pingora-proxy",
    "two": "vllm-lb, two threads",
    "clock": "vllm-lb, virtual clock",
    "vllm-router-kv": "vllm-router, kv_aware",
}
ROUTED = {
    "nginx": "nginx, least_conn",
    "haproxy": "haproxy, hash of the prompt",
    "sglang-router": "sglang-router, cache_aware",
    "vllm-router": "vllm-router, cache_aware",
}
TRAFFIC = {
    "conversation": "Conversations (trace)",
    "agents": "Agents, turns by the clock",
    "agents-closed": "Agents, each turn after the answer",
    "rag": "Questions to documents (RAG)",
}

# The columns of samples, by their position behind case and name.
CPU, FOREIGN, RATE, BUSY, ENDS, MEDIAN, P99, KIB, FAILED = range(9)
# Those of a row of routing.
REQUESTS, LOST, MEAN, P50, P90, LAST, HITS, END, MOST, BALANCER, PROGRAMS, OTHERS = range(12)

# Where the scales of plots begin.
PLOT_LEFT = 200

# A proxy that delivers fewer of the events that are due does not keep the pace.
PACE_SHARE = 0.98
# Above this share of the machine's cores, a row of routing measures the machine too.
BUSY_SHARE = 0.85
# Cores that other programs may use during a row of routing.
MAX_OTHERS = 0.3


class Part:
    """The samples of one part, and what is known about their run."""

    def __init__(self, text):
        head, _, body = text.partition("\n\n")
        self.facts = dict(line.split(": ", 1) for line in head.splitlines())
        self.proxies = self.facts["proxies"].split()
        self.body = body.rstrip("\n")
        self.samples = {}
        self.traffic = {}
        for line in filter(None, body.splitlines()):
            case, name, *numbers = line.split()
            if case == "traffic":
                self.traffic[name] = [float(number) for number in numbers]
            else:
                self.samples.setdefault((case, name), []).append([float(number) for number in numbers])

    def median(self, case, name, column=0):
        """The median of the rounds; `None` without a sample."""
        rows = self.samples.get((case, name))
        return statistics.median(row[column] for row in rows) if rows else None

    def cases(self):
        return list(dict.fromkeys(case for case, _ in self.samples))

    def names(self, case):
        """Those with a sample of the case, in the order of all tables."""
        order = [*self.proxies, "two", "clock"]
        at = self.proxies.index("vllm-router") + 1 if "vllm-router" in self.proxies else 0
        order.insert(at, "vllm-router-kv")
        return [name for name in order if (case, name) in self.samples]

    def cores(self):
        return float(self.facts["machine"].split()[0])

    def where(self):
        facts = self.facts
        return f"{facts['commit'].split(',')[0]}, {facts['date']}, {facts['machine']}"


def label(name):
    return NAMES.get(name, name)


def routed(name):
    return ROUTED.get(name, label(name))


def number(value, digits=1):
    return "no sample" if value is None else f"{value:.{digits}f}"


def table(head, rows, side="---:"):
    head = list(head)
    lines = ["| " + " | ".join(["", *head]) + " |", "| --- |" + f" {side} |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def ratio(part, case, name, column=CPU):
    """How often haproxy's figure that is."""
    own, other = part.median(case, name, column), part.median(case, "haproxy", column)
    return f" ({own / other:.2f})" if own and other and name != "haproxy" else ""


def costs(part):
    rows = []
    for name in part.proxies:
        cells = [number(part.median(body, name)) + ratio(part, body, name) for body in BODIES]
        rows.append([label(name), *cells])
    return table(BODIES.values(), rows)


def rates(part):
    rows = []
    for name in ["direct", *part.proxies]:
        rows.append([label(name), *(number(part.median(body, name, RATE), 0) for body in BODIES)])
    return table(BODIES.values(), rows)


def added(part, case, name, column):
    own, direct = part.median(case, name, column), part.median(case, "direct", column)
    return None if own is None or direct is None else own - direct


def times(part):
    rows = []
    for name in ["direct", *part.proxies]:
        cells = [label(name)]
        for body in BODIES:
            case = f"first-{body}"
            if name == "direct":
                pair = part.median(case, name, MEDIAN), part.median(case, name, P99)
            else:
                pair = added(part, case, name, MEDIAN), added(part, case, name, P99)
            cells.append(" / ".join(number(value, 0) for value in pair))
        rows.append(cells)
    return table(BODIES.values(), rows)


def streams(part):
    due = part.median("events", "direct", RATE)
    rows = []
    for name in part.proxies:
        rate, gap = part.median("events", name, RATE), added(part, "events", name, P99)
        pace = "" if rate is None or rate >= PACE_SHARE * due else " (does not keep the pace)"
        resident = part.median("resident", name)
        rows.append([
            label(name),
            number(part.median("events", name)) + ratio(part, "events", name),
            number(rate, 0) + pace,
            number(None if gap is None else gap / 1000, 2),
            number(None if resident is None else resident / 1024, 0),
        ])
    head = [
        "CPU us an event", "events a second", "added gap, 99 %, ms",
        "MiB resident after the requests",
    ]
    return table(head, rows)


def idle_streams(part, case):
    """How many idle streams there were: the limit of open files may allow fewer."""
    return f"{part.median(case, 'vllm-lb', 1) or 0:,.0f}"


def idle(part):
    cases = ("idle-1000", "idle-10000")
    rows = [[label(name), *(number(part.median(case, name)) for case in cases)] for name in part.proxies]
    return table((f"of {idle_streams(part, case)}" for case in cases), rows)


def crowd(part):
    rows = []
    for case in part.cases():
        for values in part.samples[case, "two"]:
            rows.append([
                f"{int(case.split('-')[1]):,}", number(values[RATE], 0), number(values[CPU]),
                number(values[BUSY], 2), number(values[ENDS], 2), number(values[KIB]),
                number(values[MEDIAN] / 1000, 0), number(values[P99] / 1000, 0), number(values[FAILED], 0),
            ])
    head = [
        "events a second", "CPU us an event", "cores, vllm-lb", "cores, ends", "KiB a stream",
        "gap, median, ms", "gap, 99 %, ms", "errors",
    ]
    return table(head, rows)


def is_disturbed(values):
    """Whether other programs used the machine during a row of routing."""
    return len(values) > OTHERS and values[OTHERS] > MAX_OTHERS


def routing(part, kind):
    engines, speed, minutes = part.traffic[kind]
    rows = []
    for name in part.names(kind):
        values = part.samples[kind, name][-1]
        used = sum(values[BALANCER:]) if len(values) > BALANCER else None
        busy = " (busy)" if used and used > BUSY_SHARE * part.cores() else ""
        busy = " (disturbed)" if is_disturbed(values) else busy
        rows.append([
            routed(name), number(values[REQUESTS], 0),
            *(number(values[column], 2) for column in (MEAN, P50, P90)),
            f"{100 * values[HITS]:.1f} %", number(values[END], 2), number(values[MOST], 2),
            number(values[LOST], 0), "" if used is None else number(used, 2) + busy,
        ])
    head = ["requests", "mean", "p50", "p90", "from caches", "to the end", "most", "failed", "cores in use"]
    text = f"{minutes:g} minutes, {engines:.0f} engines, {speed:g} times faster."
    return f"### {TRAFFIC[kind]}\n\n{text}\n\n{table(head, rows)}"


def runs(parts):
    """What is known about the run of each part."""
    rows = []
    for key in ("date", "commit", "command", "seconds", "machine", "versions"):
        quote = "`" if key == "command" else ""
        rows.append([key, *(f"{quote}{part.facts[key]}{quote}" for part in parts.values())])
    return table(parts, rows, "---")


def markdown(parts):
    text = (pathlib.Path(__file__).parent / "words.md").read_text()
    shown = {"runs": runs(parts)}
    empty = "Not measured."
    for key in ("costs", "rates", "times", "streams", "disturbance", "idle", "crowd", "routing"):
        shown[key] = empty
    if requests := parts.get("requests"):
        shown |= {
            "costs": costs(requests), "rates": rates(requests), "times": times(requests),
            "streams": streams(requests), "disturbance": requests.facts["disturbance"],
        }
    if "idle" in parts:
        shown["idle"] = idle(parts["idle"])
    if "crowd" in parts:
        shown["crowd"] = crowd(parts["crowd"])
    if part := parts.get("routing"):
        shown["routing"] = "\n\n".join(routing(part, kind) for kind in TRAFFIC if kind in part.traffic)
    for key, value in shown.items():
        text = text.replace(f"@{key}@", value)
    return text


def chart(part, caption, case, names, digits, column, unit, name_of=label, scale=1.0):
    """What `plot.page` takes for one case, without those that have no sample."""
    rows = [(name_of(name), part.median(case, name, column)) for name in names]
    rows = [(name, f"{value * scale:.{digits}f}") for name, value in rows if value]
    return caption, rows, unit, name_of("vllm-lb"), PLOT_LEFT


def plots(parts):
    """The plots that the samples suffice for, by name."""
    drawn = {}
    if part := parts.get("requests"):
        charts = [
            chart(part, f"CPU of a request with a body of {size}", body, part.proxies, 1, CPU, "us")
            for body, size in BODIES.items()
        ]
        drawn["table-requests.svg"] = plot.page(
            "CPU time of a proxy for one request, in microseconds",
            "CPU microseconds of one request, less is better",
            charts,
            part.where(),
        )
        memory = []
        if quiet := parts.get("idle"):
            count = idle_streams(quiet, "idle-10000")
            caption = f"memory of an idle stream, of {count}"
            memory = [chart(quiet, caption, "idle-10000", quiet.proxies, 1, 0, "KiB")]
        drawn["table-streams.svg"] = plot.page(
            "What streams cost a proxy",
            "What streams cost a proxy, less is better",
            [
                chart(part, "CPU of an event of a stream", "events", part.proxies, 1, CPU, "us"),
                *memory,
            ],
            part.where(),
        )
    if part := parts.get("routing"):
        # A disturbed row would speak against the balancer that happened to be measured then.
        quiet = {
            kind: [name for name in part.names(kind) if not is_disturbed(part.samples[kind, name][-1])]
            for kind in TRAFFIC if kind in part.traffic
        }
        charts = [
            chart(part, TRAFFIC[kind], kind, names, 2, MEAN, "s", routed)
            for kind, names in quiet.items() if "vllm-lb" in names
        ]
        drawn["table-routing.svg"] = plot.page(
            "Mean time to the first token through each balancer, in seconds",
            "Mean seconds to the first token, less is better",
            charts,
            part.where(),
        )
    return drawn


def expected(name, part):
    """The rows that a part has when nothing failed: pairs of case and name."""
    if name == "requests":
        both = [*BODIES, *(f"first-{body}" for body in BODIES), "events"]
        own = [("resident", one) for one in part.proxies]
        return [(case, one) for case in both for one in ["direct", *part.proxies]] + own
    if name == "idle":
        return [(case, one) for case in ("idle-1000", "idle-10000") for one in part.proxies]
    if name == "routing":
        return [(kind, one) for kind in part.traffic for one in ["clock", *part.proxies] if one != "pingora"]
    return [(case, "two") for case in part.cases() or ["crowd"]]


def problems(name, part):
    """What is missing in a part, and the numbers that cannot be."""
    found = [f"{name}: no sample of {case} with {one}" for case, one in expected(name, part)
             if (case, one) not in part.samples]
    for (case, one), rows in part.samples.items():
        for row in rows:
            if not is_sane(name, case, one, row):
                numbers = " ".join(f"{value:g}" for value in row)
                found.append(f"{name}: {case} with {one} cannot be: {numbers}")
    return found


def is_sane(name, case, proxy, row):
    if name == "routing":
        ordered = 0 < row[P50] <= row[P90] <= row[LAST] and 0 < row[MEAN] <= row[END]
        # Where queues grow for ever, others have late answers, which count as failed.
        late = 0 if proxy == "vllm-lb" else row[REQUESTS]
        return ordered and row[REQUESTS] > 0 and row[LOST] <= late and 0 <= row[HITS] <= 1 <= row[MOST]
    if case == "resident":
        return 0 < row[0] < 1e7
    if case.startswith("idle-"):
        # A few streams may fit into memory that the process had.
        return (row[0] > 0 or row[1] < 1000 and row[0] > -100) and row[0] < 1e4
    timed = not (case.startswith("first-") or len(row) > MEDIAN) or 0 < row[MEDIAN] <= row[P99]
    whole = len(row) <= FAILED or row[FAILED] == 0
    return timed and whole and 0 < row[CPU] < 1e6 and row[RATE] > 0 and row[BUSY] >= 0


def main(arguments):
    if not arguments or arguments[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    directory = pathlib.Path(arguments[0])
    order = ("requests", "idle", "crowd", "routing")
    files = {name: directory / f"table/{name}.txt" for name in order}
    parts = {name: Part(file.read_text()) for name, file in files.items() if file.exists()}
    made = {"table.md": markdown(parts), **plots(parts)}
    if arguments[1:]:
        return any(not (file := directory / name).exists() or file.read_text() != text
                   for name, text in made.items())
    for name, text in made.items():
        (directory / name).write_text(text)
    found = [problem for name, part in parts.items() for problem in problems(name, part)]
    for problem in found:
        print(f"table: {problem}", file=sys.stderr)
    return 2 if found or not parts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
