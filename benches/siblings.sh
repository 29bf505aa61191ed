#!/usr/bin/env bash
# Four balancers with one Redis beside one balancer and beside four that know nothing of each other, as real
# processes; and what requests feel while things happen to Redis. The tables go to
# benches/results/siblings.md. Takes a quarter of an hour, on a quiet machine;
# needs redis-server.
#
#   benches/siblings.sh TRACE [MINUTES] [SPEED] [ROUNDS]
#
# TRACE has one JSON object a line, as Mooncake's traces: see `vllm-lb simulate --help`.
#
#   PROFILE=quick benches/siblings.sh TRACE    without the long link of a release
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 1; }
profile=${PROFILE:-release}
trace=$(realpath "$1")
minutes=${2:-10}
speed=${3:-10}
rounds=${4:-2}
result=benches/results/siblings.md
mkdir -p benches/results
load() { cut -d ' ' -f 1 /proc/loadavg; }
bench() {
    cargo bench --quiet --locked --profile "$profile" --bench siblings -- "$@" | tee /dev/stderr
}

cargo bench --quiet --locked --profile "$profile" --bench siblings --no-run
at_first=$(load)
trouble=$(bench trouble 10)
after_trouble=$(load)
conversations=$(bench "$trace" "$minutes" "$speed" "$rounds")
after_trace=$(load)
rag=$(bench rag 4 4 "$rounds")
model=$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)
cat >$result <<END
# Several balancers, one Redis

\`PROFILE=$profile benches/siblings.sh $(basename "$trace") $minutes $speed $rounds\` at
$(git rev-parse --short HEAD), on $(nproc) cores of $model, Linux $(uname -r | cut -d . -f 1-2),
$(redis-server --version | cut -d ' ' -f 1-3); load of the machine $at_first before, $after_trouble after the
troubles, $after_trace after the trace and $(load) at the end.

## Four choose as one

Balancers and Redis are processes; 8 simulated engines and the clients are another. Requests go round robin
over the balancers, in order of arrival. Time runs faster than it did, and what is measured is told in
seconds of the trace: what the programs take for themselves counts as many times, that of four balancers
on the same cores too. \`redis_options.interval\` is 20 ms divided by the speed, so that it is
20 ms of the trace. Rows of the virtual clock are \`vllm-lb simulate\`'s replay of the same requests with the
same arrivals, the mean of five seeds. "Most" is the engine with most requests, 1 being an even share.

$conversations

$rag

## Troubles of Redis

200 short streams a second, half of them through each of two balancers, over engines that answer at once;
milliseconds from when a request was due to the first byte of the answer's body, over the 10 s before the
trouble and the 10 s of it, with what it takes to get over it. With engines that take no time, all of it is
added latency, the client's and the machine's own included; the row "nothing" shows how much two stretches
of time differ by themselves. One stream more is opened through the first balancer just before the trouble
ends, and after the last FLUSHALL or CLIENT KILL: "right again" is how long it takes from then, or from when
Redis is well, until the second balancer knows of it.

$trouble
END
echo "siblings: $result"
