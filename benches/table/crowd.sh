# The part `crowd` of benches/table.sh: 10,000 streams at once through vllm-lb with two threads, on two
# cores, which clients and upstream share with it where the machine has no others. It is read with `source`.
#
# Each stream has an event every CROWD_PACE milliseconds. The client keeps all open to the end; one that
# ends before is an error.

CROWD=10000
CROWD_PACE=500
CROWD_SECONDS=10
readonly CROWD CROWD_PACE CROWD_SECONDS

measure_crowd() {
    local streams=$CROWD seconds=$CROWD_SECONDS cores=$ends_cores round
    [ -z "$quick" ] || streams=300 seconds=1
    proxy_cores=0,1
    if [ "$(nproc)" -ge 4 ]; then ends_cores=2,3; else ends_cores=0,1; fi
    streams=$(fewer "$streams")
    begin direct "$ends_cores" "$traffic" upstream "${port[direct]}" --pace $CROWD_PACE
    for ((round = 0; round < rounds; round++)); do
        begin_proxy two
        sample "crowd-$streams" two events "${port[two]}" "$streams" "$seconds" --any-pace
        end two
    done
    end direct
    ends_cores=$cores
}
