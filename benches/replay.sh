#!/usr/bin/env bash
# The first minutes of a trace, played through the running product in real time and faster, beside the same on
# the virtual clock. The table goes to benches/results/replay.md.
#
#   benches/replay.sh TRACE [MINUTES] [SPEED]
#
# TRACE has one JSON object a line, as Mooncake's traces: see `vllm-lb simulate --help`.
#
#   PROFILE=quick benches/replay.sh TRACE    without the long link of a release
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 1; }
profile=${PROFILE:-release}
trace=$(realpath "$1")
minutes=${2:-5}
speed=${3:-5}
result=benches/results/replay.md
mkdir -p benches/results
load() { cut -d ' ' -f 1 /proc/loadavg; }

cargo bench --quiet --locked --profile "$profile" --bench replay --no-run
before=$(load)
table=$(cargo bench --quiet --locked --profile "$profile" --bench replay -- "$trace" "$minutes" "$speed" |
    tee /dev/stderr)
model=$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)
cat >$result <<END
# A trace through the running product

\`PROFILE=$profile benches/replay.sh $(basename "$trace") $minutes $speed\` at $(git rev-parse --short HEAD),
on $(nproc) cores of $model, Linux $(uname -r | cut -d . -f 1-2);
load of the machine $before before and $(load) after.

The first $minutes minutes of the trace, $speed times faster, through one \`vllm-lb\` over 8 simulated
engines; streams, each block of the trace a text of its own. Beside it \`vllm-lb simulate\`'s replay of the
same requests, with the same arrivals. Times to the first token and to the end are seconds of the trace;
"most" is the engine with most requests, 1 being an even share.

$table
END
echo "replay: $result"
