#!/usr/bin/env bash
# What a request, an event of a stream and an idle stream cost in nginx, haproxy and vllm-lb, side by side
# in one run: benches/results/proxies.md. `./dev bench proxies` installs what is missing and runs this.
#
#   benches/proxies.sh [--profile NAME] [--rounds N] [--binary FILE] [--output FILE]
#
#   --profile   cargo's profile to build and measure; release, whose link takes minutes, is the default
#   --binary    measure this vllm-lb and do not build one
#   --output    where the result goes
#
# How: each proxy has one thread, pinned to one core; the server behind it and the clients before it
# (benches/proxies/traffic.rs) share another. What counts is the CPU time that the scheduler notes for the
# proxy's process, which says what it costs whether or not anybody is waiting; requests a second, where
# the ends are the bottleneck, would not. Samples take turns between the proxies. One during which others
# used more than NOISE of these cores is taken again, a few times. Everything stays on loopback and ends
# with the script; the whole takes less than six minutes, the build not counted.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=3

# Seconds after which a noisy sample is not taken again.
PATIENCE=150
STREAMS=1000
readonly PATIENCE STREAMS

# Body bytes, and requests for about a second.
cases=("1600 40000" "17000 30000" "100000 10000" "400000 3000")
proxies=(nginx haproxy vllm-lb)
declare -A port=([direct]=28400 [nginx]=28401 [haproxy]=28402 [vllm-lb]=28403) pid=()
admin=28404

export PATH=$PATH:/usr/sbin
source benches/proxies/common.sh
options "$@"
for tool in nginx haproxy taskset; do
    command -v $tool >/dev/null || { say "no $tool here; ./dev bench proxies installs it" >&2; exit 1; }
done

build
# A stream needs two sockets in a proxy.
ulimit -n 20000 2>/dev/null || ulimit -n "$(ulimit -Hn)"

# ---- processes ---------------------------------------------------------------------------------

begin_proxy() {
    case $1 in
        nginx)
            settings nginx.conf nginx
            begin nginx $PROXY_CORE nginx -e "$dir/nginx.log" -c "$dir/nginx.conf"
            ;;
        haproxy)
            settings haproxy.cfg haproxy
            begin haproxy $PROXY_CORE haproxy -db -f "$dir/haproxy.cfg"
            ;;
        vllm-lb)
            settings vllm-lb.yaml vllm-lb
            begin vllm-lb $PROXY_CORE "$binary" -c "$dir/vllm-lb.yaml"
            ;;
    esac
}

# ---- samples -----------------------------------------------------------------------------------

begin direct $ENDS_CORE "$traffic" upstream "${port[direct]}"
SECONDS=0
for name in "${proxies[@]}"; do begin_proxy "$name"; done
for ((round = 0; round < rounds; round++)); do
    for case in "${cases[@]}"; do
        read -r bytes count <<<"$case"
        for name in direct "${proxies[@]}"; do
            sample "$bytes" "$name" requests "${port[$name]}" "$bytes" "$count"
        done
    done
    for name in direct "${proxies[@]}"; do
        sample event "$name" events "${port[$name]}" 500 1.5
    done
done
# Memory is measured in fresh processes: one that has worked keeps some, and hands it out again.
for ((round = 0; round < rounds; round++)); do
    for bytes in 1600 60000; do
        for name in "${proxies[@]}"; do
            end "$name"
            begin_proxy "$name"
            kib=$(ends idle "${port[$name]}" $bytes $STREAMS --proxy "${pid[$name]}")
            echo "idle-$bytes $name $kib" | tee -a "$samples"
        done
    done
done
seconds=$SECONDS

# ---- the result --------------------------------------------------------------------------------

# cell CASE NAME: the median, and how often nginx's that is.
cell() {
    local mine nginx
    mine=$(median 3 "$1" "$2")
    nginx=$(median 3 "$1" nginx)
    # Without a sample there is no median.
    case $2 in
        nginx) round_to 1 "$mine" ;;
        *) [ "$nginx" = 0 ] || awk -v a="$mine" -v b="$nginx" 'BEGIN { printf "%.1f (%.2f)", a, a / b }' ;;
    esac
}

versions() {
    nginx -v 2>&1 | sed 's|.*/|nginx |'
    haproxy -v | sed -n '1s/.*version \([^ ]*\).*/haproxy \1/p'
    "$binary" --version
    echo "profile $profile"
}

report() {
    local name case row
    local sizes=(1600 17000 100000 400000)
    cat <<END
# nginx, haproxy, vllm-lb: what a request costs

| | |
| --- | --- |
| date | $(date -u +%Y-%m-%d) |
| commit | $(commit | joined) |
| command | \`$command\`, $seconds s |
| machine | $(nproc) cores, $(processor), Linux $(uname -r) |
| versions | $(versions | joined) |
| disturbance | $(quietness) |

Medians of $rounds rounds; in brackets how often nginx's figure that is. One thread a proxy, on a core of its
own; clients and upstream on another. CPU microseconds of the proxy for a chat request with a body of so
many bytes (32 connections, distinct bodies, an answer of 1 KiB), and for an event of a stream (500
streams with an event every 20 ms each). KiB of resident memory for each of $STREAMS streams that are
silent after their first event, for two sizes of the request's body.

| | 1.6 KB | 17 KB | 100 KB | 400 KB | an event | idle stream, 1.6 KB | idle stream, 60 KB |
| --- | --- | --- | --- | --- | --- | --- | --- |
END
    for name in "${proxies[@]}"; do
        row=("$name")
        for case in "${sizes[@]}" event idle-1600 idle-60000; do
            row+=("$(cell "$case" "$name")")
        done
        printf '| %s ' "${row[@]}"
        echo '|'
    done
    cat <<END

Requests, or events, a second, and how much of its core the proxy was busy with them. Direct is without a
proxy: more than clients and upstream can do on their core no proxy can show here. Events have a fixed pace.

| | 1.6 KB | 17 KB | 100 KB | 400 KB | an event |
| --- | --- | --- | --- | --- | --- |
END
    for name in direct "${proxies[@]}"; do
        row=("$name")
        for case in "${sizes[@]}" event; do
            row+=("$(round_to 0 "$(median 5 "$case" "$name")"), $(round_to 2 "$(median 6 "$case" "$name")")")
        done
        printf '| %s ' "${row[@]}"
        echo '|'
    done
    cat <<END

All samples, each with: case, proxy, CPU microseconds a unit (direct: of clients and upstream together),
cores that others used of those in use, units a second, cores that the proxy used; or KiB a stream.

\`\`\`text
$(sort -s -k 1,1V -k 2,2 "$samples")
\`\`\`
END
}

mkdir -p "$(dirname "$output")"
report >"$output"
say "$output, after $seconds s"
