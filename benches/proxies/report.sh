# The result of benches/proxies.sh: tables of medians, the goals and whether they are met, and all samples. It
# is read with `source`.

sizes=(1600 17000 100000 400000)

# What a request may cost in vllm-lb, an event and an idle stream: a case, a limit, what it is of, and a word.
goals=(
    "1600 2.0 haproxy CPU of a request of 1.6 KB"
    "17000 1.4 haproxy CPU of a request of 17 KB"
    "100000 1.2 haproxy CPU of a request of 100 KB"
    "400000 0.7 haproxy CPU of a request of 400 KB"
    "1600 1.0 pingora CPU of a request of 1.6 KB"
    "17000 1.0 pingora CPU of a request of 17 KB"
    "100000 1.0 pingora CPU of a request of 100 KB"
    "400000 1.0 pingora CPU of a request of 400 KB"
    "event 1.25 haproxy CPU of an event"
    "idle-1600 36 KiB memory of an idle stream, 1.6 KB"
    "idle-60000 48 KiB memory of an idle stream, 60 KB"
)

# has CASE NAME: whether there is a sample.
has() { [ -n "$(column 3 "$1" "$2")" ]; }

# figure DECIMALS COLUMN CASE NAME: the median.
figure() { round_to "$1" "$(median "$2" "$3" "$4")"; }

# ratio CASE NAME OTHER: of the medians of CPU or memory.
ratio() { awk -v a="$(median 3 "$1" "$2")" -v b="$(median 3 "$1" "$3")" 'BEGIN { printf "%.2f", a / b }'; }

label() {
    case $1 in
        pingora) echo "pingora-proxy as it comes" ;;
        before) echo "vllm-lb before" ;;
        *) echo "$1" ;;
    esac
}

# cell CASE NAME: the median, and how often haproxy's that is.
cell() {
    has "$1" "$2" || { echo "no sample"; return; }
    printf '%s' "$(figure 1 3 "$1" "$2")"
    [ "$2" = haproxy ] || ! has "$1" haproxy || printf ' (%s)' "$(ratio "$1" "$2" haproxy)"
}

# row LABEL CELL...
row() {
    printf '| %s ' "$@"
    echo '|'
}

costs() {
    local name case cells
    for name in "${proxies[@]}"; do
        cells=("$(label "$name")")
        for case in "${sizes[@]}" event idle-1600 idle-60000; do cells+=("$(cell "$case" "$name")"); done
        row "${cells[@]}"
    done
}

rates() {
    local name case cells
    for name in direct "${proxies[@]}"; do
        cells=("$(label "$name")")
        for case in "${sizes[@]}" event; do
            if has "$case" "$name"; then
                cells+=("$(figure 0 5 "$case" "$name"), $(figure 2 6 "$case" "$name")")
            else
                cells+=("no sample")
            fi
        done
        row "${cells[@]}"
    done
}

# added COLUMN NAME: microseconds more than without a proxy.
added() {
    awk -v a="$(median "$1" first "$2")" -v b="$(median "$1" first direct)" 'BEGIN { printf "%.0f", a - b }'
}

first_events() {
    local name
    for name in direct "${proxies[@]}"; do
        if ! has first "$name" || ! has first direct; then
            row "$(label "$name")" "no sample" "no sample" "" ""
        elif [ "$name" = direct ]; then
            row direct "$(figure 0 8 first direct)" "$(figure 0 9 first direct)" "" ""
        else
            row "$(label "$name")" "$(figure 0 8 first "$name")" \
                "$(figure 0 9 first "$name")" "$(added 8 "$name")" "$(added 9 "$name")"
        fi
    done
}

# scaling CASE: how often what one thread can carry two can.
scaling() {
    if [ "$ends_cores" = 0,1 ]; then
        awk -v a="$(median 3 "$1" one)" -v b="$(median 3 "$1" two)" 'BEGIN { printf "%.2f", 2 * a / b }'
    else
        awk -v a="$(median 5 "$1" two)" -v b="$(median 5 "$1" one)" 'BEGIN { printf "%.2f", a / b }'
    fi
}

# idle_cores CASE NAME: of those that proxy and ends were pinned to, in the median.
idle_cores() {
    local all
    all=$(tr ',' '\n' <<<"$proxy_cores,$ends_cores" | sort -u | wc -l)
    awk -v c="$1" -v p="$2" -v all="$all" '$1 == c && $2 == p { print all - $4 - $6 - $7 }' "$samples" |
        sort -g | awk '{ v[NR] = $1 < 0 ? 0 : $1 } END { printf "%.2f", v[int((NR + 1) / 2)] }'
}

threads() {
    local case bytes name cells
    for case in "${thread_cases[@]}"; do
        read -r bytes _ <<<"$case"
        for name in one two; do
            cells=("$bytes bytes, $name")
            if has "threads-$bytes" one && has "threads-$bytes" two; then
                cells+=("$(figure 1 3 "threads-$bytes" "$name")"
                    "$(figure 0 5 "threads-$bytes" "$name")"
                    "$(figure 2 6 "threads-$bytes" "$name")" "$(idle_cores "threads-$bytes" "$name")"
                    "$([ "$name" = one ] || scaling "threads-$bytes")")
            fi
            row "${cells[@]}"
        done
    done
}

# What the cores of this machine let the comparison of threads say.
threads_words() {
    if [ "$ends_cores" = 0,1 ]; then
        cat <<END
This machine has no core beside the two threads, so clients and upstream share the two cores with both
balancers, and requests a second say little. The ratio is twice the CPU time of a request with one thread over
that with two: what two whole cores could carry against what one can, if no core is left idle. It shows what
threads cost each other in CPU (shared cache lines, locks that spin, wake-ups), not waits for a lock; those
would show as idle cores, of which there are two in all.
END
    else
        echo "The ratio is of requests a second, with clients and upstream on cores of their own."
    fi
}

# verdict VALUE LIMIT SIGN
verdict() {
    awk -v v="$1" -v l="$2" -v sign="$3" \
        'BEGIN { print ((sign == ">=" ? v >= l : sign == "<" ? v < l : v <= l) ? "met" : "missed") }'
}

goal_rows() {
    local goal case limit of what value sign bytes
    for goal in "${goals[@]}"; do
        read -r case limit of what <<<"$goal"
        if ! has "$case" vllm-lb || { [ "$of" != KiB ] && ! has "$case" "$of"; }; then
            row "$what" "<= $limit of $(label "$of")" "no sample" ""
        elif [ "$of" = KiB ]; then
            value=$(figure 1 3 "$case" vllm-lb)
            row "$what" "<= $limit KiB" "$value KiB" "$(verdict "$value" "$limit" "<=")"
        else
            value=$(ratio "$case" vllm-lb "$of")
            sign="<="
            [ "$of" != pingora ] || sign="<"
            row "$what" "$sign $limit of $(label "$of")" "$value" "$(verdict "$value" "$limit" "$sign")"
        fi
    done
    if has first direct && has first vllm-lb; then
        row "added time to the first event, median" "<= 100 us" "$(added 8 vllm-lb) us" \
            "$(verdict "$(added 8 vllm-lb)" 100 "<=")"
        row "added time to the first event, 99th percentile" "<= 500 us" "$(added 9 vllm-lb) us" \
            "$(verdict "$(added 9 vllm-lb)" 500 "<=")"
    fi
    for case in "${thread_cases[@]}"; do
        read -r bytes _ <<<"$case"
        has "threads-$bytes" one && has "threads-$bytes" two || continue
        value=$(scaling "threads-$bytes")
        row "two threads against one, $bytes bytes" ">= 1.8" "$value" "$(verdict "$value" 1.8 ">=")"
    done
}

versions() {
    nginx -v 2>&1 | sed 's|.*/|nginx |'
    haproxy -v | sed -n '1s/.*version \([^ ]*\).*/haproxy \1/p'
    sed -n '/^name = "pingora-proxy"$/{n;s/version = "\(.*\)"/pingora-proxy \1/p}' Cargo.lock
    "$binary" --version
    [ -z "$before" ] || echo "before: $("$before" --version) ($before)"
    [ -z "$others" ] || "$python" -m pip list --disable-pip-version-check 2>/dev/null |
        sed -n 's/^\(sglang\|vllm\)[-_]router  *\(.*\)/\1-router \2/p'
    echo "profile $profile"
}

others_words() {
    [ -z "$others" ] || cat <<END

sglang-router and vllm-router are started with their defaults (policy: cache_aware), one worker thread of
tokio's each, on the core of the proxies. Both parse a request and write it anew. vllm-router asks the
upstream for the tokens of each prompt before it forwards it (\`/v1/chat/completions/render\`, answered with
404 here), which is part of its figures.
END
}

report() {
    cat <<END
# nginx, haproxy, vllm-lb: what a request costs

| | |
| --- | --- |
| date | $(date -u +%Y-%m-%d) |
| commit | $(commit | joined) |
| command | \`$command\`, $seconds s |
| machine | $(nproc) cores, $(processor), Linux $(uname -r) |
| versions | $(versions | joined) |
| disturbance | $(quietness) |

Medians of $rounds rounds; in brackets how often haproxy's figure that is. One thread a proxy, on a core of
its own; clients and upstream on another. CPU microseconds of the proxy for a chat request with a body of so
many bytes (32 connections, distinct bodies, an answer of 1 KiB), and for an event of a stream (500
streams with an event every 20 ms each). KiB of resident memory for each of $STREAMS streams that are
silent after their first event, for two sizes of the request's body.

| | 1.6 KB | 17 KB | 100 KB | 400 KB | an event | idle stream, 1.6 KB | idle stream, 60 KB |
| --- | --- | --- | --- | --- | --- | --- | --- |
$(costs)

"pingora-proxy as it comes" forwards requests to the upstreams in turn and does nothing else
([benches/proxies/pingora.rs](../proxies/pingora.rs)).
$(others_words)

What vllm-lb is to reach in one run with the others:

| goal | limit | here | |
| --- | --- | --- | --- |
$(goal_rows)

Requests, or events, a second, and how much of its core the proxy was busy with them. Direct is without a
proxy: more than clients and upstream can do on their core no proxy can show here. Events have a fixed pace.

| | 1.6 KB | 17 KB | 100 KB | 400 KB | an event |
| --- | --- | --- | --- | --- | --- |
$(rates)

Time to the first event of short streams, $RATE requests a second of 1.6 KB in an open loop, in microseconds:
from when the request was due, so that it holds the wait of clients and upstream for their core; "added" is
without what it is direct.

| | median | 99th percentile | added, median | added, 99th percentile |
| --- | --- | --- | --- | --- |
$(first_events)

vllm-lb with one thread and with two, 64 connections.
$(threads_words)

| | CPU us a request | requests a second | cores of the balancer | idle cores | two / one |
| --- | --- | --- | --- | --- | --- |
$(threads)

All samples, each with: case, proxy, CPU microseconds a unit (direct: of clients and upstream together),
cores that others used of those in use, units a second, cores that the proxy used, cores that clients and
upstream used, and for first events the median and the 99th percentile; or KiB a stream.

\`\`\`text
$(sort -s -k 1,1V -k 2,2 "$samples")
\`\`\`
END
}
