//! Where requests go by what upstreams are believed to hold: does it come true on the engines, is it given
//! up when it does not, and is nothing left of what never happened?
//!
//! Prompts are made of words of four bytes, each of them a token of the simulated engine, so that estimates
//! are right from the beginning and every figure can be foretold.

mod any_content;
mod burst;
mod conversations;
mod learning;
mod long_bodies;
mod prefill;
mod sessions;
mod usage;

use crate::common::dice::Dice;
use crate::common::wire::{Answer, JSON, Wire, post, request};
use crate::common::{Balancer, EngineServer, Options, Timing, direct};
use serde_json::{Value, json};
use vllm_lb::config::types::Config;

pub const CHAT: &str = "/v1/chat/completions";
pub const COMPLETIONS: &str = "/v1/completions";
pub const RESPONSES: &str = "/v1/responses";
pub const MESSAGES: &str = "/v1/messages";

/// Bytes of a block of the index.
pub const BLOCK: usize = 512;

/// So many words of a space and three letters: as many tokens, and four bytes for each. Another `seed` is
/// another text from the first word on.
pub fn words(seed: u64, tokens: usize) -> String {
    let mut dice = Dice::new(seed, 17);
    let mut text = String::with_capacity(4 * tokens);
    for _ in 0..tokens {
        text.push(' ');
        (0..3).for_each(|_| text.push(char::from(b'a' + dice.between(0, 25) as u8)));
    }
    text
}

/// A chat of one message.
pub fn chat_of(text: &str) -> Value {
    json!({"model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": 3})
}

/// A chat, and then its next turn.
pub fn next_turn(text: &str) -> Value {
    let mut body = chat_of(text);
    let messages = body["messages"].as_array_mut().expect("a chat has messages");
    messages.push(json!({"role": "assistant", "content": "well"}));
    messages.push(json!({"role": "user", "content": "and then?"}));
    body
}

/// Engines of the usual pace, so many times faster.
pub async fn fast(count: usize, speed: f64) -> Vec<EngineServer> {
    let mut engines = Vec::new();
    for seed in 0..count as u64 {
        let options = Options { seed, timing: Timing::faster(speed), ..Options::default() };
        engines.push(EngineServer::start(options).await.expect("a free port is there"));
    }
    engines
}

/// With the upstream told in each answer.
pub async fn telling(mut config: Config) -> Balancer {
    config.expose = true;
    Balancer::ready(config).await
}

/// Which engine an answer came from.
#[track_caller]
pub fn who(engines: &[EngineServer], answer: &Answer) -> usize {
    let name = answer.header("x-vllm-lb-upstream");
    let found = engines.iter().position(|engine| direct(engine) == name);
    found.unwrap_or_else(|| panic!("{name:?} is no upstream: {answer:?}"))
}

/// Asks, and tells which engine answered.
pub async fn ask(balancer: &Balancer, engines: &[EngineServer], body: &Value) -> usize {
    let answer = balancer.ask(post(CHAT, body.to_string())).await.expect(200);
    who(engines, &answer)
}

/// Changes an upstream over the admin API.
pub async fn change(balancer: &Balancer, engine: &EngineServer, body: Value) {
    let path = format!("/admin/upstreams/{}", direct(engine));
    balancer.admin(request("PATCH", &path, &[JSON], body.to_string().as_bytes())).await.expect(200);
}

/// Lets only one engine have requests, until `all` are let in again.
pub async fn only(balancer: &Balancer, engines: &[EngineServer], which: usize) {
    for (place, engine) in engines.iter().enumerate() {
        change(balancer, engine, json!({"drain": place != which})).await;
    }
    balancer.until_ready(1).await;
}

pub async fn all(balancer: &Balancer, engines: &[EngineServer]) {
    for engine in engines {
        change(balancer, engine, json!({"drain": false})).await;
    }
    balancer.until_ready(engines.len()).await;
}

/// Blocks that the index knows, and pairs of them with upstreams, when nothing is in flight.
pub async fn known(balancer: &Balancer) -> (usize, usize) {
    balancer.until_idle().await;
    let size = balancer.running.state.size();
    (size.blocks, size.pairs)
}

pub async fn row(balancer: &Balancer, engine: &EngineServer) -> Value {
    let path = format!("/admin/upstreams/{}", direct(engine));
    balancer.admin(crate::common::wire::get(&path)).await.expect(200).json()
}

/// The only request in flight, which its engine does not answer yet.
pub async fn pending(balancer: &Balancer, path: &str, body: &Value) -> Wire {
    balancer.until_idle().await;
    let mut client = balancer.client().await;
    client.send(post(path, body.to_string())).await;
    balancer.until_active(1).await;
    client
}
