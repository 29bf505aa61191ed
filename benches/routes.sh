#!/usr/bin/env bash
# What a route costs: CPU of vllm-lb for a request with a route that renames the model, and with one that
# edits, against none: benches/results/routes.md. `./dev bench routes` runs this.
#
#   benches/routes.sh [--profile NAME] [--rounds N] [--binary FILE] [--output FILE]
#
#   --profile   cargo's profile to build and measure; release, whose link takes minutes, is the default
#   --binary    measure this vllm-lb and do not build one
#   --output    where the result goes
#
# How: as benches/proxies.sh, with three processes of vllm-lb in place of three proxies. They take turns
# within half a second, and the ratios are of samples of one turn, so that a busy machine is busy for all of
# them. Streams are short and come in one piece, so that the cost of the request counts and not the answer's.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=9

# Seconds after which a noisy sample is not taken again.
PATIENCE=20
EVENTS=4
readonly PATIENCE EVENTS

# Body bytes, and requests for about half a second.
cases=("1600 8000" "17000 7000" "100000 4000" "400000 1500")
sizes=(1600 17000 100000 400000)
names=(none named edited)
declare -A port=([direct]=28410 [none]=28411 [named]=28412 [edited]=28413) pid=()
declare -A admins=([none]=28414 [named]=28415 [edited]=28416)
declare -A model=([none]=sim [named]=named [edited]=edited)

source benches/proxies/common.sh
options "$@"
build

# Lines of: case name ratio
ratios=$dir/ratios

begin_balancer() {
    local admin=${admins[$1]} file=routes.yaml
    [ "$1" != none ] || file=vllm-lb.yaml
    settings $file "$1"
    mv "$dir/$file" "$dir/$1.yaml"
    begin "$1" "$proxy_cores" "$binary" -c "$dir/$1.yaml"
}

# turn CASE BYTES COUNT OPTION...: a sample of each, one after another, and what the others are to the first.
turn() {
    local case=$1 bytes=$2 count=$3 name
    shift 3
    for name in "${names[@]}"; do
        sample "$case" "$name" requests "${port[$name]}" "$bytes" "$count" --model "${model[$name]}" "$@"
    done
    tail -n ${#names[@]} "$samples" | awk -v c="$case" '
        $1 != c { bad = 1 }
        NR == 1 { none = $3; bad = $2 != "none" }
        { of[$2] = $3 / none }
        END { if (!bad) for (name in of) print c, name, of[name] }' >>"$ratios"
}

begin direct "$ends_cores" "$traffic" upstream "${port[direct]}"
SECONDS=0
for name in "${names[@]}"; do begin_balancer "$name"; done
for ((round = 0; round < rounds; round++)); do
    for case in "${cases[@]}"; do
        read -r bytes count <<<"$case"
        turn "stream-$bytes" "$bytes" "$count" --burst $EVENTS
        turn "whole-$bytes" "$bytes" "$count"
    done
done
seconds=$SECONDS

# ---- the result --------------------------------------------------------------------------------

# ratio CASE NAME: the median, with the least and the most.
ratio() {
    awk -v c="$1" -v p="$2" '$1 == c && $2 == p { print $3 }' "$ratios" | sort -g | awk '
        { v[NR] = $1 }
        END { printf "%.2f (%.2f to %.2f)", (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2, v[1], v[NR] }'
}

# table KIND: a line for each of the balancers, and one for what it is to the first.
table() {
    local name bytes row
    echo '| | 1.6 KB | 17 KB | 100 KB | 400 KB |'
    echo '| --- | --- | --- | --- | --- |'
    for name in "${names[@]}"; do
        row=("$name, us")
        for bytes in "${sizes[@]}"; do row+=("$(round_to 1 "$(median 3 "$1-$bytes" "$name")")"); done
        printf '| %s ' "${row[@]}"
        echo '|'
    done
    for name in "${names[@]:1}"; do
        row=("$name / none")
        for bytes in "${sizes[@]}"; do row+=("$(ratio "$1-$bytes" "$name")"); done
        printf '| %s ' "${row[@]}"
        echo '|'
    done
}

report() {
    cat <<END
# What a route costs

| | |
| --- | --- |
| date | $(date -u +%Y-%m-%d) |
| commit | $(commit | joined) |
| command | \`$command\`, $seconds s |
| machine | $(nproc) cores, $(processor), Linux $(uname -r) |
| versions | $("$binary" --version), profile $profile |
| disturbance | $(quietness) |

CPU microseconds of the balancer for a chat request with a body of so many bytes (32 connections, distinct
bodies): medians of $rounds rounds. "None" has no routes, "named" a route with another name for the model, and
"edited" one that also sets, adds, removes and nests fields and changes a role
([benches/proxies/routes.yaml](../proxies/routes.yaml)). Below them, the medians of the ratios of samples that
were taken one after another, with the least and the most of them.

Streams of $EVENTS events in one piece:

$(table stream)

Answers of 1 KiB that are no streams:

$(table whole)

All samples, each with: case, balancer, CPU microseconds a request, cores that others used of those in use,
requests a second, cores that the balancer used, cores that clients and upstream used.

\`\`\`text
$(sort -s -k 1,1V -k 2,2 "$samples")
\`\`\`
END
}

mkdir -p "$(dirname "$output")"
report >"$output"
say "$output, after $seconds s"
