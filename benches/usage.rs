//! What it costs to look for the usage in an answer, and to take out of it what was only asked for:
//! `cargo bench --bench usage` (or with `--profile quick`).
//!
//! Each stream is fed event by event, as an engine sends them, and all words in it are distinct.
//!
//! | 100,000 events of | ns an event | GB/s (the best of several runs, no vector flags) |
//! | --- | --- | --- |
//! | a chat | 50 | 4.4 |
//! | a chat that tells its usage every time | 600 | 0.5 |
//! | a Responses stream | 47 | 4.2 |
//! | a chat that was asked for its usage, looked through for what that added | 35 | 6.1 |

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vllm_lb::reply::usage::UsageMeter;
use vllm_lb::route::usage::UsageFilter;

const EVENTS: usize = 100_000;

/// Xorshift: the same words at every run.
struct Random(u64);

impl Random {
    fn word(&mut self) -> String {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let letter = |at: u64| char::from(b'a' + (self.0 >> (5 * at + 4)) as u8 % 26);
        (0..1 + self.0 % 9).map(letter).collect()
    }
}

fn chat(word: &str, usage: &str) -> String {
    format!(
        "data: {{\"id\":\"chatcmpl-aac26cbe005fb1de\",\"object\":\"chat.completion.chunk\",\
         \"created\":1795154964,\"model\":\"tiny\",\"choices\":[{{\"index\":0,\
         \"delta\":{{\"content\":\" {word}\"}},\"logprobs\":null,\"finish_reason\":null,\
         \"token_ids\":null}}]{usage}}}\n\n"
    )
}

fn responses(word: &str) -> String {
    format!(
        "event: response.output_text.delta\ndata: {{\"content_index\":0,\"delta\":\"{word}\",\
         \"item_id\":\"msg_9e790835cda5dab8\",\"logprobs\":[],\"output_index\":0,\"sequence_number\":5,\
         \"type\":\"response.output_text.delta\"}}\n\n"
    )
}

fn usage(criterion: &mut Criterion) {
    const USAGE: &str = ",\"usage\":{\"prompt_tokens\":31,\"total_tokens\":43,\"completion_tokens\":12}";
    let mut random = Random(88_172_645_463_325_252);
    let mut events = |event: &dyn Fn(&str) -> String| -> Vec<String> {
        let first = "data: {\"response\":{\"id\":\"resp_1\"}}\n\n".to_owned();
        std::iter::once(first).chain((0..EVENTS).map(|_| event(&random.word()))).collect()
    };
    let kinds = [
        ("chat", events(&|word| chat(word, ""))),
        ("chat with usage", events(&|word| chat(word, USAGE))),
        ("responses", events(&responses)),
    ];
    let mut group = criterion.benchmark_group("usage");
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1)).sample_size(40);
    for (name, events) in &kinds {
        group.throughput(Throughput::Bytes(events.iter().map(String::len).sum::<usize>() as u64));
        group.bench_function(*name, |bench| {
            bench.iter(|| {
                let mut meter = UsageMeter::of(Some("text/event-stream")).expect("it is read");
                for event in events {
                    meter.feed(black_box(event.as_bytes()));
                }
                black_box(meter.usage())
            });
        });
    }
    group.finish();
}

/// A stream that was asked for its usage: all of its events but the last three are passed on as they are.
fn unasked(criterion: &mut Criterion) {
    const LAST: &str =
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":31},\"system_fingerprint\":\"f\"}\n\n";
    let mut random = Random(88_172_645_463_325_252);
    let mut events: Vec<String> = (0..EVENTS).map(|_| chat(&random.word(), "")).collect();
    events.push(chat("", "").replace("\"finish_reason\":null", "\"finish_reason\":\"stop\""));
    events.extend([LAST.to_string(), "data: [DONE]\n\n".to_string()]);
    let mut group = criterion.benchmark_group("unasked");
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1)).sample_size(40);
    group.throughput(Throughput::Bytes(events.iter().map(String::len).sum::<usize>() as u64));
    group.bench_function("chat", |bench| {
        bench.iter(|| {
            let mut unasked = UsageFilter::default();
            events.iter().filter_map(|event| unasked.feed(black_box(event.as_bytes()), false)).count()
        });
    });
    group.finish();
}

criterion_group!(benches, usage, unasked);
criterion_main!(benches);
