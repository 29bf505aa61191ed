//! Every way to break, and the way back.

use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use vllm_lb::engine::batch::Timing;
use vllm_lb::engine::http::{EngineServer, InjectedFault, Options};

use crate::client::{Client, call, connect, instant, paced, post};

const CHAT: &str = "/v1/chat/completions";

fn ask(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": stream})
}

async fn start() -> EngineServer {
    EngineServer::start(instant()).await.unwrap()
}

async fn open(engine: &EngineServer, body: &Value) -> Client<TcpStream> {
    let mut client = connect(engine).await;
    client.send("POST", CHAT, &[], body.to_string().as_bytes()).await;
    client
}

#[tokio::test]
async fn refused_and_back() {
    let engine = start().await;
    let mut idle = connect(&engine).await;
    idle.send("GET", "/health", &[], b"").await;
    assert_eq!(idle.answer().await.unwrap().status, 200);
    engine.set_fault(InjectedFault::Refuse).await;
    let error = TcpStream::connect(engine.address()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    idle.closed().await.unwrap();
    engine.clear_fault().await;
    assert_eq!(post(engine.address(), CHAT, &ask(false)).await.status, 200);
}

#[tokio::test]
async fn closed_after_accepting() {
    let engine = start().await;
    engine.set_fault_for(1, InjectedFault::CloseAfterAccept).await;
    let mut client = connect(&engine).await;
    client.closed().await.unwrap();
    assert_eq!(post(engine.address(), CHAT, &ask(false)).await.status, 200, "only the next one");
}

#[tokio::test]
async fn idle_connections_closed() {
    let engine = EngineServer::start(paced()).await.unwrap();
    let mut idle = connect(&engine).await;
    idle.send("GET", "/health", &[], b"").await;
    idle.answer().await.unwrap();
    let mut busy = open(&engine, &ask(false)).await;
    engine.wait_until("it runs", |stats| stats.running == 1).await;
    engine.set_fault(InjectedFault::CloseIdle).await;
    idle.closed().await.unwrap();
    assert_eq!(busy.answer().await.unwrap().status, 200);
}

#[tokio::test]
async fn stalls_before_headers_for_so_many_requests() {
    let engine = start().await;
    engine.set_fault_for(1, InjectedFault::StallHeaders).await;
    let mut stalled = open(&engine, &ask(false)).await;
    engine.wait_until("it is received", |stats| stats.received == 1).await;
    assert_eq!(post(engine.address(), CHAT, &ask(false)).await.status, 200);
    assert_eq!(call(engine.address(), "GET", "/health").await.status, 200);
    engine.restart().await;
    assert!(stalled.answer().await.is_err(), "it never was answered");
}

#[tokio::test]
async fn cut_before_headers() {
    let engine = start().await;
    for (reset, kind) in
        [(false, std::io::ErrorKind::UnexpectedEof), (true, std::io::ErrorKind::ConnectionReset)]
    {
        engine.set_fault_for(1, InjectedFault::CutHeaders { reset }).await;
        let mut client = connect(&engine).await;
        client.send("GET", "/health", &[], b"").await;
        assert_eq!(client.answer().await.unwrap().status, 200, "polls are spared");
        client.send("POST", CHAT, &[], ask(false).to_string().as_bytes()).await;
        assert_eq!(client.answer().await.unwrap_err().kind(), kind);
        assert_eq!(post(engine.address(), CHAT, &ask(false)).await.status, 200);
    }
    assert_eq!(engine.stats().finished, 2);
}

#[tokio::test]
async fn stalls_in_a_stream() {
    let engine = start().await;
    engine.set_fault(InjectedFault::StallStream { events: 3 }).await;
    let mut client = open(&engine, &ask(true)).await;
    assert_eq!(client.head().await.unwrap().status, 200);
    for _ in 0..3 {
        assert!(client.chunk().await.unwrap().is_some());
    }
    engine.clear_fault().await;
    engine.restart().await;
    assert!(client.chunk().await.is_err(), "nothing came until the connection broke");
}

#[tokio::test]
async fn cut_in_a_stream() {
    let engine = start().await;
    for reset in [false, true] {
        engine.set_fault(InjectedFault::CutStream { events: 2, reset }).await;
        let mut client = open(&engine, &ask(true)).await;
        assert_eq!(client.head().await.unwrap().status, 200);
        for _ in 0..2 {
            assert!(client.chunk().await.unwrap().is_some());
        }
        let error = client.chunk().await.unwrap_err();
        let kind =
            if reset { std::io::ErrorKind::ConnectionReset } else { std::io::ErrorKind::UnexpectedEof };
        assert_eq!(error.kind(), kind);
        engine.wait_until("nothing runs", |stats| stats.running == 0).await;
    }
}

#[tokio::test]
async fn answered_with_a_status() {
    let engine = start().await;
    let body = "{\"error\":\"over\"}".to_owned();
    engine.set_fault_for(2, InjectedFault::Status { status: 503, body: body.clone() }).await;
    for _ in 0..2 {
        let answer = post(engine.address(), CHAT, &ask(true)).await;
        assert_eq!((answer.status, answer.text()), (503, body.as_str()));
    }
    assert_eq!(post(engine.address(), CHAT, &ask(false)).await.status, 200);
    engine.set_fault(InjectedFault::ShuttingDown).await;
    let answer = post(engine.address(), CHAT, &ask(false)).await;
    let message = "cannot schedule new futures after shutdown";
    let error = json!({"message": message, "type": "InternalServerError", "param": null, "code": 500});
    assert_eq!(answer.text(), json!({"error": error}).to_string());
    assert_eq!(call(engine.address(), "GET", "/health").await.status, 200, "as on a draining server");
}

#[tokio::test]
async fn silent_after_sigterm() {
    let engine = EngineServer::start(paced()).await.unwrap();
    let mut whole = open(&engine, &ask(false)).await;
    let mut body = ask(true);
    body["max_tokens"] = json!(2_000);
    let mut stream = open(&engine, &body).await;
    stream.head().await.unwrap();
    assert!(stream.chunk().await.unwrap().is_some());
    engine.set_fault(InjectedFault::Silent).await;
    let refused = TcpStream::connect(engine.address()).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.connections), (0, 0, 2), "aborted, but not closed");
    engine.clear_fault().await;
    // A new process may serve again; these two connections hear no more until they are closed.
    assert_eq!(post(engine.address(), CHAT, &ask(false)).await.status, 200);
    engine.restart().await;
    let after = loop {
        match stream.chunk().await {
            Ok(Some(chunk)) => assert!(!chunk.contains("[DONE]") && !chunk.contains("abort"), "{chunk}"),
            end => break end,
        }
    };
    assert!(after.is_err() && whole.answer().await.is_err());
}

#[tokio::test]
async fn aborted_without_a_token() {
    let engine = start().await;
    engine.set_fault(InjectedFault::AbortEmpty).await;
    let answer = post(engine.address(), CHAT, &ask(false)).await;
    let choice = &answer.json()["choices"][0];
    assert_eq!((answer.status, &choice["finish_reason"]), (200, &json!("abort")));
    assert_eq!(choice["message"]["content"], "");
    let events = post(engine.address(), CHAT, &ask(true)).await.events();
    assert_eq!(events.len(), 3, "{events:?}");
    assert_eq!(events[1].1["choices"][0]["finish_reason"], "abort");
    let body = json!({"input": "a"});
    assert_eq!(post(engine.address(), "/v1/responses", &body).await.json()["status"], "cancelled");
    let body = json!({"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(post(engine.address(), "/v1/messages", &body).await.json()["stop_reason"], Value::Null);
}

#[tokio::test]
async fn an_error_comes_first() {
    let engine = start().await;
    engine.set_fault(InjectedFault::ErrorEvent { status: 500 }).await;
    let answer = post(engine.address(), CHAT, &ask(true)).await;
    assert_eq!(answer.status, 200);
    let events = answer.events();
    assert_eq!(events[0].1["error"]["code"], 500);
    assert_eq!((events.len(), &events[1].1), (2, &json!("[DONE]")));
    let body = json!({"model": "tiny", "max_tokens": 3, "stream": true, "messages": []});
    let events = post(engine.address(), "/v1/messages", &body).await.events();
    assert_eq!((events[0].0.as_deref(), &events[0].1["type"]), (Some("error"), &json!("error")));
}

#[tokio::test]
async fn slowed_down() {
    let engine = EngineServer::start(Options { timing: Timing::faster(1_000.0), ..instant() }).await.unwrap();
    engine.set_fault(InjectedFault::Slow { factor: 1_000_000.0 }).await;
    let mut slow = open(&engine, &ask(false)).await;
    engine.wait_until("it runs", |stats| stats.running == 1).await;
    engine.restart().await;
    assert!(slow.answer().await.is_err(), "its first step would have taken hours");
    engine.clear_fault().await;
    assert_eq!(post(engine.address(), CHAT, &ask(false)).await.status, 200);
}

#[tokio::test]
async fn health_is_apart() {
    let engine = start().await;
    engine.set_fault(InjectedFault::Status { status: 500, body: String::new() }).await;
    assert_eq!(call(engine.address(), "GET", "/health").await.status, 200);
    engine.clear_fault().await;
    engine.set_health(Some(503));
    for path in ["/health", "/ping"] {
        let answer = call(engine.address(), "GET", path).await;
        assert_eq!((answer.status, answer.text()), (503, ""));
    }
    assert_eq!(post(engine.address(), CHAT, &ask(false)).await.status, 200);
    engine.set_health(None);
    assert_eq!(call(engine.address(), "GET", "/health").await.status, 200);
}

#[tokio::test]
async fn a_restart_forgets() {
    let engine = start().await;
    let mut open = connect(&engine).await;
    let body = json!({"prompt": "word ".repeat(100), "max_tokens": 4});
    open.send("POST", "/v1/completions", &[], body.to_string().as_bytes()).await;
    open.answer().await.unwrap();
    let before = engine.started();
    engine.restart().await;
    open.closed().await.unwrap();
    assert!(engine.started() > before);
    let metrics = call(engine.address(), "GET", "/metrics").await;
    assert!(metrics.text().contains("vllm:generation_tokens_total{engine=\"0\",model_name=\"tiny\"} 0.0"));
    let answer = post(engine.address(), "/v1/completions", &body).await.json();
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(engine.stats().restarts, 1);
}

/// A restart is over when the old connections are gone, however soon clients come back.
#[tokio::test]
async fn a_restart_does_not_wait_for_new_connections() {
    let engine = start().await;
    let comes_back = async {
        loop {
            let mut stream = TcpStream::connect(engine.address()).await.unwrap();
            let _ = stream.read(&mut [0; 1]).await;
        }
    };
    let restarts = async {
        for restart in 0..20 {
            engine.wait_until("it is back", |stats| stats.accepted > restart).await;
            engine.restart().await;
        }
    };
    tokio::select! {
        () = comes_back => {}
        () = restarts => {}
    }
    assert_eq!(engine.stats().restarts, 20);
}

/// What other processes do over HTTP.
#[tokio::test]
async fn by_request() {
    let engine = start().await;
    let at = engine.address();
    let fault = |body: Value| async move {
        let answer = post(at, "/sim/fault", &body).await;
        (answer.status, answer.text().to_owned())
    };
    assert_eq!(fault(json!({"kind": "status", "status": 500, "body": "{}", "requests": 1})).await.0, 200);
    assert_eq!(post(at, CHAT, &ask(false)).await.status, 500);
    assert_eq!(post(at, CHAT, &ask(false)).await.status, 200);
    assert_eq!(fault(json!({"kind": "health"})).await.0, 200);
    assert_eq!(call(at, "GET", "/health").await.status, 503);
    assert_eq!(fault(json!({"kind": "metrics", "status": 404})).await.0, 200);
    assert_eq!(call(at, "GET", "/metrics").await.status, 404);
    assert_eq!(fault(json!({"kind": "none"})).await.0, 200);
    for path in ["/health", "/metrics"] {
        assert_eq!(call(at, "GET", path).await.status, 200);
    }
    let (status, text) = fault(json!({"kind": "tired"})).await;
    assert!(status == 400 && text.contains("unknown kind `tired`"), "{text}");
    // Refused for a moment: the way back is the time given.
    assert_eq!(fault(json!({"kind": "refuse", "seconds": 0.05})).await.0, 200);
    assert!(TcpStream::connect(at).await.is_err());
    while TcpStream::connect(at).await.is_err() {}
    assert_eq!(call(at, "GET", "/sim/stats").await.json()["received"], 2);
    let requests = call(at, "GET", "/sim/requests").await.json();
    assert_eq!(requests[0]["path"], CHAT);
    assert_eq!(call(at, "POST", "/sim/restart").await.status, 200);
    engine.wait_until("it began anew", |stats| stats.restarts == 1).await;
    let closed = Options { control: false, ..instant() };
    let engine = EngineServer::start(closed).await.unwrap();
    assert_eq!(call(engine.address(), "GET", "/sim/stats").await.status, 404);
}
