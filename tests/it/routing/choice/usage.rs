//! What answers count corrects what was estimated, and shows how true it was.

use serde_json::{Value, json};

use super::{CHAT, COMPLETIONS, chat_of, pending, row, telling, words};
use crate::common::wire::{Answer, post};
use crate::common::{
    EngineServer, InjectedFault, Options, Timing, config, engine, engines, eventually, upstreams,
};

/// A text of tokens of two bytes.
fn short_words(seed: u64, tokens: usize) -> String {
    words(seed, tokens).as_bytes().chunks(4).map(|word| format!(" {}", char::from(word[1]))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_length_of_a_token_is_learned_from_answers() {
    let engines = engines(1).await;
    let balancer = telling(config(upstreams(&engines))).await;
    let estimate = async |seed| {
        engines[0].set_fault(InjectedFault::StallHeaders).await;
        let mut body = chat_of(&short_words(seed, 10_000));
        body["stream"] = true.into();
        let client = pending(&balancer, CHAT, &body).await;
        let row = row(&balancer, &engines[0]).await;
        drop(client);
        engines[0].clear_fault().await;
        balancer.until_idle().await;
        (row["backlog_tokens"].as_u64().unwrap_or(0), row["context_tokens"].as_u64().unwrap_or(0))
    };
    let (backlog, context) = estimate(1).await;
    assert!((4_900..5_100).contains(&backlog) && backlog == context, "{backlog} of {context}");
    for seed in 10..20 {
        let body = chat_of(&short_words(seed, 10_000)).to_string();
        let answer = balancer.ask(post(CHAT, body)).await.expect(200).json();
        assert!(answer["usage"]["prompt_tokens"].as_u64() > Some(10_000));
    }
    let (backlog, context) = estimate(2).await;
    assert!((9_500..10_500).contains(&backlog) && backlog == context, "{backlog} of {context}");
}

/// What the engine read before, under `previous_response_id`, does not stand in the body that names it.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_outside_the_body_are_not_learned_from() {
    let engines = engines(1).await;
    let balancer = telling(config(upstreams(&engines))).await;
    let first = json!({"model": "sim", "input": words(1, 4_000), "max_output_tokens": 3});
    let mut id =
        balancer.ask(post(super::RESPONSES, first.to_string())).await.expect(200).json()["id"].take();
    for _ in 0..12 {
        let next = json!({
            "model": "sim", "input": "and?", "max_output_tokens": 3, "previous_response_id": id,
        });
        id = balancer.ask(post(super::RESPONSES, next.to_string())).await.expect(200).json()["id"].take();
    }
    engines[0].set_fault(InjectedFault::StallHeaders).await;
    let _client = pending(&balancer, CHAT, &chat_of(&words(2, 4_000))).await;
    let context = row(&balancer, &engines[0]).await["context_tokens"].as_u64().unwrap_or(0);
    assert!((3_900..4_200).contains(&context), "{context}");
}

/// Of a batch, the first prompt is the one that is looked up; the others are work all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_prompts_counts_as_a_whole() {
    let engines = engines(1).await;
    let balancer = telling(config(upstreams(&engines))).await;
    let batch: Vec<String> = (0..8).map(|number| words(100 + number, 1_000)).collect();
    let body = json!({"model": "sim", "prompt": batch, "max_tokens": 1});
    for _ in 0..8 {
        let answer = balancer.ask(post(COMPLETIONS, body.to_string())).await.expect(200).json();
        assert_eq!(answer["usage"]["prompt_tokens"], 8_000);
    }
    engines[0].set_fault(InjectedFault::StallHeaders).await;
    let context = async || row(&balancer, &engines[0]).await["context_tokens"].as_u64().unwrap_or(0);
    let all = pending(&balancer, COMPLETIONS, &body).await;
    assert!((7_900..8_200).contains(&context().await), "{}", context().await);
    drop(all);
    balancer.until_idle().await;
    let one = pending(&balancer, COMPLETIONS, &json!({"model": "sim", "prompt": batch[0]})).await;
    assert!((980..1_050).contains(&context().await), "{}", context().await);
    drop(one);
}

/// The text of an answer, and the cached tokens that it tells.
fn told(answer: &Answer) -> (Value, u64) {
    let answer = answer.json();
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    (answer["choices"][0]["message"]["content"].clone(), cached.expect("the engine tells"))
}

#[tokio::test(flavor = "multi_thread")]
async fn predicted_hits_match_reported_ones() {
    let engines = engines(2).await;
    let balancer = telling(config(upstreams(&engines))).await;
    let (mut messages, mut reported, mut prompts) = (Vec::new(), 0, 0);
    for turn in 0..12 {
        messages.push(json!({"role": "user", "content": words(turn, 500)}));
        let body = json!({"model": "sim", "messages": messages, "max_tokens": 50});
        let answer = balancer.ask(post(CHAT, body.to_string())).await.expect(200);
        let (text, cached) = told(&answer);
        reported += cached;
        prompts += answer.json()["usage"]["prompt_tokens"].as_u64().unwrap_or(0);
        messages.push(json!({"role": "assistant", "content": text}));
    }
    balancer.until_recorded().await;
    let hits: u64 = engines.iter().map(|engine| engine.stats().prefix_hits).sum();
    assert_eq!(reported, hits);
    assert_eq!(balancer.metric("vllm_lb_cache_reported_tokens_total").await, hits as f64);
    let predicted = balancer.metric("vllm_lb_cache_predicted_tokens_total").await;
    let off = (predicted - hits as f64).abs() / prompts as f64;
    println!("predicted {predicted}, reported {hits}, of {prompts}");
    assert!(off < 0.05, "predicted {predicted}, reported {hits}, of {prompts}");
    assert_eq!(balancer.metric("vllm_lb_cache_trimmed_total").await, 0.0);
}

/// An engine that says nothing of cached tokens proves nothing.
#[tokio::test(flavor = "multi_thread")]
async fn unreported_cached_tokens_are_not_counted() {
    let engines = [engine(Options { prompt_tokens_details: false, ..Options::default() }).await];
    let balancer = telling(config(upstreams(&engines))).await;
    for _ in 0..40 {
        let body = chat_of(&words(1, 3_000)).to_string();
        balancer.ask(post(CHAT, body)).await.expect(200);
    }
    balancer.until_recorded().await;
    for name in ["predicted_tokens", "reported_tokens", "trimmed"] {
        assert_eq!(balancer.metric(&format!("vllm_lb_cache_{name}_total")).await, 0.0, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_with_a_smaller_cache_than_believed_is_trimmed() {
    let options = Options { timing: Timing::instant(), cache_tokens: 9_600, ..Options::default() };
    let engines: [EngineServer; 1] = [engine(Options { max_model_len: 8_192, ..options }).await];
    let mut config = config(upstreams(&engines));
    config.health.metrics = false;
    let balancer = telling(config).await;
    for _ in 0..4 {
        for seed in 0..20 {
            let body = chat_of(&words(seed, 3_000)).to_string();
            balancer.ask(post(CHAT, body)).await.expect(200);
        }
    }
    eventually("it is trimmed", async || {
        (balancer.metric("vllm_lb_cache_trimmed_total").await >= 1.0).then_some(())
    })
    .await;
}

/// Older engines report no number in place of 0: each of these answers but one is a miss.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_reports_only_hits_is_compared_with_its_misses_as_well() {
    let options = Options { cache_tokens: 9_600, max_model_len: 8_192, ..Options::default() };
    let engines = [engine(Options { omits_cached_zero: true, ..options }).await];
    let mut config = config(upstreams(&engines));
    config.health.metrics = false;
    let balancer = telling(config).await;
    let ask = async |seed| {
        let body = chat_of(&words(seed, 3_000)).to_string();
        balancer.ask(post(CHAT, body)).await.expect(200).json()
    };
    ask(0).await;
    let hit = ask(0).await;
    assert!(hit["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(2_900), "{hit}");
    for round in 0..4 {
        for seed in 1..20 {
            let answer = ask(seed).await;
            assert_eq!(answer["usage"]["prompt_tokens_details"], Value::Null, "{round}");
        }
    }
    balancer.until_recorded().await;
    let predicted = balancer.metric("vllm_lb_cache_predicted_tokens_total").await;
    let reported = balancer.metric("vllm_lb_cache_reported_tokens_total").await;
    assert!(predicted > 10.0 * reported && reported > 2_900.0, "{predicted} and {reported}");
    assert!(balancer.metric("vllm_lb_cache_trimmed_total").await >= 1.0);
    let row = row(&balancer, &engines[0]).await;
    assert_eq!(row["sight"], "blind", "{row}");
}
