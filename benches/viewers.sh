#!/usr/bin/env bash
# What it costs to be watched: viewers of GET /admin/live over a large fleet, and spans of every request.
# The tables go to benches/results/viewers.md.
#
#   benches/viewers.sh [--profile NAME] [--binary FILE] [--rounds N] [--upstreams N] [--rate N] [--seconds N]
#                      [--output FILE]
#
# How: as benches/proxies.sh, with one thread for each balancer, and short streams at a fixed rate. The first
# balancer has many upstreams, and is measured with 0, 1 and 20 viewers. The others have one upstream, and one
# of them exports a span with its child spans for each request. benches/viewers/ends.py is all upstreams and
# the collector. Samples take turns.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=5
upstreams=200
rate=300
seconds=5
VIEWERS=(0 1 20)
BYTES=1600
FIRST_UPSTREAM=28800
PATIENCE=300
readonly VIEWERS BYTES FIRST_UPSTREAM PATIENCE
declare -A port=([direct]=$FIRST_UPSTREAM [fleet]=28701 [without]=28702 [spans]=28703) pid=()
declare -A admins=([fleet]=28705 [without]=28706 [spans]=28707)

source benches/proxies/common.sh

own_option() {
    case $1 in
        --upstreams) upstreams=$2 took=2 ;;
        --rate) rate=$2 took=2 ;;
        --seconds) seconds=$2 took=2 ;;
    esac
}

options "$@"
ulimit -n 4096 2>/dev/null || ulimit -n "$(ulimit -Hn)"
build

begin direct "$ends_cores" python3 benches/viewers/ends.py $FIRST_UPSTREAM "$upstreams"

# begin_balancer NAME UPSTREAMS [LINES]: a balancer over so many upstreams.
begin_balancer() {
    local name=$1 list
    list=$(seq -s , -f "'http://127.0.0.1:%.0f'" $FIRST_UPSTREAM $((FIRST_UPSTREAM + $2 - 1)))
    cat >"$dir/$name.yaml" <<END
listen: 127.0.0.1:${port[$name]}
admin: {address: "127.0.0.1:${admins[$name]}"}
upstreams: [$list]
threads: 1
${3:-}
END
    begin "$name" "$proxy_cores" "$binary" -c "$dir/$name.yaml" --quiet
}

# watch COUNT: so many viewers, and none else. Each has its own connection.
watch() {
    local name at
    for name in "${!pid[@]}"; do [[ $name != viewer* ]] || end "$name"; done
    for ((at = 0; at < $1; at++)); do
        taskset -c "$ends_cores" curl --silent --no-buffer --output /dev/null \
            "http://127.0.0.1:${admins[fleet]}/admin/live" &
        pid[viewer$at]=$!
    done
    # The first overviews, and the ends of the viewers before.
    sleep 2
    for ((at = 0; at < $1; at++)); do
        kill -0 "${pid[viewer$at]}" || { say "a viewer left" >&2; exit 1; }
    done
}

begin_balancer fleet "$upstreams"
bytes=$(curl --silent --fail "http://127.0.0.1:${admins[fleet]}/admin/overview" | wc -c)
for ((round = 0; round < rounds; round++)); do
    for count in "${VIEWERS[@]}"; do
        watch "$count"
        sample "viewers-$count" fleet rate "${port[fleet]}" $BYTES "$rate" "$seconds"
    done
done
watch 0
end fleet

begin_balancer without 1
begin_balancer spans 1 "otlp: {endpoint: 'http://127.0.0.1:$FIRST_UPSTREAM', sample: 1.0}"
for ((round = 0; round < rounds; round++)); do
    for name in without spans; do
        sample chat $name rate "${port[$name]}" $BYTES $((3 * rate)) "$seconds"
    done
done
# The last batch.
sleep 2
curl --silent --fail --output "$dir/metrics" "http://127.0.0.1:${admins[spans]}/metrics"
exported=$(awk '/^vllm_lb_spans_total.*"exported"/ { print $2 }' "$dir/metrics")
lost=$(awk '/^vllm_lb_spans_total/ && !/"exported"/ { sum += $2 } END { print sum + 0 }' "$dir/metrics")
[ "${exported:-0}" -gt 0 ] || { say "no span was exported" >&2; exit 1; }

# On a busy machine every try of a sample may fail.
for case in $(printf 'viewers-%s ' "${VIEWERS[@]}") without spans; do
    grep -q -s -w -e "$case" "$samples" && continue
    say "no sample of $case: try again on a quiet machine" >&2
    exit 1
done

# The share of a core, in percent, that a case takes: microseconds a request times requests a second.
share() {
    awk -v c="$1" '$1 == c { print $3 * $5 / 1e4 }' "$samples" | sort -g |
        awk '{ v[NR] = $1 } END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'
}
none=$(share viewers-0)
{
    echo "# What it costs to be watched"
    echo
    echo "\`$command\`, commit $(commit | joined), $(processor), $(nproc) cores; $(quietness)"
    echo "Medians of $rounds samples that took turns, of $seconds s each."
    echo
    echo "## Viewers of \`GET /admin/live\`"
    echo
    echo "$upstreams upstreams, $rate short streams a second; a document of $bytes bytes each second."
    echo
    echo "| viewers | CPU, % of a core | for each viewer, % of a core |"
    echo "| --- | --- | --- |"
    for count in "${VIEWERS[@]}"; do
        case_share=$(share "viewers-$count")
        each=$(awk -v a="$none" -v b="$case_share" -v n="$count" \
            'BEGIN { if (n) printf "%.2f", (b - a) / n; else print "" }')
        echo "| $count | $(round_to 2 "$case_share") | $each |"
    done
    echo
    echo "## Spans"
    echo
    echo "$((3 * rate)) short streams a second over one upstream; \`otlp.sample\` is 1. $exported spans were"
    echo "exported, and $lost were lost."
    echo
    echo "| | without \`otlp.endpoint\` | with it |"
    echo "| --- | --- | --- |"
    cells=("$(round_to 2 "$(median 3 chat without)")" "$(round_to 2 "$(median 3 chat spans)")")
    echo "| CPU, us a request | ${cells[0]} | ${cells[1]} |"
} >"$output"
say "written: $output"
