#!/usr/bin/env bash
# Ten minutes of everything at once: engines that die, stall, cut, drain, come and go, and clients that are
# slow or leave. Fails when a client gets an error where another upstream could have answered, when a lease or
# memory is left at the end, when memory grows, or when a trouble did not happen. `./dev bench chaos` runs
# this.
#
#   benches/chaos.sh [SECONDS] [SEED]
#
#   PROFILE=release benches/chaos.sh    as it is shipped, after a long link; quick is the default
#
# It is tests/it/chaos, which has a short run in the tests. Their runner would end a longer one.
set -euo pipefail
cd "$(dirname "$0")/.."

export VLLM_LB_CHAOS_SECONDS=${1:-600}
[ -z "${2:-}" ] || export VLLM_LB_CHAOS_SEED=$2
exec cargo test --locked --profile "${PROFILE:-quick}" --test chaos -- --nocapture
