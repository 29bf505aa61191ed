#!/usr/bin/env bash
# What the exchange of siblings over Redis takes: time until all know, and work of Redis. The tables go to
# benches/results/exchange.md. Takes a minute, on a quiet machine; needs redis-server.
#
#   PROFILE=quick benches/exchange.sh    without the long link of a release
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
result=benches/results/exchange.md
mkdir -p benches/results
load() { cut -d ' ' -f 1 /proc/loadavg; }

cargo bench --quiet --locked --profile "$profile" --bench exchange --no-run
before=$(load)
table=$(cargo bench --quiet --locked --profile "$profile" --bench exchange | tee /dev/stderr)
model=$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)
cat >$result <<END
# What the exchange over Redis takes

\`PROFILE=$profile benches/exchange.sh\` at $(git rev-parse --short HEAD), on $(nproc) cores of
$model, Linux $(uname -r | cut -d . -f 1-2), $(redis-server --version | cut -d ' ' -f 1-3);
load of the machine $before before and $(load) after.

First: a chain of 16 blocks is sent through one balancer; how long until a sibling knows it, over 1,000 tries.
Half of it is the wait for the next tick (\`redis_options.interval\`, 20 ms).

Then: balancers with 1,000 requests a second each, every one a turn of a conversation with 16 new blocks
(2,000 tokens) and a session, over eight upstreams; every request keeps its session's key in Redis, which is
eight times what the product does of sessions that stay. All balancers share one process, and the machine with
Redis: where that has not enough for all, they say less often, and more at once.

$table

A balancer says at most 50 messages a second, whatever its load, and hears those of all others: what Redis
gives out grows with the square of the balancers, since each reads what each says. A hundred of them at 20 ms
would be 5,000 messages a second in, and half a million out: then \`interval\` is to be longer (100 ms costs
7-25 % in mean time to first token, 20 ms 1-10 %), or the fleet to be cut into groups of balancers and
upstreams, each with a prefix of its own. A thousand upstreams cost little: a message names those whose gauges
moved since the last one, and all of them every \`gauge_ttl\` / 3.
END
echo "exchange: $result"
