#!/usr/bin/env bash
# What recording sessions costs, in vllm-lb and in rllm-model-gateway, over one simulated engine:
# benches/results/sessions.md. `./dev bench sessions` installs what is missing and runs this.
#
#   benches/sessions.sh [--profile NAME] [--binary FILE] [--sessions N] [--turns N] [--tokens N] [--share N]
#                       [--output FILE]
#
#   --sessions  sessions at a time; each repeats its conversation at every turn
#   --tokens    prompt tokens of the first turn
#   --share     rllm-model-gateway serves one session in so many, as it takes that much longer
#
# How: the gateway has one core, the engine and the clients share another. What counts is the CPU time of the
# gateway's process, the most memory that it had, and the bytes that its store takes on disk. Each gateway
# serves the same conversations. The script fails if a trace of vllm-lb is not in its store afterwards.
# Everything stays on loopback and ends with the script.
set -euo pipefail
cd "$(dirname "$0")/.."

sessions=1000
turns=20
tokens=8000
share=20
stream=0
declare -A port=([engine]=28500 [gateway]=28501 [admin]=28502) pid=()

source benches/proxies/common.sh
examples=(session-load)

own_option() {
    case $1 in
        --sessions) sessions=$2 took=2 ;;
        --turns) turns=$2 took=2 ;;
        --tokens) tokens=$2 took=2 ;;
        --share) share=$2 took=2 ;;
        --stream) stream=1 took=1 ;;
    esac
}

options "$@"
build
load=${CARGO_TARGET_DIR:-target}/${profile/#dev/debug}/examples/session-load
gateway=.dev/venv/bin/rllm-model-gateway
ticks=$(getconf CLK_TCK)

cpu() { awk -v ticks="$ticks" '{print ($14 + $15) / ticks}' "/proc/$1/stat"; }
peak() { awk '/VmHWM/ {print int($2 / 1024)}' "/proc/$1/status"; }

wait_for() {
    local tries=0
    until curl --silent --fail --output "$dir/ready" "$1"; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || { say "$1 does not answer" >&2; exit 1; }
        sleep 0.1
    done
}

# One engine that answers at once, for each gateway anew: what its cache holds is no matter here.
start_engine() {
    taskset -c $ends_cores "$binary" engine --port "${port[engine]}" --instant --quiet \
        >"$dir/engine.log" 2>&1 &
    pid[engine]=$!
    wait_for "http://127.0.0.1:${port[engine]}/health"
}

# The traces of all sessions, as the API of a gateway at this URL counts them.
traces() {
    curl --silent --fail --max-time 60 "$1/sessions" |
        python3 -c 'import json, sys; print(sum(one["trace_count"] for one in json.load(sys.stdin)))'
}

# sample NAME SESSIONS URL API: one row. API: where the gateway counts what it has stored; - for none.
sample() {
    local name=$1 count=$2 url=$3 api=$4 before after result stored=0 found=0
    before=$([ "$name" = direct ] && echo 0 || cpu "${pid[gateway]}")
    result=$(taskset -c $ends_cores "$load" --url "$url" --sessions "$count" --concurrent "$count" \
        --turns "$turns" --prompt-tokens "$tokens" --stream $stream \
        --plain "$([ "$name" = direct ] && echo 1 || echo 0)")
    [ "$api" = - ] ||
        curl --silent --max-time 60 --request POST "$api/admin/flush" --output "$dir/flush" || true
    after=$([ "$name" = direct ] && echo 0 || cpu "${pid[gateway]}")
    [ ! -d "$dir/store" ] || stored=$(du --bytes --summarize "$dir/store" | cut -f1)
    local memory=0
    [ "$name" = direct ] || memory=$(peak "${pid[gateway]}")
    [ "$api" = - ] || found=$(traces "$api") || found=0
    echo "$name $before $after $memory $stored $found $result" | tee -a "$dir/rows" >&2
    if [ "$api" != - ] && [[ $name == vllm-lb-* ]] && [ "$found" != $((count * turns)) ]; then
        say "of $((count * turns)) traces $found are stored" >&2
        exit 1
    fi
}

# run NAME SESSIONS API COMMAND...: a gateway's whole run.
run() {
    local name=$1 count=$2 api=$3
    shift 3
    say "$name"
    rm -rf "$dir/store"
    mkdir "$dir/store"
    start_engine
    taskset -c $proxy_cores "$@" >"$dir/$name.log" 2>&1 &
    pid[gateway]=$!
    wait_for "http://127.0.0.1:${port[gateway]}/health"
    sample "$name" "$count" "http://127.0.0.1:${port[gateway]}" "$api"
    end gateway
    end engine
}

balancer() {
    cat >"$dir/lb.yaml" <<YAML
upstreams: ["http://127.0.0.1:${port[engine]}"]
listen: 127.0.0.1:${port[gateway]}
admin: {address: "127.0.0.1:${port[admin]}"}
threads: 1
limits: {connections: 0}
traces: {store: "$1", queue: 100000}
YAML
    local api=http://127.0.0.1:${port[admin]}
    [ "$1" != none ] || api=-
    run "vllm-lb-${1%%:*}" "$sessions" "$api" \
        "$binary" --config "$dir/lb.yaml" -q
}

fewer=$(((sessions + share - 1) / share))
rows() {
    python3 benches/sessions/report.py "$dir/rows" "$sessions" "$turns" "$tokens" "$command"
}

start_engine
sample direct "$fewer" "http://127.0.0.1:${port[engine]}" -
end engine
balancer none
balancer memory
balancer "sqlite:$dir/store/traces.db"
for store in memory sqlite; do
    run "rllm-model-gateway-$store" "$fewer" "http://127.0.0.1:${port[gateway]}" \
        "$gateway" --host 127.0.0.1 --port "${port[gateway]}" --worker "http://127.0.0.1:${port[engine]}/v1" \
        --store "$store" --db-path "$dir/store/traces.db" --log-level WARNING
done
rows >"$output"
say "written: $output"
