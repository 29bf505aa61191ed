#!/usr/bin/env bash
# Hours of moderate load through two balancers over a Redis and four simulated engines, with a trouble each
# minute: reloads, drains, kills and stalls of engines, a Redis that stalls, dies or forgets. Fails when
# memory grows, when something stays behind, or when a request fails without a reason. The table goes to
# benches/results/endurance.md.
#
#   benches/endurance.sh [MINUTES]       360 is the default
#
#   PROFILE=quick benches/endurance.sh   without the long link of a release
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
minutes=${1:-360}
result=benches/results/endurance.md
command -v redis-server >/dev/null || { echo "endurance: no redis-server here" >&2; exit 1; }

cargo build --quiet --locked --profile "$profile" --bin vllm-lb
binary=${CARGO_TARGET_DIR:-target}/${profile/#dev/debug}/vllm-lb
status=0
table=$(python3 benches/endurance/run.py --binary "$binary" --minutes "$minutes") || status=$?
model=$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)
cat >$result <<END
# Memory and leftovers over $minutes minutes

\`PROFILE=$profile benches/endurance.sh $minutes\` at $(git rev-parse --short HEAD), on $(nproc) cores of
$model, Linux $(uname -r | cut -d . -f 1-2).

Two balancers of one thread each share a Redis and four simulated engines. 24 clients send chats, completions
and calls of sessions; some leave in the middle, some name a model that does not exist. Each minute one thing
happens: a reload, a drain of 15 s, a kill of an engine, a stall of an engine, and a Redis that stalls,
restarts or is emptied. Two numbers in a cell are those of the two balancers.

$table
END
echo "endurance: $result"
exit $status
