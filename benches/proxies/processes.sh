# How benches/proxies.sh and benches/table.sh start the proxies that they compare, and on which ports. It is
# read with `source`, after benches/proxies/common.sh.

# `one` and `two` are vllm-lb with so many threads.
declare -A port=([direct]=28400 [nginx]=28401 [haproxy]=28402 [vllm-lb]=28403 [pingora]=28420 [before]=28421
    [sglang-router]=28422 [vllm-router]=28423 [one]=28424 [two]=28425) pid=()
declare -A admins=([vllm-lb]=28404 [before]=28426 [sglang-router]=28427 [vllm-router]=28428
    [one]=28429 [two]=28430)

# begin_balancer NAME BINARY THREADS: a vllm-lb.
begin_balancer() {
    admin=${admins[$1]}
    settings vllm-lb.yaml "$1"
    sed "s/^threads: .*/threads: $3/" "$dir/vllm-lb.yaml" >"$dir/$1-settings.yaml"
    begin "$1" "$proxy_cores" "$2" -c "$dir/$1-settings.yaml"
}

# begin_router NAME MODULE: a router of Python's registry with its defaults. Both are Rust within a process of
# Python; tokio's own variable gives them one thread.
begin_router() {
    begin "$1" "$proxy_cores" env TOKIO_WORKER_THREADS=1 "$python" -m "$2" --log-level error \
        --host 127.0.0.1 --port "${port[$1]}" --worker-urls "http://127.0.0.1:${port[direct]}" \
        --prometheus-host 127.0.0.1 --prometheus-port "${admins[$1]}"
}

begin_proxy() {
    case $1 in
        nginx)
            settings nginx.conf nginx
            begin nginx "$proxy_cores" nginx -e "$dir/nginx.log" -c "$dir/nginx.conf"
            ;;
        haproxy)
            settings haproxy.cfg haproxy
            begin haproxy "$proxy_cores" haproxy -db -f "$dir/haproxy.cfg"
            ;;
        pingora)
            begin pingora "$proxy_cores" "$pingora" "127.0.0.1:${port[pingora]}" "127.0.0.1:${port[direct]}"
            ;;
        vllm-lb) begin_balancer vllm-lb "$binary" 1 ;;
        before) begin_balancer before "$before" 1 ;;
        one) begin_balancer one "$binary" 1 ;;
        two) begin_balancer two "$binary" 2 ;;
        sglang-router) begin_router sglang-router sglang_router.launch_router ;;
        vllm-router) begin_router vllm-router vllm_router.launch_router ;;
    esac
}
