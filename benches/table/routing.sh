# The part `routing` of benches/table.sh: the time to the first token when balancers route the same traffic
# over simulated engines. It is read with `source`.
#
# Engines (`vllm-lb engine`), balancer and clients (benches/table/player.rs) are processes of their own on
# all cores, fresh for each row. Time runs SPEED times faster than it was; all figures are seconds of the
# traffic. So what a balancer takes for itself counts so many times, and the figures are worth something
# only while there are cores to spare: a row says how many were used. `clock` is the policy of vllm-lb on
# the virtual clock of `vllm-lb simulate`, over the same requests.

# Kind of traffic, engines, how many times faster, minutes.
traffics=("conversation 8 10 20" "agents-closed 12 5 10" "rag 8 5 10" "agents 12 5 10")
readonly TRACE_SUM=b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df
readonly TRACE_URL=https://raw.githubusercontent.com/kvcache-ai/Mooncake/main/FAST25-release/traces
readonly FIRST_ENGINE=28440
# The port of the balancer, and of its admin listener or its metrics.
readonly ROUTING=28470 ROUTING_ADMIN=28471

has_trace() { [ -f "$trace" ] && sha256sum "$trace" | grep -q "^$TRACE_SUM "; }

# The trace is four megabytes of another project; a checkout does not hold it.
fetch_trace() {
    has_trace && return
    [ ! -f "$trace" ] || { say "$trace is not Mooncake's conversation_trace.jsonl" >&2; return 1; }
    say "fetching $TRACE_URL/conversation_trace.jsonl"
    mkdir -p "$(dirname "$trace")"
    curl -sSf --max-time 120 -o "$trace.part" "$TRACE_URL/conversation_trace.jsonl" || return 1
    mv "$trace.part" "$trace"
    has_trace || { say "$trace has another checksum" >&2; return 1; }
}

# servers LINE: the line for each engine, with its port in place of each `#`.
servers() {
    local engine
    for engine in ${engines//,/ }; do echo "${1//#/$engine}"; done
}

routing_nginx() {
    port[nginx]=$ROUTING
    settings nginx.conf nginx
    { echo '        least_conn;' && servers '        server 127.0.0.1:#;'; } >"$dir/servers"
    sed -i -e "/^        server 127\.0\.0\.1:[0-9]*;\$/{r $dir/servers" -e 'd}' "$dir/nginx.conf"
    exec nginx -e "$dir/nginx.log" -c "$dir/nginx.conf"
}

# The first bytes of the prompt decide, and no engine has more than 1.25 times its share of the requests in
# flight.
routing_haproxy() {
    port[haproxy]=$ROUTING
    settings haproxy.cfg haproxy
    sed -i '/^    server upstream/d' "$dir/haproxy.cfg"
    {
        printf '    option http-buffer-request\n    balance hash req.body,bytes(0,4096)\n'
        printf '    hash-type consistent\n    hash-balance-factor 125\n'
        servers '    server engine-# 127.0.0.1:#'
    } >>"$dir/haproxy.cfg"
    exec haproxy -db -f "$dir/haproxy.cfg"
}

routing_vllm_lb() {
    {
        printf 'listen: 127.0.0.1:%s\nadmin: {address: "127.0.0.1:%s"}\nupstreams:\n' $ROUTING $ROUTING_ADMIN
        servers '  - http://127.0.0.1:#'
    } >"$dir/routing.yaml"
    exec "$binary" -c "$dir/routing.yaml" -q
}

# routing_router MODULE POLICY
routing_router() {
    # shellcheck disable=SC2046
    exec "$python" -m "$1" --policy "$2" --log-level error --host 127.0.0.1 --port $ROUTING \
        --worker-urls $(servers 'http://127.0.0.1:#') \
        --prometheus-host 127.0.0.1 --prometheus-port $ROUTING_ADMIN
}

run_balancer() {
    case $1 in
        nginx) routing_nginx ;;
        haproxy) routing_haproxy ;;
        vllm-lb) routing_vllm_lb ;;
        sglang-router) routing_router sglang_router.launch_router cache_aware ;;
        vllm-router) routing_router vllm_router.launch_router cache_aware ;;
        vllm-router-kv) routing_router vllm_router.launch_router kv_aware ;;
    esac
}

# wait_for PORT NAME
wait_for() {
    "$traffic" wait "$1" && kill -0 "${pid[$2]}" && return
    cat "$dir/$2.out" >&2
    return 1
}

# route NAME KIND SPEED MINUTES: one row of one balancer.
route() {
    local name=$1 kind=$2 speed=$3 span=$4 engine row
    "$binary" engine --port "$engines" --speed "$speed" --cache-tokens "$cache" --max-model-len "$cache" \
        --block-size 512 --keep-alive 3600 -q -q >"$dir/engines.out" 2>&1 &
    pid[engines]=$!
    for engine in ${engines//,/ }; do wait_for "$engine" engines || return 1; done
    run_balancer "$name" >"$dir/balancer.out" 2>&1 &
    pid[balancer]=$!
    wait_for $ROUTING balancer || return 1
    # The sizes of the caches are read once a second.
    sleep 1.5
    if row=$("$player" play "$kind" --trace "$trace" --minutes "$span" --speed "$speed" \
        --target "127.0.0.1:$ROUTING" --engines "$engines" --balancer "${pid[balancer]}" \
        --engine "${pid[engines]}" --cores "$(seq -s , 0 $(($(nproc) - 1)))"); then
        echo "$kind $name $row" | tee -a "$samples"
    else
        say "no row of $kind with $name"
    fi
    end balancer
    end engines
}

product() { printf '%s\n' "$@" | awk 'BEGIN { p = 1 } { p *= $1 } END { print p }'; }

measure_routing() {
    local traffic_row kind count speed span name balancers=()
    player=$programs/player
    for name in "${proxies[@]}"; do
        [ "$name" = pingora ] || balancers+=("$name")
        [ "$name" != vllm-router ] || balancers+=(vllm-router-kv)
    done
    [ -z "$quick" ] || traffics=("agents-closed 4 40 0.7" "rag 4 40 0.7")
    for traffic_row in "${traffics[@]}"; do
        read -r kind count speed span <<<"$traffic_row"
        if [ "$kind" = conversation ] && ! fetch_trace; then
            say "no conversations without a trace; see --trace" >&2
            return 1
        fi
        if [ -z "$quick" ]; then
            span=$(product "$span" "$percent" 0.01) speed=$(product "$speed" "$faster")
        fi
        engines=$(seq -s , $FIRST_ENGINE $((FIRST_ENGINE + count - 1)))
        cache=$("$player" cache "$kind")
        echo "traffic $kind $count $speed $span" >>"$samples"
        name=$("$player" clock "$kind" --trace "$trace" --minutes "$span" --upstreams "$count")
        echo "$kind clock $name" | tee -a "$samples"
        for name in "${balancers[@]}"; do route "$name" "$kind" "$speed" "$span"; done
    done
}
