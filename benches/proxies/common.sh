# What benches/proxies.sh and benches/routes.sh have in common: options, the build, processes on cores of
# their own, samples that are taken again when they were disturbed, and the words about them. It is read with
# `source` by a script that has said `rounds`, `PATIENCE`, `port` and `pid`.

# Lists of cores, as taskset reads them.
proxy_cores=0
ends_cores=1
# What others may use of the cores in use.
NOISE=0.15
TRIES=4
readonly NOISE TRIES

say() { echo "$(basename "$0" .sh): $*"; }

profile=release
binary=
# Where programs of benches/ are that were built before; with them and a binary, nothing is built.
programs=
# Programs of benches/proxies/ that the script starts.
examples=(traffic)
output=benches/results/$(basename "$0" .sh).md

# What the script was told in place of these. A script with options of its own has a function `own_option`,
# which sets `took` to how many words it read.
options() {
    local took
    command="./dev bench $(basename "$0" .sh)${*:+ $*}"
    while [ $# -gt 0 ]; do
        took=2
        case $1 in
            --profile) profile=$2 ;;
            --rounds) rounds=$2 ;;
            --binary) binary=$2 ;;
            --programs) programs=$2 ;;
            --output) output=$2 ;;
            *)
                took=0
                ! declare -F own_option >/dev/null || own_option "$@"
                [ $took != 0 ] || { say "no such option: $1" >&2; exit 64; }
                ;;
        esac
        shift $took
    done
}

dir=$(mktemp -d)
# Lines of: case proxy value foreign rate busy ends, and of `rate` median p99
samples=$dir/samples
noisy=0

# The profile `counted` is a release that is compiled by counts of its own traffic, as `./dev release` does.
build() {
    local cargo_profile=${profile/#counted/release} example
    local target=${CARGO_TARGET_DIR:-target}/${cargo_profile/#dev/debug}
    local build=(cargo build --locked --profile "$cargo_profile")
    if [ -z "$binary" ] && [ "$profile" = counted ]; then
        say "building a release by counts"
        binary=$(benches/pgo.sh)
    fi
    for example in "${examples[@]}"; do build+=(--example "$example"); done
    [ -n "$binary" ] || build+=(--bin vllm-lb)
    if [ -z "$binary" ] || [ -z "$programs" ]; then
        say "building with profile $profile"
        "${build[@]}"
    fi
    binary=${binary:-$target/vllm-lb}
    programs=${programs:-$target/examples}
    traffic=$programs/traffic
    pingora=$programs/pingora-proxy
}

# ---- processes ---------------------------------------------------------------------------------

end() {
    [ -n "${pid[$1]:-}" ] || return 0
    # SIGKILL: a proxy that lets its streams end would wait for them.
    kill -KILL "${pid[$1]}" 2>/dev/null || true
    wait "${pid[$1]}" 2>/dev/null || true
    unset "pid[$1]"
}

finish() {
    local name
    for name in "${!pid[@]}"; do end "$name"; done
    rm -rf "$dir"
}
trap finish EXIT

# most_streams FILES: how many streams a proxy can have open, each with a socket on both sides, when it has so
# many other files.
most_streams() { echo $((($(ulimit -n) - $1) / 2)); }

# What a proxy reads, with the ports of this run.
settings() {
    sed -e "s|@dir@|$dir|g" -e "s|@listen@|${port[$2]}|g" -e "s|@upstream@|${port[direct]}|g" \
        -e "s|@admin@|$admin|g" -e "s|@connections@|$(most_streams 100)|g" "benches/proxies/$1" >"$dir/$1"
}

ends() { taskset -c "$ends_cores" "$traffic" "$@"; }

# begin NAME CORES COMMAND...: starts a process on its cores, and waits until it answers.
begin() {
    local name=$1 cores=$2
    shift 2
    # It replaces itself with what it starts, so that the process is the proxy's own.
    taskset -c "$cores" "$@" >"$dir/$name.out" 2>&1 &
    pid[$name]=$!
    ends wait "${port[$name]}" || { cat "$dir/$name.out" >&2; exit 1; }
    # A foreign server on the port would have answered too.
    kill -0 "${pid[$name]}" || { cat "$dir/$name.out" >&2; exit 1; }
}

# ---- samples -----------------------------------------------------------------------------------

# sample CASE NAME COMMAND ARGUMENTS...: one quiet sample, or the quietest of a few.
sample() {
    local case=$1 name=$2 watched=(--upstream "${pid[direct]}" --cores "$ends_cores")
    local best='' now try
    shift 2
    [ "$name" = direct ] || watched+=(--cores "$proxy_cores" --proxy "${pid[$name]}")
    for ((try = 0; try < TRIES; try++)); do
        # A disturbance can be such that the clients give up; that is no sample.
        now=$(ends "$@" "${watched[@]}") || continue
        [ -n "$best" ] || best=$now
        best=$(printf '%s\n' "$best" "$now" | sort -g -k 2 | head -n 1)
        quiet "$best" && break
        [ $SECONDS -lt $PATIENCE ] || break
    done
    if [ -z "$best" ]; then
        say "no sample of $case with $name"
        return
    fi
    quiet "$best" || noisy=$((noisy + 1))
    echo "$case $name $best" | tee -a "$samples"
}

# Whether a sample had its cores to itself.
quiet() { awk -v noise=$NOISE '{ exit !($2 <= noise) }' <<<"$1"; }

# ---- words about them --------------------------------------------------------------------------

# column N CASE NAME: the values of column N, smallest first.
column() { awk -v n="$1" -v c="$2" -v p="$3" '$1 == c && $2 == p { print $n }' "$samples" | sort -g; }
median() {
    column "$@" | awk '{ v[NR] = $1 } END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'
}
round_to() { awk -v d="$1" -v v="$2" 'BEGIN { printf "%.*f", d, v }'; }

processor() { sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1; }

commit() {
    git rev-parse --short HEAD 2>/dev/null || echo unknown
    git diff --quiet HEAD -- . ':!benches/results' 2>/dev/null || echo "with changes that are not committed"
}

# How much the samples of CPU time were disturbed.
quietness() {
    awk 'NF > 3 { print $4 }' "$samples" | sort -g | awk -v noisy=$noisy -v noise=$NOISE '
        { v[NR] = $1 }
        END {
            printf "of the cores in use, others used %.2f in the median sample and %.2f at most; ", \
                v[int((NR + 1) / 2)], v[NR]
            printf "%d of %d samples stayed above %.2f\n", noisy, NR, noise
        }'
}

# Lines as one cell.
joined() { paste -sd , | sed 's/,/, /g'; }
