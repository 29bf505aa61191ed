//! The queue under any schedule: order, and that every request is served.

use super::*;

/// One step of a schedule.
#[derive(Clone, Debug)]
enum QueueStep {
    Arrive(usize),
    Leave(prop::sample::Index),
    Free(usize),
    Poll(prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<QueueStep>> {
    let index = any::<prop::sample::Index>;
    let step = prop_oneof![
        4 => (0..4usize).prop_map(QueueStep::Arrive),
        1 => index().prop_map(QueueStep::Leave),
        3 => (0..3usize).prop_map(QueueStep::Free),
        4 => index().prop_map(QueueStep::Poll),
    ];
    prop::collection::vec(step, 0..80)
}

/// Polls all requests until none is admitted any more; moves the admitted ones to `order`.
fn run_until_idle(waiting: &mut Vec<(usize, usize, Waiting<'_>)>, order: &mut Vec<(usize, usize)>) {
    loop {
        let before = waiting.len();
        waiting.retain_mut(|(model, number, future)| match poll(future) {
            Poll::Ready(Ok(_)) => {
                order.push((*model, *number));
                false
            }
            Poll::Ready(Err(refused)) => panic!("{refused:?}"),
            Poll::Pending => true,
        });
        if waiting.len() == before {
            return;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// In any order of arrivals, departures, freed places and polls: no request overtakes another of its
    /// model, no request waits beside a free place once all have run, and the counts return to zero.
    #[test]
    fn keeps_order_and_serves_every_request_in_any_schedule(steps in steps()) {
        const MODELS: [&str; 4] = ["a", "b", "c", "d"];
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().start_paused(true).build().expect("a runtime without sockets");
        let _entered = runtime.enter();
        let queue = Queue::new(1000, Observer::default());
        let servers = [
            Server::new(0, &queue, 1, &["a", "b"]),
            Server::new(1, &queue, 0, &["b", "c"]),
            Server::new(2, &queue, 0, &["d", "a", "c"]),
        ];
        let deadline = after(LONG);
        let mut waiting: Vec<(usize, usize, Waiting<'_>)> = Vec::new();
        let mut order = Vec::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                QueueStep::Arrive(model) => {
                    let mut future: Waiting<'_> =
                        Box::pin(admitted(queue.clone(), key(MODELS[model]), &servers, deadline));
                    match poll(&mut future) {
                        Poll::Ready(_) => order.push((model, number)),
                        Poll::Pending => waiting.push((model, number, future)),
                    }
                }
                QueueStep::Leave(at) if !waiting.is_empty() => drop(waiting.remove(at.index(waiting.len()))),
                QueueStep::Free(server) => servers[server].free(),
                QueueStep::Poll(at) if !waiting.is_empty() => {
                    let at = at.index(waiting.len());
                    if poll(&mut waiting[at].2).is_ready() {
                        let (model, number, _) = waiting.remove(at);
                        order.push((model, number));
                    }
                }
                _ => {}
            }
        }
        run_until_idle(&mut waiting, &mut order);
        for (model, name) in MODELS.iter().enumerate() {
            let numbers: Vec<usize> = order.iter().filter(|(m, _)| *m == model).map(|(_, n)| *n).collect();
            prop_assert!(numbers.is_sorted(), "{name}: {numbers:?}");
        }
        for (model, _, _) in &waiting {
            let key = key(MODELS[*model]);
            let free = |server: &Server| {
                key.served_by(&server.upstream.live.identity) && server.places.load(Ordering::Relaxed) > 0
            };
            prop_assert!(!servers.iter().any(free), "{} waits beside a free place", MODELS[*model]);
        }
        prop_assert_eq!(queue.len(), waiting.len());
        waiting.clear();
        prop_assert_eq!(queue.len(), 0);
        prop_assert!(queue.lock().by_key.is_empty());
    }
}
