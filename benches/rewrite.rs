//! How fast bodies and answers are edited: `cargo bench --bench rewrite` (or with `--profile quick`).
//!
//! The bodies are distinct: a bench that repeats one body trains the branch predictor. What simd-json needs
//! to parse the same bodies, the copy included that it writes into, stands beside, as it was one of the two
//! ways to do it; it tells values and not where they stand, so the splicing would come on top. Reading into
//! a tree with serde_json, changing that and writing it again is the yardstick.
//!
//! GB/s on a core of an AMD EPYC that others used as well, profile quick. "Usual" and "everything" are those
//! of results/routes.md; simd-json and serde_json are the best of 60 rounds of an earlier run. "Names" is a
//! new name alone; "usual" also sets, adds and removes fields and changes a role; "after a peek" is a new
//! name where the peek's scanner has read the body before, and the scanner of the edited body is made as
//! well.
//!
//! | a body of | names | usual | everything | names, after a peek | simd-json | serde_json |
//! | --- | --- | --- | --- | --- | --- | --- |
//! | 1.6 KB | 2.0 | 1.4 | 1.3 | 1.9 | 1.9 | 0.4 |
//! | 17 KB | 7.4 | 4.1 | 3.5 | 16 | 3.4 | 0.8 |
//! | 100 KB | 8.5 | 5.5 | 4.7 | 30 | 3.9 | 0.9 |
//! | 400 KB | 8.8 | 5.7 | 4.8 | 31 | 4.0 | 0.9 |
//!
//! So the spans are found by a scanner of our own. A chunk of a stream takes 0.4 us for its name, and 0.8
//! us for everything. Of answers that are no streams, in a noisier run and with a new name alone: 2 GB/s of
//! a chat, 0.5 with its log-probabilities, 5 of an embedding.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use http::HeaderMap;
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;
use vllm_lb::config::check::check;
use vllm_lb::prompt::scan::Scanner;
use vllm_lb::route::answer::{AnswerContext, AnswerEditor};
use vllm_lb::route::dialect::BodyDialect;
use vllm_lb::route::rewrite::AddedAnswerFields;
use vllm_lb::route::virtual_models::RouteTable;

/// The balancer's, as the small bodies spend a part of their time in it.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// So many bytes of bodies for every measurement.
const BYTES: usize = 6 << 20;

/// CPU time of this thread, so that a machine that others use as well tells nearly the same.
struct CpuTime;

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
    }

    fn end(&self, start: Duration) -> Duration {
        self.start().saturating_sub(start)
    }

    fn add(&self, one: &Duration, other: &Duration) -> Duration {
        *one + *other
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, time: &Duration) -> f64 {
        WallTime.to_f64(time)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

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

/// A conversation of random words, with an escape in every fortieth gap.
fn chat(random: &mut Random, bytes: usize) -> Vec<u8> {
    let mut messages = String::from("{\"role\":\"developer\",\"content\":\"be good\"}");
    let mut turn = 0;
    while messages.len() < bytes {
        turn += 1;
        let role = if turn % 2 == 0 { "assistant" } else { "user" };
        messages.push_str(&format!(",{{\"role\":\"{role}\",\"content\":\""));
        for _ in 0..20 + random.below(bytes.min(4000) as u64 / 10) {
            for _ in 0..1 + random.below(9) {
                messages.push(char::from(b'a' + random.below(26) as u8));
            }
            messages.push_str(if random.below(40) == 0 { "\\n" } else { " " });
        }
        messages.push_str("\"}");
    }
    format!("{{\"messages\":[{messages}],\"stream\":true,\"temperature\":0.7,\"model\":\"fast\"}}")
        .into_bytes()
}

fn table(route: &str) -> RouteTable {
    let text = format!("upstreams: [http://a]\nroutes: [{route}]\n");
    RouteTable::new(&check(&text, &|_| None).expect("is valid").routes)
}

const NAMES: &str = "{model: fast, to: openai/gpt-oss-20b}";
const USUAL: &str = "{model: fast, to: openai/gpt-oss-20b, body: {defaults: {top_p: 0.9, max_tokens: 9}, \
                     overrides: {chat_template_kwargs: {enable_thinking: false}}, remove: [temperature], \
                     roles: {developer: system}}}";
const ALL: &str = "{model: fast, to: openai/gpt-oss-20b, think_tags: true, token_ids: true, \
                   body: {defaults: {max_tokens: 9}, overrides: {seed: 1}, roles: {developer: system}}}";

fn requests(criterion: &mut Criterion<CpuTime>) {
    let mut random = Random(88_172_645_463_325_252);
    for kilobytes in [1.6, 17.0, 100.0, 400.0] {
        let size = (kilobytes * 1000.0) as usize;
        let bodies: Vec<Vec<u8>> = (0..BYTES / size).map(|_| chat(&mut random, size)).collect();
        let mut group = criterion.benchmark_group(format!("{kilobytes} KB"));
        group.throughput(Throughput::Bytes(bodies.iter().map(Vec::len).sum::<usize>() as u64));
        group.measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_secs(1)).sample_size(20);
        for (name, route) in [("names", NAMES), ("usual", USUAL), ("everything", ALL)] {
            let plan = table(route).plan(Some("fast"), "/", &HeaderMap::new()).expect("matches");
            let edits = plan.edits(BodyDialect::Chat);
            group.bench_function(name, |bench| {
                bench.iter(|| {
                    for body in black_box(&bodies) {
                        drop(black_box(edits.edit(body)));
                    }
                });
            });
        }
        // As the proxy does it: what was peeked is known, and what was edited is read again.
        let plan = table(NAMES).plan(Some("fast"), "/", &HeaderMap::new()).expect("matches");
        let edits = plan.edits(BodyDialect::Chat);
        let read = |body: &Vec<u8>| {
            let mut scanner = Scanner::new();
            scanner.scan(body);
            scanner
        };
        let scanners: Vec<Scanner> = bodies.iter().map(read).collect();
        group.bench_function("names, after a peek", |bench| {
            bench.iter(|| {
                for (body, scanner) in black_box(&bodies).iter().zip(&scanners) {
                    let edited = edits.edit_known(body, &|at| scanner.end_of(at)).expect("is small");
                    let edited = edited.body.expect("has another name");
                    black_box(scanner.of_edited(body, &edited));
                }
            });
        });
        group.bench_function("the same, read twice more", |bench| {
            bench.iter(|| {
                for body in black_box(&bodies) {
                    let edited = edits.edit(body).expect("is small").body.expect("has another name");
                    black_box(read(&edited));
                }
            });
        });
        group.bench_function("simd-json, parsing alone", |bench| {
            bench.iter(|| {
                for body in black_box(&bodies) {
                    let mut copy = body.clone();
                    let nodes = simd_json::to_tape(&mut copy).expect("the bodies are JSON").0.len();
                    black_box(nodes);
                }
            });
        });
        group.bench_function("serde_json, there and back", |bench| {
            bench.iter(|| {
                for body in black_box(&bodies) {
                    let mut value: Value = serde_json::from_slice(body).expect("the bodies are JSON");
                    value["model"] = "openai/gpt-oss-20b".into();
                    black_box(value.to_string());
                }
            });
        });
        group.finish();
    }
}

fn streams(criterion: &mut Criterion<CpuTime>) {
    let chunk = |text: usize| {
        format!(
            "data: {{\"id\":\"chatcmpl-955534d1733abee8\",\"object\":\"chat.completion.chunk\",\
             \"created\":1795154964,\"model\":\"openai/gpt-oss-20b\",\"choices\":[{{\"index\":0,\
             \"delta\":{{\"content\":\" w{text}\"}},\"logprobs\":null,\"finish_reason\":null,\
             \"token_ids\":null}}]}}\n\n"
        )
    };
    let chunks: Vec<String> = (0..4096).map(chunk).collect();
    let mut group = criterion.benchmark_group("stream");
    group.throughput(Throughput::Elements(chunks.len() as u64));
    group.measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_secs(1)).sample_size(20);
    for (name, route) in [("names", NAMES), ("everything", ALL)] {
        let plan = table(route).plan(Some("fast"), "/", &HeaderMap::new()).expect("matches");
        let asker = AnswerContext {
            dialect: BodyDialect::Chat,
            model: Some("fast"),
            added_fields: AddedAnswerFields::default(),
        };
        group.bench_function(name, |bench| {
            bench.iter(|| {
                let mut answer =
                    AnswerEditor::new(&plan, asker, 200, Some("text/event-stream")).expect("is edited");
                for chunk in black_box(&chunks) {
                    black_box(answer.feed(chunk.as_bytes(), false));
                }
            });
        });
    }
    group.finish();
}

/// A chat of so many words, with a log-probability for each where they are asked for.
fn chat_answer(random: &mut Random, words: usize, told: bool) -> String {
    let words: Vec<String> = (0..words).map(|_| format!("w{}", random.below(100_000))).collect();
    let told = match told {
        true => {
            let one =
                |word: &String| format!("{{\"token\":\" {word}\",\"logprob\":-0.25,\"bytes\":[32,119]}}");
            format!("{{\"content\":[{}]}}", words.iter().map(one).collect::<Vec<_>>().join(","))
        }
        false => "null".into(),
    };
    format!(
        "{{\"id\":\"chatcmpl-955534d1733abee8\",\"object\":\"chat.completion\",\"created\":1795154964,\
         \"model\":\"openai/gpt-oss-20b\",\"choices\":[{{\"index\":0,\"message\":{{\"role\":\"assistant\",\
         \"content\":\"{}\"}},\"logprobs\":{told},\"finish_reason\":\"stop\"}}],\"usage\":\
         {{\"prompt_tokens\":31,\"total_tokens\":43,\"completion_tokens\":12}}}}",
        words.join(" ")
    )
}

fn embedding(random: &mut Random, numbers: usize) -> String {
    let numbers: Vec<String> = (0..numbers).map(|_| format!("-0.0{}", random.below(1_000_000_000))).collect();
    format!(
        "{{\"id\":\"embd-9\",\"object\":\"list\",\"created\":1795154964,\"model\":\"openai/gpt-oss-20b\",\
         \"data\":[{{\"index\":0,\"object\":\"embedding\",\"embedding\":[{}]}}]}}",
        numbers.join(",")
    )
}

fn answers(criterion: &mut Criterion<CpuTime>) {
    let mut random = Random(88_172_645_463_325_252);
    let mut many = |one: &dyn Fn(&mut Random) -> String| -> Vec<String> {
        let mut all = Vec::new();
        while all.iter().map(String::len).sum::<usize>() < BYTES {
            all.push(one(&mut random));
        }
        all
    };
    let kinds = [
        ("a chat", many(&|random| chat_answer(random, 300, false))),
        ("a chat with log-probabilities", many(&|random| chat_answer(random, 300, true))),
        ("an embedding", many(&|random| embedding(random, 4096))),
    ];
    let mut group = criterion.benchmark_group("answer");
    group.measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_secs(1)).sample_size(20);
    for (kind, answers) in &kinds {
        group.throughput(Throughput::Bytes(answers.iter().map(String::len).sum::<usize>() as u64));
        for (name, route) in [("names", NAMES), ("everything", ALL)] {
            let plan = table(route).plan(Some("fast"), "/", &HeaderMap::new()).expect("matches");
            let asker = AnswerContext {
                dialect: BodyDialect::Chat,
                model: Some("fast"),
                added_fields: AddedAnswerFields::default(),
            };
            group.bench_function(format!("{kind}, {name}"), |bench| {
                bench.iter(|| {
                    for text in black_box(answers) {
                        let answer = AnswerEditor::new(&plan, asker, 200, Some("application/json"));
                        black_box(answer.expect("is edited").feed(text.as_bytes(), true));
                    }
                });
            });
        }
        group.bench_function(format!("{kind}, a tree by serde_json"), |bench| {
            bench.iter(|| {
                for text in black_box(answers) {
                    black_box(serde_json::from_slice::<Value>(text.as_bytes()).expect("is JSON"));
                }
            });
        });
        group.bench_function(format!("{kind}, the same tree by simd-json"), |bench| {
            bench.iter(|| {
                for text in black_box(answers) {
                    let mut copy = text.clone().into_bytes();
                    black_box(simd_json::serde::from_slice::<Value>(&mut copy).expect("is JSON"));
                }
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = requests, streams, answers
}
criterion_main!(benches);
