"""Makes the table of benches/sessions.sh from its rows."""

import json
import os
import platform
import subprocess
import sys


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def row(line):
    name, before, after, memory, stored, found, result = line.split(" ", 6)
    result = json.loads(result)
    requests = max(result["requests"], 1)
    cpu = (float(after) - float(before)) / requests
    return {
        "name": name,
        "requests": requests,
        "failed": result["failed"],
        "cpu_us": cpu * 1e6,
        "memory": int(memory),
        "stored": int(stored) / requests,
        "traces": int(found),
        "p50": result["p50_ms"],
        "p99": result["p99_ms"],
        "rate": result["per_second"],
    }


def main():
    path, sessions, turns, tokens, command = sys.argv[1:6]
    with open(path, encoding="utf-8") as lines:
        rows = [row(line) for line in lines]
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False)
    print("# Recording sessions\n")
    print(f"`{command}`, commit {commit.stdout.strip()}, {machine()}.")
    print(f"{sessions} sessions of {turns} turns, each of which repeats a conversation that begins with")
    print(f"{tokens} prompt tokens; rllm-model-gateway has fewer. CPU is that of the gateway's process,")
    print("which has one core; memory is its peak; bytes are those of the store on disk;")
    print("traces are counted in the store afterwards.\n")
    columns = ["gateway", "requests", "failed", "traces", "CPU, us a request", "requests/s a core"]
    columns += ["peak MiB", "bytes a turn", "p50 ms", "p99 ms"]
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for one in rows:
        core = f"{1e6 / one['cpu_us']:.0f}" if one["cpu_us"] else ""
        cells = [one["name"], one["requests"], one["failed"], one["traces"], f"{one['cpu_us']:.0f}", core]
        cells += [one["memory"]]
        cells += [f"{one['stored']:.0f}", f"{one['p50']:.1f}", f"{one['p99']:.1f}"]
        print("| " + " | ".join(str(cell) for cell in cells) + " |")


main()
