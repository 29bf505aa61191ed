//! The pace of the engine by examples, and that no request is lost by a property.

use proptest::prelude::*;

use super::*;

fn request(id: u64, prompt: usize, output: usize) -> EngineRequest {
    // Prompts of the same id share blocks; the answer's blocks continue the chain.
    let chain = (0..(prompt + output) / 16).map(|place| id * 10_000 + place as u64 + 1).collect();
    EngineRequest {
        id,
        prompt_tokens: prompt,
        output_tokens: output,
        chain,
        finish: Finish::Length,
        use_cache: true,
    }
}

fn engine(limits: EngineLimits, timing: Timing) -> SimulatedEngine {
    SimulatedEngine::new(limits, timing)
}

/// Runs the engine until it is idle.
fn drain(engine: &mut SimulatedEngine) -> Vec<EngineEvent> {
    let mut events = Vec::new();
    while let Some(next) = engine.next_event_time() {
        events.extend(engine.advance(next));
    }
    events
}

fn finish_of(events: &[EngineEvent], id: u64) -> GenerationSummary {
    events
        .iter()
        .find_map(|event| match event.kind {
            EngineEventKind::Finished(summary) if event.id == id => Some(summary),
            _ => None,
        })
        .expect("the request finished")
}

#[test]
fn a_request_takes_its_prefill_and_one_step_for_each_token() {
    let timing = Timing { per_step: 1.0, per_prefill_token: 0.5, per_sequence: 0.25, ..Timing::instant() };
    let mut engine = engine(EngineLimits::default(), timing);
    engine.submit(10.0, request(1, 4, 3)).unwrap();
    let events = drain(&mut engine);
    let times: Vec<f64> = events.iter().map(|event| event.at).collect();
    assert_eq!(times, [13.0, 14.25, 15.5, 15.5]);
    assert_eq!(events[0].kind, EngineEventKind::FirstToken { cached_tokens: 0 });
    let summary = finish_of(&events, 1);
    assert_eq!((summary.prompt_tokens, summary.output_tokens), (4, 3));
    assert_eq!((summary.arrived, summary.first_token), (10.0, 13.0));
}

#[test]
fn speed_divides_times_and_instant_takes_no_time() {
    assert_eq!(Timing::default().step(800, 0, 0) / Timing::faster(10.0).step(800, 0, 0), 10.0);
    let mut engine = engine(EngineLimits::default(), Timing::instant());
    engine.submit(1.0, request(1, 20_000, 50)).unwrap();
    let events = engine.advance(1.0);
    assert_eq!(events.len(), 51);
    assert!(events.iter().all(|event| event.at == 1.0));
    assert_eq!(engine.next_event_time(), None);
}

#[test]
fn prefills_long_prompts_in_chunks_beside_decoding() {
    let timing = Timing { per_step: 1.0, ..Timing::instant() };
    let mut engine = engine(EngineLimits { step_tokens: 100, ..EngineLimits::default() }, timing);
    engine.submit(0.0, request(1, 10, 20)).unwrap();
    engine.submit(0.5, request(2, 250, 1)).unwrap();
    let events = drain(&mut engine);
    // Steps: 1 prefills alone, then decodes while 2 gets 99 of its 250 tokens a step.
    assert_eq!(finish_of(&events, 2).first_token, 4.0);
    assert_eq!(finish_of(&events, 2).started, 1.0);
    assert_eq!(finish_of(&events, 1).output_tokens, 20);
}

#[test]
fn does_not_compute_a_cached_prefix_again() {
    let mut engine = engine(EngineLimits::default(), Timing { per_prefill_token: 1.0, ..Timing::instant() });
    engine.submit(0.0, request(1, 64, 16)).unwrap();
    drain(&mut engine);
    // The same prompt again: three of its four blocks, the last token is always computed.
    let mut again = request(1, 64, 16);
    again.id = 2;
    engine.submit(100.0, again).unwrap();
    let events = drain(&mut engine);
    assert_eq!(events[0].kind, EngineEventKind::FirstToken { cached_tokens: 48 });
    assert_eq!(events[0].at, 116.0);
    // The conversation continues: prompt and answer are cached, except for the answer's last token.
    let mut next = request(1, 96, 16);
    next.id = 3;
    engine.submit(200.0, next).unwrap();
    assert_eq!(finish_of(&drain(&mut engine), 3).cached_tokens, 64);
    assert_eq!(engine.counters().prefix_queries, 64 + 64 + 96);
    assert_eq!(engine.counters().prefix_hits, 48 + 64);
    let mut blind = request(1, 96, 16);
    blind.use_cache = false;
    engine.submit(400.0, blind).unwrap();
    assert_eq!(finish_of(&drain(&mut engine), 1).cached_tokens, 0);
}

#[test]
fn requests_wait_for_a_batch_slot_and_for_cache_room() {
    let timing = Timing { per_step: 1.0, ..Timing::instant() };
    let limits =
        EngineLimits { max_running: 2, max_waiting: Some(1), cache_tokens: 160, ..EngineLimits::default() };
    let mut engine = engine(limits, timing);
    engine.submit(0.0, request(1, 16, 16)).unwrap();
    engine.submit(0.0, request(2, 100, 28)).unwrap();
    assert_eq!((engine.running(), engine.waiting()), (1, 1));
    assert_eq!(engine.submit(0.0, request(3, 1, 1)), Err(EngineRefusal::QueueFull));
    assert_eq!(engine.submit(0.0, request(4, 160, 1)), Err(EngineRefusal::TooLarge));
    engine.advance(1.0);
    assert_eq!((engine.running(), engine.waiting()), (2, 0), "2 + 8 of 10 blocks");
    engine.submit(1.0, request(5, 1, 1)).unwrap();
    let events = drain(&mut engine);
    assert!(finish_of(&events, 5).started >= 16.0, "starts when the first one finishes");
    assert_eq!(engine.kv_usage(), 0.0);
}

#[test]
fn removes_an_aborted_request_at_once() {
    let mut engine = engine(EngineLimits { max_running: 1, ..EngineLimits::default() }, Timing::default());
    engine.submit(0.0, request(1, 64, 100)).unwrap();
    engine.submit(0.0, request(2, 64, 100)).unwrap();
    engine.advance(0.5);
    assert!(engine.kv_usage() > 0.0);
    assert!(engine.abort(2) && engine.abort(1));
    assert!(!engine.abort(1), "the second abort finds no request");
    assert_eq!((engine.running(), engine.waiting(), engine.kv_usage()), (0, 0, 0.0));
    assert_eq!(engine.next_event_time(), None);
    assert_eq!(engine.counters().aborted, 2);
}

#[test]
fn keeps_requests_while_paused() {
    let mut engine = engine(EngineLimits::default(), Timing::instant());
    engine.pause();
    engine.submit(0.0, request(1, 16, 4)).unwrap();
    assert!(engine.advance(9.0).is_empty());
    engine.resume(10.0);
    assert_eq!(engine.advance(10.0).len(), 5);
    assert!(engine.clear_cache());
    assert_eq!(engine.held(&request(1, 16, 4).chain), 0);
}

#[test]
fn ends_a_request_without_output_with_its_prefill() {
    let mut engine = engine(EngineLimits::default(), Timing { per_step: 1.0, ..Timing::instant() });
    engine.submit(0.0, request(1, 30, 0)).unwrap();
    let events = drain(&mut engine);
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].at, finish_of(&events, 1).output_tokens), (1.0, 0));
}

proptest! {
    /// In any schedule every request ends once with all its tokens, no block stays pinned, and the times of
    /// the events never decrease.
    #[test]
    fn loses_no_request_in_any_schedule(
        requests in prop::collection::vec((0u64..5, 1usize..90, 0usize..40, 0u8..10), 1..60),
        max_running in 1usize..6,
        step_tokens in 8usize..64,
    ) {
        let limits = EngineLimits { max_running, step_tokens, cache_tokens: 160, ..EngineLimits::default() };
        let mut engine = engine(limits, Timing { per_step: 1.0, ..Timing::instant() });
        let (mut now, mut events, mut due) = (0.0, Vec::new(), Vec::new());
        for (at, (family, prompt, output, fate)) in requests.into_iter().enumerate() {
            let mut request = request(family, prompt, output);
            request.id = at as u64;
            if engine.submit(now, request).is_ok() {
                due.push((at as u64, output));
            }
            now += f64::from(fate);
            events.extend(engine.advance(now));
            let finished = |id: u64| events.iter().any(|event: &EngineEvent| {
                event.id == id && matches!(event.kind, EngineEventKind::Finished(_))
            });
            if fate == 3 && !due.is_empty() {
                let (id, _) = due[due.len() / 2];
                let was_there = !finished(id);
                prop_assert_eq!(engine.abort(id), was_there);
                if was_there {
                    due.retain(|&(other, _)| other != id);
                }
            }
            prop_assert!(engine.running() <= max_running);
            prop_assert!(engine.kv_usage() <= 1.0);
        }
        events.extend(drain(&mut engine));
        prop_assert!(events.windows(2).all(|pair| pair[0].at <= pair[1].at));
        for (id, output) in due {
            let tokens = events.iter().filter(|event| event.id == id).count();
            prop_assert_eq!(tokens, output + 1, "tokens and the end of {}", id);
        }
        prop_assert_eq!((engine.running(), engine.waiting(), engine.reserved), (0, 0, 0));
        prop_assert_eq!(engine.cache.pinned(), 0);
    }
}
