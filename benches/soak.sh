#!/usr/bin/env bash
# Does memory stay flat over a million requests of mixed shapes through one process? The table goes to
# benches/results/soak.md. Takes some minutes.
#
#   benches/soak.sh [REQUESTS]
#
#   PROFILE=quick benches/soak.sh    without the long link of a release
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
requests=${1:-1000000}
result=benches/results/soak.md
mkdir -p benches/results
load() { cut -d ' ' -f 1 /proc/loadavg; }

cargo bench --quiet --locked --profile "$profile" --bench soak --no-run
before=$(load)
table=$(cargo bench --quiet --locked --profile "$profile" --bench soak -- "$requests" | tee /dev/stderr)
model=$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)
cat >$result <<END
# Memory over $requests requests

\`PROFILE=$profile benches/soak.sh $requests\` at $(git rev-parse --short HEAD), on $(nproc) cores of
$model, Linux $(uname -r | cut -d . -f 1-2); load of the machine $before before and $(load) after.

One process over four simulated engines that take no time; 32 clients ask all interfaces, streams and whole
answers, over HTTP/1.1 and HTTP/2, with bodies up to 3 MiB. Some leave, some are refused (unknown models and
paths), and every 5,000 requests something happens: engines break connections or streams or restart,
upstreams are taken out and put in, the configuration is reloaded.

$table
END
echo "soak: $result"
