#!/usr/bin/env bash
# What capturing calls adds to an event of a stream and to the first event: benches/results/capture.md.
#
#   benches/capture.sh [--profile NAME] [--binary FILE] [--rounds N] [--streams N] [--seconds N]
#                      [--output FILE]
#
# How: as benches/proxies.sh, with two balancers over one server whose streams carry token ids and
# log-probabilities: one captures nothing, the other all calls, into memory. Samples take turns.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=5
streams=1000
seconds=3
RATE=1000
RATE_SECONDS=3
PATIENCE=100
declare -A port=([direct]=28600 [without]=28601 [capture]=28602) pid=()
declare -A admins=([without]=28603 [capture]=28604) store=([without]=none [capture]=memory)

source benches/proxies/common.sh

own_option() {
    case $1 in
        --streams) streams=$2 took=2 ;;
        --seconds) seconds=$2 took=2 ;;
    esac
}

options "$@"
ulimit -n $((streams * 4 + 1000))
build
start() {
    local name=$1
    sed -e "s|@listen@|${port[$name]}|; s|@upstream@|${port[direct]}|; s|@admin@|${admins[$name]}|" \
        benches/proxies/vllm-lb.yaml >"$dir/$name.yaml"
    echo "traces: {store: ${store[$name]}, capture: all}" >>"$dir/$name.yaml"
    taskset -c $proxy_cores "$binary" -c "$dir/$name.yaml" -q >"$dir/$name.log" 2>&1 &
    pid[$name]=$!
}
taskset -c $ends_cores "$traffic" upstream "${port[direct]}" --ids >"$dir/direct.log" 2>&1 &
pid[direct]=$!
for name in without capture; do
    start $name
    "$traffic" wait "${port[$name]}"
done

for ((round = 0; round < rounds; round++)); do
    for name in without capture; do
        sample event $name events "${port[$name]}" "$streams" "$seconds"
        sample first $name rate "${port[$name]}" 1600 $RATE $RATE_SECONDS
    done
done

row() {
    local title=$1 digits=$2 column=$3 case=$4 name cells=''
    for name in without capture; do
        cells+=" | $(round_to "$digits" "$(median "$column" "$case" "$name")")"
    done
    echo "| $title$cells |"
}
{
    echo "# What capturing calls adds"
    echo
    echo "\`$command\`, commit $(commit | joined), $(processor), $(nproc) cores; $(quietness)"
    echo "Medians of $rounds samples that took turns: $streams streams of 50 events a second, and $RATE short"
    echo "streams a second. Each event carries a token id and its log-probability, also without capture."
    echo
    echo "| | without capture | all calls, in memory |"
    echo "| --- | --- | --- |"
    row "CPU, us an event" 2 3 event
    row "first event, us, median" 0 8 first
    row "first event, us, 99 %" 0 9 first
} >"$output"
say "written: $output"
