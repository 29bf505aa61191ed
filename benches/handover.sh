#!/usr/bin/env bash
# How long an upgrade takes that hands a large prefix index over, and what requests feel of it. The table goes
# to benches/results/handover.md. Takes two minutes, on a quiet machine; needs redis-server.
#
#   benches/handover.sh [BLOCKS] [ROUNDS]
#
#   PROFILE=quick benches/handover.sh    without the long link of a release
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
result=benches/results/handover.md
mkdir -p benches/results
load() { cut -d ' ' -f 1 /proc/loadavg; }

cargo bench --quiet --locked --profile "$profile" --bench handover --no-run
before=$(load)
table=$(cargo bench --quiet --locked --profile "$profile" --bench handover -- "$@" | tee /dev/stderr)
model=$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)
cat >$result <<END
# Handing the prefix index over

\`PROFILE=$profile benches/handover.sh $*\` at $(git rev-parse --short HEAD), on $(nproc) cores of
$model, Linux $(uname -r | cut -d . -f 1-2); load of the machine $before before and $(load) after.

A process takes over from a running one without a Redis, several times in a row. Its predecessor holds the
chains of conversations of 800 blocks each; the new process receives them for 5 s at most. "Ready after" is
the time from the start of the process until it serves. Meanwhile a client sends requests one after the other,
10 ms apart, to engines that answer at once: "longest" is the slowest of them.

$table
END
echo "handover: $result"
