//! How fast a body is looked at: `cargo bench --bench scan` (or with `--profile quick`).
//!
//! The bodies are distinct: a bench that repeats one body trains the branch predictor and flatters every
//! scanner by a factor of two or more. `serde_json` reading the same two fields stands beside as the
//! yardstick, so that a figure means something on another machine.
//! `benches/notes.md` has figures.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde::Deserialize;
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
}

/// Messages of random words; one gap between two words in `rarity` holds an escape.
fn chat(random: &mut Random, escape_one_in: u64) -> Vec<u8> {
    let mut messages = String::new();
    while messages.len() < BODY_BYTES {
        messages.push_str(if messages.is_empty() { "" } else { "," });
        messages.push_str("{\"role\":\"user\",\"content\":\"");
        for _ in 0..20 + random.below(400) {
            for _ in 0..1 + random.below(9) {
                messages.push(char::from(b'a' + random.below(26) as u8));
            }
            messages.push_str(match random.below(escape_one_in) {
                0 => "\\n",
                1 => "\\\"",
                2 => "\\u00e9",
                3 => "\u{e9}",
                _ => " ",
            });
        }
        messages.push_str("\"}");
    }
    finish(&format!("\"messages\":[{messages}]"))
}

fn token_ids(random: &mut Random) -> Vec<u8> {
    let mut ids = String::new();
    while ids.len() < BODY_BYTES {
        ids.push_str(if ids.is_empty() { "" } else { "," });
        ids.push_str(&random.below(150_000).to_string());
    }
    finish(&format!("\"prompt\":[{ids}]"))
}

fn finish(prompt: &str) -> Vec<u8> {
    format!("{{{prompt},\"stream\":true,\"temperature\":0.7,\"model\":\"meta-llama/Llama-3.1-70B\"}}")
        .into_bytes()
}

#[derive(Deserialize)]
struct Yardstick<'a> {
    model: &'a str,
    stream: bool,
}

fn scan(criterion: &mut Criterion) {
    let mut random = Random(88_172_645_463_325_252);
    let kinds = [
        ("prose", (0..BODIES).map(|_| chat(&mut random, 40)).collect::<Vec<_>>()),
        ("escapes", (0..BODIES).map(|_| chat(&mut random, 8)).collect()),
        ("token ids", (0..BODIES).map(|_| token_ids(&mut random)).collect()),
    ];
    for (name, bodies) in &kinds {
        let mut group = criterion.benchmark_group(*name);
        let bytes = bodies.iter().map(Vec::len).sum::<usize>();
        group.throughput(Throughput::Bytes(bytes as u64));
        group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1)).sample_size(40);
        group.bench_function("scanner", |bench| {
            bench.iter(|| {
                for body in black_box(bodies) {
                    let mut scanner = Scanner::new();
                    scanner.scan(body);
                    black_box(scanner.facts(body));
                }
            });
        });
        group.bench_function("serde_json", |bench| {
            bench.iter(|| {
                for body in black_box(bodies) {
                    let read: Yardstick = serde_json::from_slice(body).expect("the bodies are JSON");
                    black_box((read.model, read.stream));
                }
            });
        });
        group.finish();
    }
}

criterion_group!(benches, scan);
criterion_main!(benches);
