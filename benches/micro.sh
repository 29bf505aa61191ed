#!/usr/bin/env bash
# The benchmarks of the parts, by criterion: `cargo bench` with these arguments.
#
#   benches/micro.sh [ARGUMENTS]    such as: --profile quick --bench index -- "learn a"
set -euo pipefail
cd "$(dirname "$0")/.."

exec cargo bench --locked "$@"
