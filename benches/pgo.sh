#!/usr/bin/env bash
# Builds vllm-lb for a release, compiled by what it spends its time on, and prints the name of the program.
# `./dev release` and docker/Dockerfile run this.
#
#   benches/pgo.sh [FEATURES]
#
# The compiler first builds a vllm-lb with counters, which serves traffic of benches/proxies: chats of all
# sizes, whole and streamed, with and without a route that edits. By these counts it places the code of a
# request together, which costs fewer misses of the processor's caches. Code that this traffic never runs is
# compiled for size. Both builds have one profile of cargo and one target, or the counts would not fit the
# names of functions.
set -euo pipefail
cd "$(dirname "$0")/.."

features=${1:-default}
readonly UPSTREAM=28600 LISTEN=28601 ADMIN=28602
host=$(rustc -vV | sed -n 's/^host: //p')
target=${CARGO_TARGET_DIR:-$PWD/target}
counts=$target/pgo/counts
program=$target/pgo/$host/release/vllm-lb

# The tool that merges counts comes with the toolchain: each reads its own version alone.
merge=$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata
[ -x "$merge" ] || rustup component add llvm-tools >&2

# build FLAGS: vllm-lb with these flags of rustc, which build scripts and macros do not get.
build() {
    RUSTFLAGS=$1 CARGO_TARGET_DIR=$target/pgo cargo build --release --locked --target "$host" --bin vllm-lb \
        --features "$features" >&2
}

cargo build --locked --example traffic --features "$features" >&2
traffic=$target/debug/examples/traffic
rm -rf "$counts"
build "-C profile-generate=$counts"

settings=$(mktemp)
upstream= balancer=
trap 'kill -KILL $upstream $balancer 2>/dev/null || true; rm -f "$settings"' EXIT
sed -e "s/@listen@/$LISTEN/; s/@admin@/$ADMIN/; s/@upstream@/$UPSTREAM/" -e 's/^threads: .*/threads: 2/' \
    benches/proxies/routes.yaml >"$settings"
"$traffic" upstream $UPSTREAM >/dev/null 2>&1 &
upstream=$!
"$traffic" wait $UPSTREAM
"$program" -c "$settings" >&2 &
balancer=$!
"$traffic" wait $LISTEN

# load COMMAND ARGUMENTS...: its figures, of a program with counters, mean nothing.
load() { "$traffic" "$1" $LISTEN "${@:2}" --upstream $upstream --proxy $balancer >/dev/null; }
for model in sim named edited; do
    for case in "1600 6000" "17000 3000" "100000 800" "400000 250"; do
        read -r bytes count <<<"$case"
        load requests "$bytes" "$count" --model $model
    done
    load requests 1600 2000 --model $model --burst 4
    load requests 17000 1000 --model $model --burst 40
done
load events 300 3 --any-pace
load rate 1600 500 3
# The counters are written when the process ends.
kill -TERM $balancer
wait $balancer
balancer=

"$merge" merge --output "$counts/merged.profdata" "$counts" >&2
build "-C profile-use=$counts/merged.profdata"
echo "$program"
