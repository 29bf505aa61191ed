//! How fast a prompt is made canonical and hashed: `cargo bench --bench canon` (or with `--profile quick`,
//! a fifth slower).
//!
//! The bodies are distinct, see `scan.rs`. `canon` is the reading alone, over bytes that were scanned before;
//! `scan and canon` is all that a body costs. Reading the messages into strings with `serde_json` stands
//! beside as the yardstick: it hashes nothing.
//!
//! `benches/notes.md` has figures, and what they mean.

use std::borrow::Cow;
use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde::Deserialize;
use vllm_lb::prompt::canon::{PromptDialect, PromptReader, PromptSource};
use vllm_lb::prompt::chain::BlockLayout;
use vllm_lb::prompt::scan::Scanner;

const BODIES: usize = 64;
const BODY_BYTES: usize = 100 << 10;

/// Xorshift: the same bodies at every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    /// Random words; one gap between two words in `escape_one_in` holds an escape.
    fn words(&mut self, words: u64, escape_one_in: u64) -> String {
        let mut text = String::new();
        for _ in 0..words {
            for _ in 0..1 + self.below(9) {
                text.push(char::from(b'a' + self.below(26) as u8));
            }
            text.push_str(match self.below(escape_one_in) {
                0 => "\\n",
                1 => "\\\"",
                2 => "\\u00e9",
                3 => "\u{e9}",
                _ => " ",
            });
        }
        text
    }
}

fn list(random: &mut Random, mut element: impl FnMut(&mut Random) -> String) -> String {
    let mut list = String::new();
    while list.len() < BODY_BYTES {
        list.push_str(if list.is_empty() { "" } else { "," });
        list.push_str(&element(random));
    }
    list
}

fn chat(random: &mut Random, escape_one_in: u64) -> Vec<u8> {
    let messages = list(random, |random| {
        let words = 20 + random.below(400);
        let text = random.words(words, escape_one_in);
        format!("{{\"role\":\"user\",\"content\":\"{text}\"}}")
    });
    finish(&format!("\"messages\":[{messages}]"))
}

/// A coding agent: short words, calls whose arguments are JSON in a string, results full of line feeds.
fn agent(random: &mut Random) -> Vec<u8> {
    let messages = list(random, |random| {
        let (said, called, result) = (random.words(30, 40), random.words(20, u64::MAX), random.words(300, 8));
        format!(
            "{{\"role\":\"assistant\",\"content\":\"{said}\",\"tool_calls\":[{{\"id\":\"call_{}\",\
             \"type\":\"function\",\"function\":{{\"name\":\"edit\",\"arguments\":\
             \"{{\\\"path\\\": \\\"a/b.rs\\\", \\\"text\\\": \\\"{called}\\\\n{called}\\\"}}\"}}}}]}},\
             {{\"role\":\"tool\",\"tool_call_id\":\"call_1\",\"content\":\"{result}\"}}",
            random.below(1 << 40),
        )
    });
    finish(&format!("\"messages\":[{messages}]"))
}

fn token_ids(random: &mut Random) -> Vec<u8> {
    let ids = list(random, |random| random.below(150_000).to_string());
    finish(&format!("\"prompt\":[{ids}]"))
}

fn finish(prompt: &str) -> Vec<u8> {
    format!("{{{prompt},\"stream\":true,\"temperature\":0.7,\"model\":\"meta-llama/Llama-3.1-70B\"}}")
        .into_bytes()
}

#[derive(Deserialize)]
struct Yardstick<'a> {
    #[serde(borrow, default)]
    messages: Vec<Message<'a>>,
    #[serde(default)]
    prompt: Vec<u32>,
}

#[derive(Deserialize)]
struct Message<'a> {
    role: &'a str,
    #[serde(borrow)]
    content: Cow<'a, str>,
}

fn scanned(body: &[u8]) -> Scanner {
    let mut scanner = Scanner::new();
    scanner.scan(body);
    scanner
}

fn canon(criterion: &mut Criterion) {
    let mut random = Random(88_172_645_463_325_252);
    let mut bodies = |make: fn(&mut Random) -> Vec<u8>| -> Vec<(Vec<u8>, Scanner)> {
        let body = |_| {
            let body = make(&mut random);
            let scanner = scanned(&body);
            (body, scanner)
        };
        (0..BODIES).map(body).collect()
    };
    let kinds = [
        ("prose", PromptDialect::Chat, bodies(|random| chat(random, 40))),
        ("escapes", PromptDialect::Chat, bodies(|random| chat(random, 8))),
        ("agent", PromptDialect::Chat, bodies(agent)),
        ("token ids", PromptDialect::Completions, bodies(token_ids)),
    ];
    for (name, dialect, bodies) in &kinds {
        let dialect = *dialect;
        let mut group = criterion.benchmark_group(*name);
        let bytes = bodies.iter().map(|(body, _)| body.len()).sum::<usize>();
        group.throughput(Throughput::Bytes(bytes as u64));
        group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1)).sample_size(40);
        let mut reader = PromptReader::default();
        group.bench_function("canon", |bench| {
            bench.iter(|| {
                for (body, scanner) in black_box(bodies) {
                    let request = PromptSource { dialect, model: "llama", body, scanner };
                    black_box(reader.read(&request, BlockLayout::default()));
                }
            });
        });
        group.bench_function("scan and canon", |bench| {
            bench.iter(|| {
                for (body, _) in black_box(bodies) {
                    let scanner = &scanned(body);
                    let request = PromptSource { dialect, model: "llama", body, scanner };
                    black_box(reader.read(&request, BlockLayout::default()));
                }
            });
        });
        group.bench_function("serde_json", |bench| {
            bench.iter(|| {
                for (body, _) in black_box(bodies) {
                    let read: Yardstick = serde_json::from_slice(body).expect("the bodies are JSON");
                    black_box((
                        read.messages.iter().map(|m| m.role.len() + m.content.len()).sum::<usize>(),
                        read.prompt,
                    ));
                }
            });
        });
        group.finish();
    }
}

criterion_group!(benches, canon);
criterion_main!(benches);
