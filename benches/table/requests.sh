# The parts `requests` and `idle` of benches/table.sh: CPU of a request and of an event, the time that a proxy
# adds, and memory of an idle stream. It is read with `source`.
#
# Each proxy has one thread, pinned to one core; the server behind it and the clients before it
# (benches/proxies/traffic.rs) share another. What counts is the CPU time that the scheduler notes for the
# proxy's process. Samples take turns between the proxies, and one during which others used more than NOISE
# of these cores is taken again, a few times. Added time is measured at a rate that every proxy can carry,
# from when a request was due (an open loop: a proxy that falls behind makes its clients wait, and the wait
# counts).

# Body bytes, requests of a closed loop for about a second of vllm-lb, requests a second of the open loop.
bodies=("1600 20000 1500" "17000 14000 600" "100000 6000 250" "400000 1600 50")

# Seconds of the open loop, and of streams.
OPEN_SECONDS=2
STREAM_SECONDS=2
# Streams with 50 events a second each.
STREAMS=1000
# Idle streams.
IDLE="1000 10000"
readonly OPEN_SECONDS STREAM_SECONDS STREAMS IDLE

# The routers that parse everything take several times as long for a request: a quarter is enough.
requests_of() {
    local count=$(($1 * percent / 100))
    case $2 in *-router) count=$((count / 4)) ;; esac
    echo $((count > 50 ? count : 50))
}

# scaled SECONDS: of a sample with that percentage, but long enough to count.
scaled() { awk -v s="$1" -v percent="$percent" 'BEGIN { s *= percent / 100; print s < 0.3 ? 0.3 : s }'; }

resident() { awk '/^Rss:/ { print $2 }' "/proc/$1/smaps_rollup"; }

one_round() {
    local body bytes count rate name streams=$STREAMS
    [ -z "$quick" ] || streams=100
    for body in "${bodies[@]}"; do
        read -r bytes count rate <<<"$body"
        for name in direct "${proxies[@]}"; do
            sample "$bytes" "$name" requests "${port[$name]}" "$bytes" "$(requests_of "$count" "$name")"
        done
        for name in direct "${proxies[@]}"; do
            sample "first-$bytes" "$name" rate "${port[$name]}" "$bytes" "$rate" "$(scaled $OPEN_SECONDS)"
        done
    done
    for name in "${proxies[@]}"; do
        echo "resident $name $(resident "${pid[$name]}")" | tee -a "$samples"
    done
    for name in direct "${proxies[@]}"; do
        sample events "$name" events "${port[$name]}" $streams "$(scaled $STREAM_SECONDS)" --any-pace
    done
}

# fewer STREAMS: so many, or what the limit of open files allows.
fewer() {
    local most
    most=$(most_streams 200)
    echo $(($1 < most ? $1 : most))
}

# idle CASE STREAMS: memory in fresh processes, as one that has worked keeps some, and hands it out again.
idle() {
    local name kib calm=(--calm 6)
    [ -z "$quick" ] || calm=(--calm 1)
    for name in "${proxies[@]}"; do
        begin_proxy "$name"
        if kib=$(ends idle "${port[$name]}" 1600 "$2" --proxy "${pid[$name]}" "${calm[@]}"); then
            echo "idle-$1 $name $kib $2" | tee -a "$samples"
        else
            say "no sample of idle-$1 with $name"
        fi
        end "$name"
    done
}

measure_requests() {
    local name round
    proxy_cores=0 ends_cores=1
    begin direct "$ends_cores" "$traffic" upstream "${port[direct]}"
    for name in "${proxies[@]}"; do begin_proxy "$name"; done
    for ((round = 0; round < rounds; round++)); do one_round; done
    for name in direct "${proxies[@]}"; do end "$name"; done
}

measure_idle() {
    local streams
    proxy_cores=0 ends_cores=1
    begin direct "$ends_cores" "$traffic" upstream "${port[direct]}"
    for streams in $IDLE; do
        if [ -n "$quick" ]; then
            idle "$streams" $((200 + streams / 100))
        else
            idle "$streams" "$(fewer "$streams")"
        fi
    done
    end direct
}
