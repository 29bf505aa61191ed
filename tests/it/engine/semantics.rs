//! What the answers say: the same for the same question, in the form that was asked for.

use serde_json::{Value, json};
use vllm_lb::engine::http::{EngineServer, Options};

use crate::client::{call, connect, instant, post};

const CHAT: &str = "/v1/chat/completions";

fn ask(text: &str) -> Value {
    json!({"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 12})
}

fn with(mut body: Value, extra: Value) -> Value {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// Text, reasoning, arguments of a call and finish reason of a stream's first choice.
fn gathered(events: &[(Option<String>, Value)]) -> (String, String, String, Value) {
    let mut all = (String::new(), String::new(), String::new(), Value::Null);
    for (_, data) in events {
        let choice = &data["choices"][0];
        let delta = &choice["delta"];
        all.0.push_str(delta["content"].as_str().unwrap_or_default());
        all.1.push_str(delta["reasoning"].as_str().unwrap_or_default());
        let arguments = &delta["tool_calls"][0]["function"]["arguments"];
        all.2.push_str(arguments.as_str().unwrap_or_default());
        if !choice["finish_reason"].is_null() {
            all.3 = choice["finish_reason"].clone();
        }
    }
    all
}

#[tokio::test]
async fn two_engines_answer_alike() {
    let one = EngineServer::start(instant()).await.unwrap();
    let two = EngineServer::start(Options { seed: 9, ..instant() }).await.unwrap();
    let text = |answer: Value| answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let direct = text(post(one.address(), CHAT, &ask("why")).await.json());
    assert_eq!(direct, text(post(two.address(), CHAT, &ask("why")).await.json()));
    assert_ne!(direct, text(post(one.address(), CHAT, &ask("how")).await.json()));
    let streamed = post(two.address(), CHAT, &with(ask("why"), json!({"stream": true}))).await;
    let (told, _, _, finish) = gathered(&streamed.events());
    assert_eq!((told, finish), (direct, json!("length")));
    // Role, a chunk a token, [DONE]: each event in a chunk of its own.
    assert_eq!(streamed.chunks.len(), 1 + 12 + 1);
    assert!(streamed.chunks.iter().all(|chunk| chunk.starts_with("data: ") && chunk.ends_with("\n\n")));
    assert!(streamed.chunks[12].contains("\"system_fingerprint\""), "without usage, it is on the last chunk");
}

#[tokio::test]
async fn a_cached_prefix_is_reported() {
    let engine = EngineServer::start(instant()).await.unwrap();
    let at = engine.address();
    let question = "a long question ".repeat(30);
    let first = post(at, CHAT, &ask(&question)).await.json();
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached(&first), 0);
    let prompt = first["usage"]["prompt_tokens"].as_u64().unwrap();
    let again = post(at, CHAT, &ask(&question)).await.json();
    assert_eq!(cached(&again), (prompt - 1) / 16 * 16);
    // The conversation goes on, in another API: question and answer are known.
    let body = json!({"model": "tiny", "max_tokens": 5, "messages": [
        {"role": "user", "content": question},
        {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "and then, what happened after that, and who was it"},
    ]});
    let answer = post(at, "/v1/messages", &body).await.json();
    let usage = &answer["usage"];
    assert_eq!(usage["cache_read_input_tokens"].as_u64().unwrap(), (prompt + 11) / 16 * 16, "{usage}");
    // With another salt, or the prompt's log probabilities, nothing is known.
    for extra in [json!({"cache_salt": "mine"}), json!({"prompt_logprobs": 1})] {
        assert_eq!(cached(&post(at, CHAT, &with(ask(&question), extra)).await.json()), 0);
    }
    let stats = engine.stats();
    assert!(stats.prefix_hits > 0 && stats.prefix_hits < stats.prefix_queries);
}

#[tokio::test]
async fn details_can_be_left_out() {
    let engine = EngineServer::start(Options { prompt_tokens_details: false, ..instant() }).await.unwrap();
    let answer = post(engine.address(), CHAT, &ask("a")).await.json();
    assert_eq!(answer["usage"]["prompt_tokens_details"], Value::Null);
}

#[tokio::test]
async fn choices_stops_and_lengths() {
    let engine = EngineServer::start(instant()).await.unwrap();
    let at = engine.address();
    let answer = post(at, CHAT, &with(ask("a"), json!({"n": 3}))).await.json();
    let texts: Vec<&Value> = (0..3).map(|index| &answer["choices"][index]["message"]["content"]).collect();
    assert!(texts[0] != texts[1] && texts[1] != texts[2]);
    assert_eq!(answer["usage"]["completion_tokens"], 36);
    let streamed = post(at, CHAT, &with(ask("a"), json!({"n": 3, "stream": true}))).await;
    assert_eq!(streamed.chunks.len(), 3 + 36 + 1);
    let stop = texts[0].as_str().unwrap().split(' ').nth(3).unwrap().to_owned();
    for stream in [false, true] {
        let body = with(ask("a"), json!({"stop": [" ".to_owned() + &stop], "stream": stream}));
        let answer = post(at, CHAT, &body).await;
        let (text, finish, reason) = if stream {
            let (text, _, _, finish) = gathered(&answer.events());
            let events = answer.events();
            let last = events.iter().rev().find(|(_, data)| data["choices"][0].is_object()).unwrap();
            (json!(text), finish, last.1["choices"][0]["stop_reason"].clone())
        } else {
            let choice = answer.json()["choices"][0].clone();
            (
                choice["message"]["content"].clone(),
                choice["finish_reason"].clone(),
                choice["stop_reason"].clone(),
            )
        };
        assert_eq!((finish, reason), (json!("stop"), json!(format!(" {stop}"))));
        assert!(texts[0].as_str().unwrap().starts_with(text.as_str().unwrap()));
    }
    let mut open = ask("a");
    open.as_object_mut().unwrap().remove("max_tokens");
    let answer = post(at, CHAT, &open).await.json();
    assert_eq!(
        (&answer["choices"][0]["finish_reason"], &answer["usage"]["completion_tokens"]),
        (&json!("stop"), &json!(16))
    );
}

#[tokio::test]
async fn tools_json_and_thoughts() {
    let engine = EngineServer::start(instant()).await.unwrap();
    let at = engine.address();
    let schema = json!({"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}});
    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": schema}}]);
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for (choice, finish) in [(json!("required"), "tool_calls"), (named, "stop")] {
        let body =
            json!({"messages": [{"role": "user", "content": "a"}], "tools": tools, "tool_choice": choice});
        let answer = post(at, CHAT, &body).await.json();
        let message = &answer["choices"][0];
        let call = &message["message"]["tool_calls"][0];
        assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("weather")));
        let arguments = call["function"]["arguments"].as_str().unwrap();
        assert!(serde_json::from_str::<Value>(arguments).unwrap()["city"].is_string());
        assert_eq!(message["finish_reason"], finish);
        let streamed = post(at, CHAT, &with(body, json!({"stream": true}))).await;
        let (_, _, told, end) = gathered(&streamed.events());
        assert_eq!((told.as_str(), end), (arguments, json!(finish)));
    }
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let body = json!({"messages": [{"role": "user", "content": "a"}], "response_format": format});
    let answer = post(at, CHAT, &body).await.json();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(serde_json::from_str::<Value>(text).unwrap()["city"].is_string());
    let thinks = json!({"chat_template_kwargs": {"enable_thinking": true}});
    let answer = post(at, CHAT, &with(ask("a"), thinks.clone())).await.json();
    let message = &answer["choices"][0]["message"];
    let (_, thoughts, _, _) =
        gathered(&post(at, CHAT, &with(with(ask("a"), thinks), json!({"stream": true}))).await.events());
    assert_eq!(message["reasoning"], json!(thoughts));
    assert!(!thoughts.is_empty() && !message["content"].as_str().unwrap().is_empty());
}

#[tokio::test]
async fn names_of_models() {
    let options = Options { models: vec!["tiny".to_owned(), "alias".to_owned()], ..instant() };
    let engine = EngineServer::start(Options { loras: vec!["poet".to_owned()], ..options }).await.unwrap();
    let at = engine.address();
    let list = call(at, "GET", "/v1/models").await.json();
    let card = |index: usize| {
        let card = &list["data"][index];
        (card["id"].clone(), card["parent"].clone(), card["max_model_len"].clone())
    };
    assert_eq!(card(1), (json!("alias"), Value::Null, json!(4_096)));
    assert_eq!(card(2), (json!("poet"), json!("tiny"), Value::Null));
    for (model, name) in [
        (json!("tiny"), "tiny"),
        (json!("alias"), "tiny"),
        (json!("poet"), "poet"),
        (json!(""), "tiny"),
        (Value::Null, "tiny"),
    ] {
        let answer = post(at, CHAT, &with(ask("a"), json!({"model": model}))).await.json();
        assert_eq!(answer["model"], name, "{model}");
    }
    // The last of two equal keys wins, as in Python.
    let mut client = connect(&engine).await;
    let body = br#"{"model":"nope","messages":[{"role":"user","content":"a"}],"model":"tiny"}"#;
    client.send("POST", CHAT, &[], body).await;
    assert_eq!(client.answer().await.unwrap().status, 200);
}

#[tokio::test]
async fn stored_responses() {
    let engine = EngineServer::start(instant()).await.unwrap();
    let at = engine.address();
    let first = post(at, "/v1/responses", &json!({"input": "a", "request_id": "resp_mine"})).await.json();
    assert_eq!(first["id"], "resp_mine");
    assert_eq!(call(at, "GET", "/v1/responses/resp_mine").await.json(), first);
    let next = json!({"input": "b", "previous_response_id": "resp_mine"});
    let next = post(at, "/v1/responses", &next).await.json();
    let alone = post(at, "/v1/responses", &json!({"input": "b"})).await.json();
    assert!(next["usage"]["input_tokens"].as_u64() > alone["usage"]["input_tokens"].as_u64());
    let answer = call(at, "GET", "/v1/responses/resp_none").await;
    let error = json!({
        "message": "Response with id 'resp_none' not found.", "type": "invalid_request_error",
        "param": "response_id", "code": 404,
    });
    assert_eq!((answer.status, answer.json()["error"].clone()), (404, error));
    let answer = call(at, "POST", "/v1/responses/resp_mine/cancel").await;
    assert_eq!(answer.json()["error"]["message"], "Cannot cancel a synchronous response.");
    // In the background: queued at once, completed later, forgotten by a restart.
    let queued = post(at, "/v1/responses", &json!({"input": "c", "background": true})).await.json();
    assert_eq!(queued["status"], "queued");
    let path = format!("/v1/responses/{}", queued["id"].as_str().unwrap());
    engine.wait_until("it is done", |stats| stats.finished == 4).await;
    while call(at, "GET", &path).await.json()["status"] != "completed" {}
    engine.restart().await;
    assert_eq!(call(at, "GET", &path).await.status, 404);
}

#[tokio::test]
async fn pooling_and_audio() {
    let engine = EngineServer::start(instant()).await.unwrap();
    let at = engine.address();
    let answer = post(at, "/v1/embeddings", &json!({"input": ["a", "b"]})).await.json();
    assert_eq!(answer["data"][1]["embedding"].as_array().unwrap().len(), 8);
    let packed = post(at, "/v1/embeddings", &json!({"input": "a", "encoding_format": "base64"})).await.json();
    assert_eq!(packed["data"][0]["embedding"].as_str().unwrap().len(), 44);
    let body = json!({"query": "a", "documents": ["b", "c", "d"], "top_n": 2});
    assert_eq!(post(at, "/rerank", &body).await.json()["results"].as_array().unwrap().len(), 2);
    let body = json!({"text_1": "a", "text_2": ["b", "c"]});
    assert_eq!(post(at, "/score", &body).await.json()["data"].as_array().unwrap().len(), 2);
    assert_eq!(post(at, "/classify", &json!({"input": "a"})).await.json()["data"][0]["num_classes"], 2);
    assert_eq!(post(at, "/pooling", &json!({"input": "a"})).await.status, 200);
    assert_eq!(post(at, "/invocations", &ask("a")).await.json()["object"], "chat.completion");
    // The model may come after the file.
    let form = "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nRIFF--\r\n\
                --x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\ntiny\r\n--x--\r\n";
    let mut client = connect(&engine).await;
    let headers = [("content-type", "multipart/form-data; boundary=x")];
    for (form, status) in [(form.to_owned(), 200), (form.replace("tiny", "nope"), 404), (String::new(), 400)]
    {
        client.send("POST", "/v1/audio/transcriptions", &headers, form.as_bytes()).await;
        assert_eq!(client.answer().await.unwrap().status, status, "{form}");
    }
    let without = Options { embeddings: false, transcription: false, ..instant() };
    let engine = EngineServer::start(without).await.unwrap();
    assert_eq!(post(engine.address(), "/v1/embeddings", &json!({"input": "a"})).await.status, 404);
}
