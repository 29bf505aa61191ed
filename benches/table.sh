#!/usr/bin/env bash
# The whole comparison in one table: what requests, streams and idle streams cost in nginx, haproxy,
# pingora-proxy as it comes, sglang-router, vllm-router and vllm-lb; 10,000 streams through vllm-lb; and the
# time to the first token when each of them routes the same traffic over simulated engines.
# `./dev bench` installs what is missing and runs this: an hour and a quarter beside building, on a quiet
# machine.
#
#   benches/table.sh [--parts LIST] [--profile NAME] [--binary FILE] [--programs DIRECTORY]
#                    [--rounds N] [--percent N] [--patience SECONDS] [--faster N] [--trace FILE]
#                    [--output DIRECTORY] [--without-routers] [--quick]
#
#   --parts     which of requests, idle, crowd and routing are measured, separated by commas; what is known of
#               the others stays in the table
#   --profile   cargo's profile to build and measure; the default is counted, what ./dev release builds: a
#               release that is compiled by counts (benches/pgo.sh)
#   --binary    measure this vllm-lb and do not build one
#   --programs  where traffic, player and pingora-proxy are; with --binary, nothing is built
#   --rounds    how often requests and streams are measured; 3 is the default
#   --percent   how many of its requests a sample has, and traffic of its minutes; 100 is the default
#   --patience  seconds after which a disturbed sample of requests is not taken again
#   --faster    how many times faster than usual traffic is routed, where there are cores for that
#   --trace     Mooncake's conversation_trace.jsonl; it is fetched if it is not there
#   --output    where samples, table and plots go; benches/results is the default
#   --without-routers  leave sglang-router and vllm-router out
#   --quick     a look at the script within a minute: few and small samples, what is not installed left out
#
# How: benches/proxies/common.sh and benches/table/*.sh say it. The samples of each part go to a file of
# their own in table/ of the output, from which benches/table/report.py makes table.md and the plots. It
# ends with an error where a row is missing or a number cannot be. Everything stays on loopback and ends
# with the script.
set -euo pipefail
cd "$(dirname "$0")/.."

parts=requests,idle,crowd,routing
rounds=3
percent=100
faster=1
trace=.dev/traces/conversation_trace.jsonl
patience=
quick=
routers=yes
# The port of the admin listener of what is started next.
admin=

export PATH=$PATH:/usr/sbin
source benches/proxies/common.sh
source benches/proxies/processes.sh
source benches/table/requests.sh
source benches/table/crowd.sh
source benches/table/routing.sh

own_option() {
    took=2
    case $1 in
        --parts) parts=$2 ;;
        --percent) percent=$2 ;;
        --patience) patience=$2 ;;
        --faster) faster=$2 ;;
        --trace) trace=$2 ;;
        --without-routers) routers='' took=1 ;;
        --quick) quick=yes took=1 ;;
        *) took=0 ;;
    esac
}

output=benches/results
profile=counted
options "$@"
command=${command/ table/}
[ -z "$quick" ] || { rounds=1 percent=3 patience=0; }
python=${VENV:-.dev/venv-bench}/bin/python

# Leaves out what is not installed, in a look at the script alone.
proxies=()
for name in nginx haproxy pingora sglang-router vllm-router vllm-lb; do
    case $name in
        nginx | haproxy) tool=$name ;;
        *-router) tool=$python ;;
        *) tool=taskset ;;
    esac
    case $name in *-router) [ -n "$routers" ] || continue ;; esac
    if command -v "$tool" >/dev/null; then
        proxies+=("$name")
    elif [ -n "$quick" ]; then
        say "no $name here, left out"
    else
        say "no $tool here; ./dev bench installs it" >&2
        exit 1
    fi
done
# Seconds after which a noisy sample is not taken again.
PATIENCE=${patience:-$((60 * ${#proxies[@]} * rounds))}
readonly PATIENCE

examples+=(pingora-proxy player)
build
# 10,000 streams need two sockets each in a proxy; where files are limited, there are fewer streams.
ulimit -n 32768 2>/dev/null || ulimit -n "$(ulimit -Hn)"

machine() { echo "$(nproc) cores, $(processor), Linux $(uname -r)"; }

# version_of NAME: of a crate that the build uses, or of a package of Python.
version_of() {
    case $1 in
        pingora) sed -n '/^name = "pingora-proxy"$/{n;s/version = "\(.*\)"/pingora-proxy \1/p}' Cargo.lock ;;
        *) "$python" -c "from importlib.metadata import version as v; print('$1', v('$1'))" ;;
    esac
}

versions() {
    local name
    for name in "${proxies[@]}"; do
        case $name in
            nginx) nginx -v 2>&1 | sed 's|.*/|nginx |' ;;
            haproxy) haproxy -v | sed -n '1s/.*version \([^ ]*\).*/haproxy \1/p' ;;
            pingora | *-router) version_of "$name" ;;
            vllm-lb) "$binary" --version ;;
        esac
    done
    echo "profile $profile"
}

# keep PART SECONDS: the samples so far become those of a part.
keep() {
    mkdir -p "$output/table"
    {
        echo "date: $(date -u +%Y-%m-%d)"
        echo "commit: $(commit | joined)"
        echo "command: $command"
        echo "seconds: $2"
        echo "machine: $(machine)"
        echo "versions: $(versions | joined)"
        echo "proxies: ${proxies[*]}"
        [ "$1" != requests ] || echo "disturbance: $(quietness)"
        echo
        sort -s -k 1,1V -k 2,2 "$samples"
    } >"$output/table/$1.txt"
    say "$output/table/$1.txt, after $2 s"
    rm -f "$samples"
}

for part in ${parts//,/ }; do
    SECONDS=0
    : >"$samples"
    "measure_$part"
    keep "$part" $SECONDS
done
benches/table/report.py "$output"
