//! Turns that continue from recorded token ids (`traces.cumulative`), through the balancer over engines.

use std::sync::Arc;

use crate::common::wire::{Wire, post};
use crate::common::{Balancer, EngineServer, Options, config, direct, engine, upstreams};
use serde_json::{Value, json};
use vllm_lb::config::types::{CaptureScope, TraceStore};
use vllm_lb::traces::record::{TraceApi, TraceRecord};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const TOKENIZE: &str = "/tokenize";

/// One turn as its client sees it.
struct Turn {
    prompt: Vec<u32>,
    ids: Vec<u32>,
    message: Value,
}

async fn cumulative(engines: &[EngineServer]) -> Balancer {
    let mut config = config(upstreams(engines));
    config.traces.cumulative = true;
    Balancer::ready(config).await
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn body(messages: &[Value]) -> Value {
    json!({"model": "sim", "messages": messages, "return_token_ids": true})
}

fn events(text: &str) -> Vec<Value> {
    let data = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    data.map(|data| serde_json::from_str(data).expect("JSON")).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().into_iter().flatten().filter_map(|id| id.as_u64()?.try_into().ok()).collect()
}

/// Sends a turn of a session, and reads its answer.
async fn turn(client: &mut Wire, session: &str, mut body: Value, stream: bool) -> Turn {
    body["stream"] = json!(stream);
    let answer = client.ask(post(&format!("/sessions/{session}{CHAT}"), body.to_string())).await.expect(200);
    if !stream {
        let answer = answer.json();
        let choice = &answer["choices"][0];
        let prompt = ids(&answer["prompt_token_ids"]);
        return Turn { prompt, ids: ids(&choice["token_ids"]), message: choice["message"].clone() };
    }
    let text = answer.text().to_string();
    assert!(answer.whole && text.ends_with("data: [DONE]\n\n"), "{text}");
    let events = events(&text);
    let choices = || events.iter().filter_map(|event| event["choices"].get(0));
    let content: String = choices().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    Turn {
        prompt: ids(&events[0]["prompt_token_ids"]),
        ids: choices().flat_map(|choice| ids(&choice["token_ids"])).collect(),
        message: json!({"role": "assistant", "content": content}),
    }
}

async fn records(balancer: &Balancer, session: &str) -> Vec<Arc<TraceRecord>> {
    balancer.running.traces.flush().await;
    let store = balancer.running.traces.store().expect("a store");
    let traces = store.traces(session, None, None).await.expect("traces");
    traces.into_iter().map(|trace| trace.record).collect()
}

async fn ways(balancer: &Balancer, session: &str) -> Vec<String> {
    let records = records(balancer, session).await;
    records.iter().filter_map(|record| record.facts.cumulative.clone()).collect()
}

/// The paths of a kind that the engine was asked for.
fn count(engine: &EngineServer, path: &str) -> usize {
    engine.requests().iter().filter(|request| request.path == path).count()
}

/// What the engine makes of a chat.
async fn tokenized(engine: &EngineServer, messages: &[Value]) -> Vec<u32> {
    let body = json!({"model": "sim", "messages": messages});
    let answer = Wire::connect(&direct(engine)).await.ask(post(TOKENIZE, body.to_string())).await;
    ids(&answer.expect(200).json()["tokens"])
}

#[tokio::test(flavor = "multi_thread")]
async fn each_turn_continues_from_the_tokens_of_the_turn_before() {
    for (end_token, split_words) in [(false, false), (true, false), (true, true)] {
        let engines = [engine(Options { end_token, split_words, ..Options::default() }).await];
        let balancer = cumulative(&engines).await;
        let mut client = balancer.client().await;
        for (session, streams) in [("whole", [false; 5]), ("mixed", [true, true, false, true, true])] {
            let (before, mut messages) = (engines[0].requests().len(), vec![user("how are you")]);
            let mut last: Option<Turn> = None;
            for (number, stream) in streams.into_iter().enumerate() {
                let turn = turn(&mut client, session, body(&messages), stream).await;
                let again = tokenized(&engines[0], &messages).await;
                if let Some(last) = &last {
                    let history = [&last.prompt[..], &last.ids].concat();
                    assert_eq!(turn.prompt[..history.len()], history, "{session} {number}");
                    assert!(turn.prompt.len() > history.len() + 4);
                }
                assert_eq!(
                    turn.prompt == again,
                    number == 0 || !split_words,
                    "text is tokenised in another way"
                );
                messages.push(turn.message.clone());
                messages.push(user(&format!("question {number}")));
                last = Some(turn);
            }
            let sent: Vec<String> =
                engines[0].requests()[before..].iter().map(|request| request.path.clone()).collect();
            let sent: Vec<&str> = sent.iter().map(String::as_str).filter(|path| *path != TOKENIZE).collect();
            assert_eq!(sent, [CHAT, COMPLETIONS, COMPLETIONS, COMPLETIONS, COMPLETIONS]);
            assert_eq!(
                ways(&balancer, session).await,
                ["first", "continued", "continued", "continued", "continued"]
            );
            let records = records(&balancer, session).await;
            let record = records.last().expect("a record");
            let last = last.expect("a turn");
            assert_eq!((record.facts.api, record.turns.len()), (TraceApi::Chat, 9));
            assert_eq!(record.prompt_token_ids, last.prompt);
            let choice = &record.choices[0];
            assert_eq!((&choice.token_ids, choice.logprobs.len()), (&last.ids, last.ids.len()));
            let message: Value = serde_json::from_str(&choice.message).expect("JSON");
            assert_eq!(message["content"], last.message["content"]);
        }
        assert!(balancer.metric("vllm_lb_cumulative_turns_total").await >= 10.0);
    }
}

/// The answer without what differs between two requests.
fn alike(mut value: Value) -> Value {
    if let Some(fields) = value.as_object_mut() {
        let prefix =
            fields["id"].as_str().and_then(|id| id.split_once('-')).map(|(prefix, _)| prefix.to_string());
        fields.insert("id".into(), json!(prefix));
        fields.insert("created".into(), Value::Null);
        if let Some(usage) = fields.get_mut("usage").and_then(Value::as_object_mut) {
            usage.retain(|key, _| !key.ends_with("_details"));
        }
    }
    value
}

#[tokio::test(flavor = "multi_thread")]
async fn a_continued_turn_is_answered_as_the_engine_answers_a_chat() {
    let engines = [engine(Options::default()).await];
    let balancer = cumulative(&engines).await;
    let (mut client, mut chat) = (balancer.client().await, Wire::connect(&direct(&engines[0])).await);
    let usage = json!({"stream": true, "stream_options": {"include_usage": true}});
    let running =
        json!({"stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let wishes = [
        json!({}),
        json!({"max_tokens": 5}),
        json!({"max_completion_tokens": 3, "logprobs": true}),
        json!({"return_token_ids": true, "logprobs": true, "top_logprobs": 0}),
        json!({"stream": true}),
        json!({"stream": true, "logprobs": true, "return_token_ids": true}),
        usage,
        running,
    ];
    for (number, wish) in wishes.iter().enumerate() {
        let session = format!("alike-{number}");
        let path = format!("/sessions/{session}{CHAT}");
        let first = turn(&mut client, &session, body(&[user("hi")]), false).await;
        let mut next = json!({"model": "sim", "messages": [user("hi"), first.message, user("and")]});
        for (key, value) in wish.as_object().expect("an object") {
            next[key] = value.clone();
        }
        let answer = client.ask(post(&path, next.to_string())).await.expect(200);
        let wanted = chat.ask(post(CHAT, next.to_string())).await.expect(200);
        assert_eq!(ways(&balancer, &session).await, ["first", "continued"]);
        assert_eq!(answer.header("content-type"), wanted.header("content-type"));
        if wish.get("stream").is_none() {
            assert_eq!(alike(answer.json()).to_string(), alike(wanted.json()).to_string(), "{wish}");
            continue;
        }
        let (told, wanted) = (events(answer.text()), events(wanted.text()));
        assert_eq!(told.len(), wanted.len(), "{wish}");
        for (told, wanted) in told.into_iter().zip(wanted) {
            assert_eq!(alike(told), alike(wanted), "{wish}");
        }
        assert!(answer.text().ends_with("data: [DONE]\n\n"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_cannot_continue_is_sent_as_chat() {
    let engines = [engine(Options::default()).await];
    let balancer = cumulative(&engines).await;
    let mut client = balancer.client().await;
    let schema = json!({"type": "object", "properties": {}});
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": schema}});
    let cases = [
        ("history", json!({"messages": [user("ha"), {"role": "assistant", "content": "x"}, user("and")]})),
        ("tools", json!({"tools": [tool], "tool_choice": "none"})),
        ("choices", json!({"n": 2})),
        ("structured", json!({"response_format": {"type": "json_object"}})),
        ("logprobs", json!({"logprobs": true, "top_logprobs": 2})),
        ("settings", json!({"chat_template_kwargs": {"enable_thinking": true}})),
    ];
    for (reason, change) in cases {
        let first = turn(&mut client, reason, body(&[user("hi")]), false).await;
        let mut next = body(&[user("hi"), first.message, user("and")]);
        for (key, value) in change.as_object().expect("an object") {
            next[key] = value.clone();
        }
        turn(&mut client, reason, next, false).await;
        let way = ways(&balancer, reason).await.pop().expect("a second turn");
        let wanted = if reason == "tools" { "settings" } else { reason };
        assert_eq!(way, format!("fallback: {wanted}"));
    }
    // The history that was changed is the one that the next turn continues.
    let messages = [user("ha"), json!({"role": "assistant", "content": "x"}), user("and")];
    let second = records(&balancer, "history").await.pop().expect("a record");
    let said: Value = serde_json::from_str(&second.choices[0].message).expect("JSON");
    let next = body(&[&messages[..], &[said, user("so")]].concat());
    let third = turn(&mut client, "history", next, true).await;
    let history = [&second.prompt_token_ids[..], &second.choices[0].token_ids].concat();
    assert_eq!(third.prompt[..history.len()], history);
    assert_eq!(count(&engines[0], COMPLETIONS), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_without_the_routes_gets_the_chat() {
    for (tokenize, completions, way) in
        [(false, true, "fallback: tokenizer"), (true, false, "fallback: refused")]
    {
        let engines = [engine(Options { tokenize, completions, ..Options::default() }).await];
        let balancer = cumulative(&engines).await;
        let mut client = balancer.client().await;
        for stream in [false, true] {
            let session = format!("stream-{stream}");
            let first = turn(&mut client, &session, body(&[user("hi")]), stream).await;
            let messages = [user("hi"), first.message, user("and")];
            let second = turn(&mut client, &session, body(&messages), stream).await;
            assert!(!second.ids.is_empty());
            assert_eq!(ways(&balancer, &session).await, ["first", way]);
        }
        assert_eq!(count(&engines[0], CHAT), 4);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_tokenize_call_without_the_mode_a_session_or_after_its_end() {
    let engines = [engine(Options::default()).await];
    for is_cumulative in [false, true] {
        let mut config = config(upstreams(&engines));
        (config.traces.cumulative, config.traces.capture) = (is_cumulative, CaptureScope::All);
        let balancer = Balancer::ready(config).await;
        let mut client = balancer.client().await;
        let first = turn(&mut client, "s", body(&[user("hi")]), false).await;
        let next = body(&[user("hi"), first.message, user("and")]);
        if is_cumulative {
            balancer.running.traces.delete_sessions(&["s".into()]).await.expect("deleted");
        }
        turn(&mut client, "s", next.clone(), false).await;
        client.ask(post(CHAT, next.to_string())).await.expect(200);
        let wanted: &[&str] = if is_cumulative { &["first"] } else { &[] };
        assert_eq!(ways(&balancer, "s").await, wanted);
        assert_eq!(ways(&balancer, "unnamed").await, [""; 0]);
    }
    assert_eq!((count(&engines[0], TOKENIZE), count(&engines[0], COMPLETIONS)), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_continues_after_a_restart_of_the_balancer() {
    let engines = [engine(Options { end_token: true, split_words: true, ..Options::default() }).await];
    let folder = tempfile::tempdir().expect("a directory can be made");
    let mut messages = vec![user("hi")];
    let mut history = Vec::new();
    for wanted in [&["first"][..], &["first", "continued"]] {
        let mut config = config(upstreams(&engines));
        config.traces.cumulative = true;
        config.traces.store = TraceStore::Sqlite(Some(folder.path().join("traces.db")));
        let balancer = Balancer::ready(config).await;
        let turn = turn(&mut balancer.client().await, "s", body(&messages), true).await;
        assert_eq!(turn.prompt[..history.len()], history);
        assert_eq!(ways(&balancer, "s").await, wanted);
        history = [&turn.prompt[..], &turn.ids].concat();
        messages.extend([turn.message, user("and")]);
        balancer.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_failed_is_not_continued_and_the_one_before_it_is() {
    let engines = [engine(Options { split_words: true, ..Options::default() }).await];
    let balancer = cumulative(&engines).await;
    let mut client = balancer.client().await;
    let first = turn(&mut client, "s", body(&[user("hi")]), false).await;
    let messages = [user("hi"), first.message.clone(), user("and")];
    let mut wrong = body(&messages);
    wrong["temperature"] = json!(-1);
    let path = format!("/sessions/s{CHAT}");
    let refused = client.ask(post(&path, wrong.to_string())).await.expect(400);
    assert_eq!(refused.json()["error"]["param"], "temperature");
    let second = turn(&mut client, "s", body(&messages), true).await;
    let history = [&first.prompt[..], &first.ids].concat();
    assert_eq!(second.prompt[..history.len()], history);
    assert_eq!(ways(&balancer, "s").await, ["first", "fallback: refused", "continued"]);
}
