#!/usr/bin/env bash
# Do sixteen balancers that exchange every 20 ms choose as well as one? All traffic of benches/simulate.sh on
# a virtual clock. The table goes to benches/results/balancers.md, below what is written there about it. Takes
# ten minutes, beside building.
#
#   benches/balancers.sh TRACE [BALANCERS] [SEEDS] [TRAFFIC]
#
# TRAFFIC is a word, such as agents: only traffic with that word is replayed, and the table is printed.
#
#   PROFILE=quick benches/balancers.sh TRACE    without the long link of a release
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 1; }
trace=$(realpath "$1")
cd "$(dirname "$0")/.."

balancers=${2:-16}
seeds=${3:-8}
only=${4:-}
profile=${PROFILE:-release}
result=benches/results/balancers.md
binary=${BINARY:-}
if [ -z "$binary" ]; then
    cargo build --quiet --locked --profile "$profile"
    target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    binary=$target/$profile/vllm-lb
fi

traffic=(
    "--trace $trace --upstreams 8" "--trace $trace --upstreams 16" "--trace $trace --upstreams 16 --rate 2"
    "--trace $trace --upstreams 16 --rate 0.5" "--trace $trace --upstreams 6"
    "--shape agents --upstreams 12" "--shape agents --upstreams 12 --rate 1.2"
    "--shape agents --upstreams 12 --closed" "--shape agents --upstreams 10 --closed"
    "--shape agents --upstreams 8 --rate 0.5 --closed"
)
for shape in rag rollouts apps reasoning; do traffic+=("--shape $shape --rate 0.6" "--shape $shape"); done

# One JSON object a line of all replays with these arguments, each with another seed.
replay() {
    for seed in $(seq "$seeds"); do "$binary" simulate "$@" --policies work --json --seed "$seed"; done
}

# The row of one traffic: $1 its name, $2 and $3 the replays by one balancer and by all.
row() {
    python3 - "$@" <<'PYTHON'
import json, statistics, sys

name = sys.argv[1]
one, many = ([json.loads(line) for line in text.splitlines()] for text in sys.argv[2:4])


def of(rows, key):
    return [row[key] for row in rows]


def mean(rows, key):
    return statistics.fmean(of(rows, key))


def change(key):
    return f"{100 * (mean(many, key) / mean(one, key) - 1):+.1f} %"


# The same seed is the same traffic: only the differences of pairs are chance.
pairs = [b - a for a, b in zip(of(one, "ttft_mean"), of(many, "ttft_mean"))]
error = statistics.stdev(pairs) / len(pairs) ** 0.5 / mean(one, "ttft_mean") if len(pairs) > 1 else 0
cells = [f"`{name}`"]
for key in ("ttft_mean", "ttft_p90"):
    cells += [f"{mean(one, key):.3g}", f"{mean(many, key):.3g}", f"**{change(key)}**"]
cells += [change("end_to_end"), f"{100 * error:.1f} %"]
print("|", " | ".join(cells), "|")
PYTHON
}

table() {
    printf '\n`PROFILE=%s benches/balancers.sh conversation_trace.jsonl %s %s %s` at %s.\n\n' \
        "$profile" "$balancers" "$seeds" "$only" "$(git rev-parse --short HEAD)"
    echo "| traffic | mean | of $balancers | change | p90 | of $balancers | change | to the end | error |"
    echo "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for arguments in "${traffic[@]}"; do
        case $arguments in *"$only"*) ;; *) continue ;; esac
        # shellcheck disable=SC2086
        one=$(replay $arguments)
        # shellcheck disable=SC2086
        many=$(replay $arguments --balancers "$balancers" --interval 20ms)
        row "${arguments//$trace/conversation_trace.jsonl}" "$one" "$many" | tee >(cat >&2)
    done
}

if [ -n "$only" ]; then
    table 2>/dev/null
    exit
fi
{
    sed '/^## The table/q' $result
    table
} >$result.new
mv $result.new $result
echo "balancers: $result"
