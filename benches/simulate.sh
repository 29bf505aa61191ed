#!/usr/bin/env bash
# How does each policy fare on a trace and on made-up traffic, on a virtual clock? The tables go to
# benches/results/simulate.md, below what is written there about them. Takes a minute, beside building.
#
#   benches/simulate.sh TRACE
#
#   PROFILE=quick benches/simulate.sh TRACE    without the long link of a release
set -euo pipefail
trace=$(realpath "$1")
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
result=benches/results/simulate.md

cargo build --quiet --locked --profile "$profile"
target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
binary=$target/$profile/vllm-lb

# A heading, and the tables of what follows it.
section() { printf '\n### %s\n' "$1"; }
show() {
    printf '\n```console\n$ vllm-lb simulate %s\n' "${*//$trace/conversation_trace.jsonl}"
    "$binary" simulate "$@"
    printf '```\n'
}
# The last row of a replay by several balancers, with the interval in place of the policy.
exchange() {
    printf '\n```text\n%s, work, seed 1 to 3\n' "${*//$trace/conversation_trace.jsonl}"
    for seed in 1 2 3; do
        for said in "--balancers 1" "--balancers 4" "--balancers 4 --interval 100ms" \
            "--balancers 4 --interval 500ms" "--balancers 4 --interval never"; do
            # shellcheck disable=SC2086
            row=$("$binary" simulate "$@" $said --seed $seed --policies work | tail -n 1)
            printf '%-32s%s\n' "$said" "${row#work}"
        done
    done
    printf '```\n'
}

{
    sed '/^## The tables/q' $result
    printf '\n`PROFILE=%s benches/simulate.sh conversation_trace.jsonl` at %s, on %s cores.\n' \
        "$profile" "$(git rev-parse --short HEAD)" "$(nproc)"
    section "Conversation trace"
    for upstreams in 8 16; do show --trace "$trace" --upstreams $upstreams; done
    show --trace "$trace" --upstreams 16 --seed 2
    show --trace "$trace" --upstreams 16 --rate 2
    show --trace "$trace" --upstreams 16 --rate 0.5
    show --trace "$trace" --upstreams 6
    section "Agents"
    for seed in 1 2 3 4; do show --shape agents --upstreams 12 --seed $seed; done
    show --shape agents --upstreams 12 --rate 1.2
    show --shape agents --upstreams 12 --closed
    show --shape agents --upstreams 10 --closed
    show --shape agents --upstreams 8 --rate 0.5 --closed
    section "Other shapes"
    for shape in rag rollouts apps reasoning; do
        for rate in 0.6 1; do show --shape $shape --rate $rate; done
        show --shape $shape --seed 2
    done
    section "Several balancers"
    exchange --trace "$trace" --upstreams 8
    exchange --trace "$trace" --upstreams 16
    exchange --shape agents --upstreams 12
    exchange --shape agents --upstreams 12 --closed
    exchange --shape rag
    exchange --shape rollouts
} >$result.new
mv $result.new $result
# The picture of docs/routing.md shows these figures.
docs/plot.py
echo "simulate: $result"
