//! What it costs to capture a call, beside assembling and storing it: `cargo bench --bench capture` (or with
//! `--profile quick`).
//!
//! Each stream is fed event by event, as an engine sends them, and all words in it are distinct.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde_json::{Map, json};
use vllm_lb::prompt::scan::Scanner;
use vllm_lb::route::capture::{AnswerCleanup, capture_question, session_edit};
use vllm_lb::route::dialect::BodyDialect;
use vllm_lb::route::rewrite::AddedAnswerFields;
use vllm_lb::traces::assemble::AnswerBuffer;

const EVENTS: usize = 10_000;

/// The buffer of a capture, about.
const BUFFER_BYTES: usize = 8 << 10;

const BOTH: AddedAnswerFields = AddedAnswerFields { logprobs: true, token_ids: true };
const NOTHING: AddedAnswerFields = AddedAnswerFields { logprobs: false, token_ids: false };

/// Xorshift: the same words at every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn word(&mut self) -> String {
        let bits = self.next();
        let letter = |at: u64| char::from(b'a' + (bits >> (5 * at + 4)) as u8 % 26);
        (0..1 + bits % 9).map(letter).collect()
    }
}

fn chat(random: &mut Random) -> String {
    let (word, id) = (random.word(), random.next() % 150_000);
    let bytes: Vec<String> = word.bytes().map(|byte| byte.to_string()).collect();
    let logprob = -(random.next() as f64 / u64::MAX as f64);
    format!(
        "data: {{\"id\":\"chatcmpl-aac26cbe005fb1de\",\"object\":\"chat.completion.chunk\",\
         \"created\":1795154964,\"model\":\"tiny\",\"choices\":[{{\"index\":0,\
         \"delta\":{{\"content\":\" {word}\"}},\"logprobs\":{{\"content\":[{{\"token\":\" {word}\",\
         \"logprob\":{logprob},\"bytes\":[{}],\"top_logprobs\":[]}}]}},\"finish_reason\":null,\
         \"token_ids\":[{id}]}}]}}\n\n",
        bytes.join(",")
    )
}

fn completion(random: &mut Random) -> String {
    let (word, id) = (random.word(), random.next() % 150_000);
    let logprob = -(random.next() as f64 / u64::MAX as f64);
    format!(
        "data: {{\"id\":\"cmpl-af40cc4a7f537155\",\"object\":\"text_completion\",\"created\":1795154964,\
         \"model\":\"tiny\",\"choices\":[{{\"index\":0,\"text\":\" {word}\",\
         \"logprobs\":{{\"text_offset\":[0],\"token_logprobs\":[{logprob}],\"tokens\":[\" {word}\"],\
         \"top_logprobs\":[{{\" {word}\":{logprob}}}]}},\"finish_reason\":null,\"stop_reason\":null,\
         \"prompt_token_ids\":null,\"token_ids\":[{id}]}}]}}\n\n"
    )
}

fn plain_chat(random: &mut Random) -> String {
    let word = random.word();
    format!(
        "data: {{\"id\":\"chatcmpl-aac26cbe005fb1de\",\"object\":\"chat.completion.chunk\",\
         \"created\":1795154964,\"model\":\"tiny\",\"choices\":[{{\"index\":0,\
         \"delta\":{{\"content\":\" {word}\"}},\"logprobs\":null,\"finish_reason\":null,\
         \"token_ids\":null}}]}}\n\n"
    )
}

fn messages(random: &mut Random) -> String {
    format!(
        "event: content_block_delta\ndata: {{\"type\":\"content_block_delta\",\"delta\":\
         {{\"type\":\"text_delta\",\"text\":\"{}\"}},\"index\":0}}\n\n",
        random.word()
    )
}

fn responses(random: &mut Random) -> String {
    format!(
        "event: response.output_text.delta\ndata: {{\"content_index\":0,\"delta\":\"{}\",\
         \"item_id\":\"msg_9e790835cda5dab8\",\"logprobs\":[],\"output_index\":0,\"sequence_number\":5,\
         \"type\":\"response.output_text.delta\"}}\n\n",
        random.word()
    )
}

/// The first event of a chat, with the ids of a prompt.
fn first_event(random: &mut Random) -> String {
    let ids: Vec<String> = (0..8192).map(|_| (random.next() % 150_000).to_string()).collect();
    format!(
        "data: {{\"id\":\"chatcmpl-aac26cbe005fb1de\",\"object\":\"chat.completion.chunk\",\
         \"created\":1795154964,\"model\":\"tiny\",\"choices\":[{{\"index\":0,\
         \"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\"logprobs\":null,\"finish_reason\":null}}],\
         \"prompt_token_ids\":[{}],\"prompt_text\":null}}\n\n",
        ids.join(",")
    )
}

fn events(event: impl Fn(&mut Random) -> String) -> Vec<String> {
    let mut random = Random(88_172_645_463_325_252);
    (0..EVENTS).map(|_| event(&mut random)).collect()
}

fn cleanup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cleanup");
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1)).sample_size(20);
    for (name, dialect, fields, events) in [
        ("chat", BodyDialect::Chat, BOTH, events(chat)),
        ("chat without fields", BodyDialect::Chat, BOTH, events(plain_chat)),
        ("completions", BodyDialect::Completions, BOTH, events(completion)),
        ("first event", BodyDialect::Chat, BOTH, vec![first_event(&mut Random(88_172_645_463_325_252))]),
        ("watched chat", BodyDialect::Chat, NOTHING, events(plain_chat)),
        ("watched messages", BodyDialect::Messages, NOTHING, events(messages)),
        ("watched responses", BodyDialect::Responses, NOTHING, events(responses)),
    ] {
        group.throughput(Throughput::Elements(events.len() as u64));
        let bytes: usize = events.iter().map(String::len).sum();
        group.bench_function(format!("{name} of {} bytes", bytes / events.len()), |bench| {
            let (mut out, mut buffer) = (Vec::new(), AnswerBuffer::default());
            let kind = Some("text/event-stream");
            bench.iter(|| {
                let mut cleanup = AnswerCleanup::new(dialect, fields, 200, kind);
                for event in &events {
                    out.clear();
                    let event = black_box(event.as_bytes());
                    let taken = cleanup.take_tokens(event, &mut out, |token| buffer.push_token(token));
                    if taken < event.len() {
                        buffer.push_piece(&event[taken..]);
                        black_box(cleanup.feed(&event[taken..], false, &mut out));
                    }
                    if buffer.len() > BUFFER_BYTES {
                        buffer.clear();
                    }
                    black_box(&out);
                }
            });
        });
    }
    group.finish();
}

/// A chat of 8,000 tokens in 40 messages.
fn request(criterion: &mut Criterion) {
    let mut random = Random(88_172_645_463_325_252);
    let mut text = || (0..160).map(|_| random.word()).collect::<Vec<_>>().join(" ");
    let messages: Vec<_> = (0..40).map(|_| json!({"role": "user", "content": text()})).collect();
    let body = json!({"model": "m", "messages": messages, "stream": true, "temperature": 0.7}).to_string();
    let mut scanner = Scanner::new();
    scanner.scan(body.as_bytes());
    let set = [("temperature".to_owned(), json!(1.0)), ("top_p".to_owned(), json!(0.9))];
    let set: Map<_, _> = set.into_iter().collect();
    let mut group = criterion.benchmark_group("request");
    group.measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_secs(1)).sample_size(20);
    group.throughput(Throughput::Bytes(body.len() as u64));
    group.bench_function("question", |bench| {
        bench.iter(|| capture_question(black_box(body.as_bytes()), None, BodyDialect::Chat));
    });
    group.bench_function("question about a body that was scanned", |bench| {
        bench.iter(|| capture_question(black_box(body.as_bytes()), Some(&scanner), BodyDialect::Chat));
    });
    group.bench_function("session edit", |bench| {
        bench.iter(|| session_edit(black_box(body.as_bytes()), &set, Some("pin")));
    });
    group.finish();
}

criterion_group!(benches, cleanup, request);
criterion_main!(benches);
