#!/usr/bin/env bash
# What a request, an event of a stream and an idle stream cost in nginx, haproxy, pingora-proxy as it comes
# and vllm-lb, side by side in one run: benches/results/proxies.md. `./dev bench proxies` installs what is
# missing and runs this.
#
#   benches/proxies.sh [--profile NAME] [--rounds N] [--percent N] [--patience N]
#                      [--binary FILE] [--before FILE] [--others] [--output FILE]
#
#   --profile   cargo's profile to build and measure; release, whose link takes minutes, is the default, and
#               counted is what ./dev release builds (benches/pgo.sh)
#   --percent   how many of its requests a sample has, for a look at the script; 100 is the default
#   --patience  seconds after which a disturbed sample is not taken again; 50 a proxy is the default
#   --binary    measure this vllm-lb and do not build one
#   --before    measure this vllm-lb, too, as a row of its own
#   --others    measure sglang-router and vllm-router, too, which `./dev bench proxies --others` installs
#   --output    where the result goes
#
# How: each proxy has one thread, pinned to one core; the server behind it and the clients before it
# (benches/proxies/traffic.rs) share another. What counts is the CPU time that the scheduler notes for the
# proxy's process, which is its cost whether or not a client is waiting; requests a second, where
# the ends are the bottleneck, would not. Samples take turns between the proxies. One during which others
# used more than NOISE of these cores is taken again, a few times. Everything stays on loopback and ends
# with the script; the whole takes about two minutes a proxy, the build not counted.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=3
percent=100
# The port of the admin listener of what is started next.
admin=
patience=
before=
others=

STREAMS=1000
# Requests a second of the open loop, and for how many seconds.
RATE=2000
RATE_SECONDS=3
readonly STREAMS RATE RATE_SECONDS

# Body bytes, and requests for about a second.
cases=("1600 40000" "17000 30000" "100000 10000" "400000 3000")
thread_cases=("1600 40000" "100000 15000")
proxies=(nginx haproxy pingora vllm-lb)

export PATH=$PATH:/usr/sbin
source benches/proxies/common.sh
source benches/proxies/processes.sh
source benches/proxies/report.sh

own_option() {
    case $1 in
        --percent) percent=$2 took=2 ;;
        --patience) patience=$2 took=2 ;;
        --before) before=$2 took=2 ;;
        --others) others=yes took=1 ;;
    esac
}

options "$@"
python=${VENV:-.dev/venv-bench}/bin/python
for tool in nginx haproxy taskset ${others:+"$python"}; do
    command -v "$tool" >/dev/null || { say "no $tool here; ./dev bench proxies installs it" >&2; exit 1; }
done
[ -z "$before" ] || proxies+=(before)
[ -z "$others" ] || proxies+=(sglang-router vllm-router)
# Seconds after which a noisy sample is not taken again.
PATIENCE=${patience:-$((50 * ${#proxies[@]}))}
readonly PATIENCE

examples+=(pingora-proxy)
build
# A stream needs two sockets in a proxy.
ulimit -n 32768 2>/dev/null || ulimit -n "$(ulimit -Hn)"

# ---- samples -----------------------------------------------------------------------------------

begin direct "$ends_cores" "$traffic" upstream "${port[direct]}"
SECONDS=0
for name in "${proxies[@]}"; do begin_proxy "$name"; done
for ((round = 0; round < rounds; round++)); do
    for case in "${cases[@]}"; do
        read -r bytes count <<<"$case"
        for name in direct "${proxies[@]}"; do
            sample "$bytes" "$name" requests "${port[$name]}" "$bytes" $((count * percent / 100))
        done
    done
    for name in direct "${proxies[@]}"; do
        sample event "$name" events "${port[$name]}" 500 1.5
    done
    for name in direct "${proxies[@]}"; do
        sample first "$name" rate "${port[$name]}" 1600 $RATE $RATE_SECONDS
    done
done
# Memory is measured in fresh processes: one that has worked keeps some, and hands it out again.
for ((round = 0; round < rounds; round++)); do
    for bytes in 1600 60000; do
        for name in "${proxies[@]}"; do
            end "$name"
            begin_proxy "$name"
            if kib=$(ends idle "${port[$name]}" $bytes $STREAMS --proxy "${pid[$name]}"); then
                echo "idle-$bytes $name $kib" | tee -a "$samples"
            else
                say "no sample of idle-$bytes with $name"
            fi
        done
    done
done
# One thread against two. Where there are not cores for all, everything shares two, and the ratio comes from
# the CPU time of a request: what two cores can carry is limited by it, and by cores that stay idle.
for name in direct "${proxies[@]}"; do end "$name"; done
proxy_cores=0,1
if [ "$(nproc)" -ge 4 ]; then ends_cores=2,3; else ends_cores=0,1; fi
begin direct "$ends_cores" "$traffic" upstream "${port[direct]}"
for name in one two; do begin_proxy "$name"; done
for ((round = 0; round < rounds; round++)); do
    for case in "${thread_cases[@]}"; do
        read -r bytes count <<<"$case"
        for name in one two; do
            sample "threads-$bytes" "$name" \
                requests "${port[$name]}" "$bytes" $((count * percent / 100)) --connections 64
        done
    done
done
seconds=$SECONDS

mkdir -p "$(dirname "$output")"
report >"$output"
say "$output, after $seconds s"
