//! Conversations stay where their cache is, whatever they have in common with others and however they ask,
//! and engines share them evenly.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::{CHAT, MESSAGES, RESPONSES, chat_of, fast, telling, who, words};
use crate::common::wire::{Answer, Wire, post};
use crate::common::{EngineServer, Timing, config, eventually, upstreams};

const TURNS: usize = 10;

/// A conversation as its client knows it.
struct Talk {
    system: String,
    messages: Vec<Value>,
    number: u64,
}

impl Talk {
    fn new(system: &str, number: u64) -> Self {
        Talk { system: system.to_string(), messages: Vec::new(), number }
    }

    fn says(&mut self, tokens: usize) {
        let text = words(1_000 * self.number + self.messages.len() as u64, tokens);
        self.messages.push(json!({"role": "user", "content": text}));
    }

    /// The request of its present turn.
    fn body(&self, path: &str) -> Value {
        let system = json!({"role": "system", "content": self.system});
        match path {
            RESPONSES => json!({
                "model": "sim", "instructions": self.system, "input": self.messages,
                "max_output_tokens": 40, "store": false,
            }),
            MESSAGES => json!({
                "model": "sim", "system": self.system, "messages": self.messages, "max_tokens": 40,
            }),
            _ => {
                let mut messages = vec![system];
                messages.extend(self.messages.clone());
                json!({"model": "sim", "messages": messages, "max_tokens": 40})
            }
        }
    }

    fn hears(&mut self, path: &str, answer: &Answer) {
        let answer = answer.json();
        let text = match path {
            RESPONSES => &answer["output"][0]["content"][0]["text"],
            MESSAGES => &answer["content"][0]["text"],
            _ => &answer["choices"][0]["message"]["content"],
        };
        assert!(text.is_string(), "{answer}");
        self.messages.push(json!({"role": "assistant", "content": text}));
    }
}

/// Prompt tokens that an answer counts, and those that came from the engine's cache.
fn usage(path: &str, answer: &Answer) -> (u64, u64) {
    let usage = &answer.json()["usage"];
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    match path {
        RESPONSES => {
            (number(&usage["input_tokens"]), number(&usage["input_tokens_details"]["cached_tokens"]))
        }
        MESSAGES => {
            let cached = number(&usage["cache_read_input_tokens"]);
            (number(&usage["input_tokens"]), cached)
        }
        _ => (number(&usage["prompt_tokens"]), number(&usage["prompt_tokens_details"]["cached_tokens"])),
    }
}

fn cached_by(engines: &[EngineServer]) -> u64 {
    engines.iter().map(|engine| engine.stats().prefix_hits).sum()
}

/// What each has of its own from its first turn on is more than two others' turns: it is never right to move,
/// however slowly the machine lets the turns before it through.
#[tokio::test(flavor = "multi_thread")]
async fn ten_conversations_with_one_system_prompt_stay_and_use_four_engines_evenly() {
    let engines = fast(4, 10.0).await;
    let balancer = telling(config(upstreams(&engines))).await;
    let names: Vec<String> = engines.iter().map(super::direct).collect();
    let system = words(0, 2_000);
    let begun = Arc::new(Barrier::new(10));
    let mut talks = JoinSet::new();
    for number in 1..=10 {
        let (mut talk, address) = (Talk::new(&system, number), balancer.address().to_string());
        let begun = begun.clone();
        talks.spawn(async move {
            let mut client = Wire::connect(&address).await;
            let (mut places, mut again) = (Vec::new(), 0);
            let mut before = 0;
            for turn in 0..TURNS {
                // People read before they go on.
                sleep(Duration::from_millis(if turn > 0 { 40 + 7 * number } else { 0 })).await;
                talk.says(if turn > 0 { 1_500 } else { 4_000 });
                let answer = client.ask(post(CHAT, talk.body(CHAT).to_string())).await.expect(200);
                talk.hears(CHAT, &answer);
                again += before;
                before = usage(CHAT, &answer).0;
                places.push(answer.header("x-vllm-lb-upstream").to_string());
                if turn == 0 {
                    begun.wait().await;
                }
            }
            (places, again)
        });
    }
    let (mut moves, mut again, mut shares) = (0, 0, [0usize; 4]);
    while let Some(done) = talks.join_next().await {
        let (places, tokens): (Vec<String>, u64) = done.expect("clients do not panic");
        moves += places.windows(2).filter(|pair| pair[0] != pair[1]).count();
        again += tokens;
        for place in &places {
            shares[names.iter().position(|name| name == place).expect("it is one of them")] += 1;
        }
    }
    let cached = cached_by(&engines);
    println!("moves {moves} of 90, requests {shares:?}, {cached} of {again} tokens again from caches");
    assert!(moves <= 4, "{moves} moves, {shares:?}");
    assert!(cached as f64 >= 0.95 * again as f64, "{cached} of {again} were cached");
    assert!(shares.iter().all(|share| (15..=40).contains(share)), "{shares:?}");
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_keeps_its_cache_across_interfaces() {
    let engines = fast(4, 50.0).await;
    let balancer = telling(config(upstreams(&engines))).await;
    let mut talk = Talk::new(&words(7, 2_000), 3);
    let (mut places, mut before) = (Vec::new(), 0);
    for turn in 0..9 {
        let path = [CHAT, RESPONSES, MESSAGES][turn / 3];
        talk.says(200);
        let answer = balancer.ask(post(path, talk.body(path).to_string())).await.expect(200);
        talk.hears(path, &answer);
        places.push(who(&engines, &answer));
        let queried: u64 = engines.iter().map(|engine| engine.stats().prefix_queries).sum();
        let missed = queried - cached_by(&engines);
        // What was asked before is there but for a piece of a block.
        let fresh = missed - before;
        assert!(turn == 0 || fresh <= 200 + 40 + 64, "turn {turn} to {path}: {fresh} tokens anew");
        before = missed;
    }
    assert!(places.iter().all(|place| *place == places[0]), "{places:?}");
}

/// One prompt of 10,000 tokens for all, one of 16 engines warm, a hundred new conversations, three a second
/// of the engines' time.
#[tokio::test(flavor = "multi_thread")]
async fn a_shared_system_prompt_attracts_no_conversations() {
    const SPEED: f64 = 5.0;
    let engines = fast(16, SPEED).await;
    let balancer = telling(config(upstreams(&engines))).await;
    let system = words(5, 10_000);
    let body = |number: u64| {
        json!({
            "model": "sim", "max_tokens": 300, "stream": true,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": words(100 + number, 500)},
            ],
        })
        .to_string()
    };
    let warm = who(&engines, &balancer.ask(post(CHAT, body(0))).await.expect(200));
    let begun = Instant::now();
    let mut talks = JoinSet::new();
    for number in 1..=100u32 {
        let (text, address) = (body(u64::from(number)), balancer.address().to_string());
        sleep_until(begun + Duration::from_secs_f64(f64::from(number) / 3.0 / SPEED)).await;
        talks.spawn(async move { Wire::connect(&address).await.ask(post(CHAT, text)).await.expect(200) });
    }
    let mut shares = vec![0usize; 16];
    while let Some(done) = talks.join_next().await {
        shares[who(&engines, &done.expect("clients do not panic"))] += 1;
    }
    println!("{shares:?}, warm was {warm}");
    assert_eq!(shares.iter().sum::<usize>(), 100);
    let most = shares.iter().max().copied().unwrap_or(0);
    assert!(most <= 12, "twice an even share is 12: {shares:?}, warm was {warm}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_prompt_to_another_model_or_with_another_salt_shares_nothing() {
    let engines = [crate::common::engine(super::Options {
        loras: crate::common::names(&["adapter"]),
        timing: Timing::instant(),
        ..super::Options::default()
    })
    .await];
    let balancer = telling(config(upstreams(&engines))).await;
    let text = words(9, 1_000);
    let mut asked = Vec::new();
    for (model, salt) in [("sim", None), ("adapter", None), ("sim", Some("a")), ("sim", Some("b"))] {
        let mut body = chat_of(&text);
        body["model"] = model.into();
        if let Some(salt) = salt {
            body["cache_salt"] = salt.into();
        }
        asked.push(body);
    }
    let (mut before, mut added) = (super::known(&balancer).await.0, Vec::new());
    for body in asked.iter().chain(&asked) {
        let hits = cached_by(&engines);
        super::ask(&balancer, &engines, body).await;
        let blocks = super::known(&balancer).await.0;
        added.push((blocks - before, cached_by(&engines) > hits));
        before = blocks;
    }
    let (fresh, again) = added.split_at(4);
    assert!(fresh.iter().all(|(blocks, cached)| (7..=9).contains(blocks) && !cached), "{added:?}");
    assert!(again.iter().all(|(blocks, cached)| *blocks == 0 && *cached), "{added:?}");
    eventually("the metrics say as much", async || {
        (balancer.metric("vllm_lb_index_blocks").await == before as f64).then_some(())
    })
    .await;
}
