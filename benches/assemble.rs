//! What it costs to assemble the record of a call: `cargo bench --bench assemble` (or with
//! `--profile quick`).
//!
//! A stream is fed event by event, each with one token id, one log-probability and one piece of content, as
//! vLLM sends them with `logprobs` and `return_token_ids`. A whole answer has the ids of its prompt and the
//! ids and log-probabilities of its completion.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vllm_lb::reply::token_event::read_token_event;
use vllm_lb::traces::assemble::{AnswerAssembler, AnswerBuffer, read_request};
use vllm_lb::traces::record::TraceApi;

const EVENTS: u64 = 10_000;
const PROMPT_TOKENS: usize = 8192;
const COMPLETION_TOKENS: usize = 500;

/// Xorshift: the same words at every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn id(&mut self) -> u64 {
        self.next() % 150_000
    }

    fn word(&mut self) -> String {
        let bits = self.next();
        let letter = |at: u64| char::from(b'a' + (bits >> (5 * at + 4)) as u8 % 26);
        (0..1 + bits % 9).map(letter).collect()
    }

    /// A chat's log-probability of the word, a number of 32 bits as engines have them.
    fn logprob(&mut self, word: &str) -> String {
        let number = f64::from(-((self.next() % 1_000_000) as f32) / 77_777.0);
        let bytes: Vec<_> = word.bytes().map(|byte| byte.to_string()).collect();
        format!(
            "{{\"token\":\"{word}\",\"logprob\":{number:?},\"bytes\":[{}],\"top_logprobs\":[]}}",
            bytes.join(",")
        )
    }

    fn ids(&mut self, count: usize) -> String {
        (0..count).map(|_| self.id().to_string()).collect::<Vec<_>>().join(",")
    }
}

fn event(random: &mut Random) -> String {
    let word = random.word();
    let (logprob, id) = (random.logprob(&word), random.id());
    format!(
        "data: {{\"id\":\"chatcmpl-82286f6bcd0c53c0\",\"object\":\"chat.completion.chunk\",\
         \"created\":1795154964,\"model\":\"tiny\",\"choices\":[{{\"index\":0,\
         \"delta\":{{\"content\":\"{word}\"}},\"logprobs\":{{\"content\":[{logprob}]}},\
         \"finish_reason\":null,\"token_ids\":[{id}]}}]}}\n\n"
    )
}

fn whole(random: &mut Random) -> String {
    let words: Vec<String> = (0..COMPLETION_TOKENS).map(|_| random.word()).collect();
    let logprobs: Vec<String> = words.iter().map(|word| random.logprob(word)).collect();
    format!(
        "{{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1795154962,\"model\":\"tiny\",\
         \"choices\":[{{\"index\":0,\"message\":{{\"role\":\"assistant\",\"content\":\"{}\",\"refusal\":null,\
         \"reasoning\":null}},\"logprobs\":{{\"content\":[{}]}},\"finish_reason\":\"stop\",\
         \"stop_reason\":null,\"token_ids\":[{}],\"routed_experts\":null}}],\"usage\":{{\
         \"prompt_tokens\":{PROMPT_TOKENS},\"completion_tokens\":{COMPLETION_TOKENS}}},\
         \"prompt_logprobs\":null,\"prompt_token_ids\":[{}],\"prompt_text\":null}}",
        words.concat(),
        logprobs.join(","),
        random.ids(COMPLETION_TOKENS),
        random.ids(PROMPT_TOKENS)
    )
}

/// A turn with twenty messages of about 1,600 bytes.
fn request(random: &mut Random) -> String {
    let mut message = |at: usize| {
        let text: Vec<String> = (0..270).map(|_| random.word()).collect();
        let role = ["user", "assistant"][at % 2];
        format!("{{\"role\":\"{role}\",\"content\":\"{}\"}}", text.join(" "))
    };
    let messages: Vec<String> = (0..20).map(&mut message).collect();
    format!(
        "{{\"model\":\"tiny\",\"messages\":[{}],\"logprobs\":true,\"return_token_ids\":true}}",
        messages.join(",")
    )
}

fn assemble(criterion: &mut Criterion) {
    let mut random = Random(88_172_645_463_325_252);
    let events: Vec<String> = (0..EVENTS).map(|_| event(&mut random)).collect();
    let (whole, request) = (whole(&mut random), request(&mut random));
    let mut group = criterion.benchmark_group("assemble");
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1)).sample_size(20);
    group.throughput(Throughput::Elements(EVENTS));
    group.bench_function("event of a chat", |bench| {
        bench.iter(|| {
            let mut assembler = AnswerAssembler::new(TraceApi::Chat, true, 200);
            for event in &events {
                assembler.feed(black_box(event.as_bytes()));
            }
            assembler.finish()
        });
    });
    group.bench_function("token of a chat that the relay has read", |bench| {
        let mut buffer = AnswerBuffer::default();
        for event in &events {
            let choice = event.trim_ascii_end().split_once("\"choices\":[").expect("a chat").1;
            let (token, _) = read_token_event(choice.as_bytes()).expect("the form of engines");
            buffer.push_token(&token);
        }
        bench.iter(|| {
            let mut assembler = AnswerAssembler::new(TraceApi::Chat, true, 200);
            assembler.read(black_box(&buffer));
            assembler.finish()
        });
    });
    group.throughput(Throughput::Bytes(whole.len() as u64));
    group.bench_function("whole chat of 8,192 + 500 tokens", |bench| {
        bench.iter(|| {
            let mut assembler = AnswerAssembler::new(TraceApi::Chat, false, 200);
            assembler.feed(black_box(whole.as_bytes()));
            assembler.finish()
        });
    });
    group.throughput(Throughput::Bytes(request.len() as u64));
    group.bench_function("request of 20 messages", |bench| {
        bench.iter(|| read_request(TraceApi::Chat, black_box(request.as_bytes())));
    });
    group.finish();
}

criterion_group!(benches, assemble);
criterion_main!(benches);
