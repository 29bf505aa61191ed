#!/usr/bin/env bash
# What the messages of 16 and of 100 balancers under load take from one balancer, and from Redis. The tables
# go to benches/results/exchange-scale.md, below what is written there about them. Takes five minutes, on a
# quiet machine; needs redis-server.
#
#   benches/exchange_scale.sh [SECONDS] [ROUNDS] [SCENARIO]
#
# SECONDS is how long each stretch is measured, ROUNDS how often quiet and loud follow each other.
#
#   PROFILE=quick benches/exchange_scale.sh    without the long link of a release
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
result=benches/results/exchange-scale.md
load() { cut -d ' ' -f 1 /proc/loadavg; }

cargo bench --quiet --locked --profile "$profile" --bench exchange_scale --no-run
before=$(load)
tables=$(cargo bench --quiet --locked --profile "$profile" --bench exchange_scale -- "$@" | tee /dev/stderr)
model=$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)
{
    sed '/^## The tables/q' $result
    cat <<END_OF_HEAD

\`PROFILE=$profile benches/exchange_scale.sh $*\` at $(git rev-parse --short HEAD), on $(nproc) cores of
$model, Linux $(uname -r | cut -d . -f 1-2), $(redis-server --version | cut -d ' ' -f 1-3);
load of the machine $before before and $(load) after.

$tables
END_OF_HEAD
} >$result.new
mv $result.new $result
echo "exchange_scale: $result"
