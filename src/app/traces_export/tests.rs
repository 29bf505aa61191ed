//! Exports from a small server that answers as the admin listener does, and notes what it was sent.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};

use super::*;
use crate::cli::traces::{TracesArgs, TracesCommand};
use crate::cli::{Args, Command, parse};

const LIST: &str = r#"[{"session_id":"b/c:1","trace_count":1,"created_at":2.0,"metadata":{}},
    {"session_id":"a","trace_count":2,"created_at":1.0,"metadata":{}}]"#;

/// The target and the authorization of each request, with a mark for those on a new connection.
type Requests = Arc<Mutex<Vec<String>>>;

fn export_args(words: &[&str]) -> ExportArgs {
    let words = ["vllm-lb", "traces", "export"].iter().chain(words);
    let args: Args = parse(words.map(Into::into)).expect("good arguments");
    match args.command {
        Some(Command::Traces(TracesArgs { command: TracesCommand::Export(args) })) => args,
        other => panic!("{other:?}"),
    }
}

/// The answer to a target, as it is written.
fn answer(target: &str) -> String {
    let of = |status: &str, body: &str| {
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let chunked = |pieces: &[&str]| {
        let chunks: String = pieces.iter().map(|piece| format!("{:x}\r\n{piece}\r\n", piece.len())).collect();
        format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunks}0\r\n\r\n")
    };
    match target {
        "/sessions" | "/sessions?since=5" | "/team/sessions" => of("200 OK", LIST),
        "/sessions/a/traces?format=jsonl" | "/team/sessions/a/traces?format=jsonl" => {
            chunked(&["{\"n\":1}\n{\"n\"", ":2}\n"])
        }
        "/sessions/a/traces?format=jsonl&since=5" => of("200 OK", "{\"n\":2}\n"),
        // The last line may lack its end.
        path if path.contains("/sessions/b%2Fc%3A1/traces") => of("200 OK", "{\"n\":3}"),
        "/sessions/none/traces?format=jsonl" => of("200 OK", ""),
        "/sessions/%2E%2E/traces?format=jsonl" => of("200 OK", "[]"),
        "/sessions/cut/traces?format=jsonl" => {
            "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{\"n\":1}\n".into()
        }
        "/sessions/denied/traces?format=jsonl" => of("401 Unauthorized", "{\"error\":\"no\"}"),
        _ => of("404 Not Found", "nothing"),
    }
}

async fn serve(mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin, requests: Requests) {
    let mut mark = "new ";
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
        }
        let head = String::from_utf8(head).expect("a head is text");
        let target = head.split(' ').nth(1).expect("a request has a target").to_string();
        let key = head.lines().find_map(|line| line.strip_prefix("authorization: ")).unwrap_or("-");
        requests.lock().unwrap().push(format!("{mark}{target} {key}"));
        mark = "";
        let answer = answer(&target);
        if stream.write_all(answer.as_bytes()).await.is_err() || target.contains("cut") {
            return;
        }
    }
}

/// A server, its URL, and what it was sent.
async fn server() -> (String, Requests) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let (url, requests) = (format!("http://{}", listener.local_addr().unwrap()), Requests::default());
    let noted = requests.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, noted.clone()));
        }
    });
    (url, requests)
}

async fn exported(words: &[&str], token: Option<&str>) -> Result<(String, ExportSummary), String> {
    let mut out = Vec::new();
    match run(&export_args(words), token, &mut out).await {
        Ok(summary) => Ok((String::from_utf8(out).expect("JSON is text"), summary)),
        Err(ExportError::Failed(problem)) => Err(problem),
        Err(ExportError::OutputClosed) => panic!("a list of bytes is never closed"),
    }
}

#[tokio::test]
async fn all_sessions_are_exported_the_oldest_first_over_one_connection() {
    let (url, requests) = server().await;
    let (lines, summary) = exported(&["--admin", &url], Some("")).await.expect("an export");
    assert_eq!(lines, "{\"n\":1}\n{\"n\":2}\n{\"n\":3}\n");
    assert_eq!(summary, ExportSummary::default());
    let expected =
        ["new /sessions -", "/sessions/a/traces?format=jsonl -", "/sessions/b%2Fc%3A1/traces?format=jsonl -"];
    assert_eq!(*requests.lock().unwrap(), expected);
    let (lines, _) = exported(&["--admin", &format!("{url}/team")], None).await.expect("a prefix is kept");
    assert_eq!(lines.lines().count(), 3);
}

#[tokio::test]
async fn sessions_a_time_and_a_token_are_passed_on() {
    let (url, requests) = server().await;
    let words = ["--admin", &url, "--since", "5", "--session", "a", "--token", "mine"];
    let (lines, _) = exported(&words, Some("other")).await.expect("an export");
    assert_eq!(lines, "{\"n\":2}\n");
    let words = ["--admin", &url, "--session", "none", "--session", "a"];
    let (lines, summary) = exported(&words, Some("other")).await.expect("an export");
    assert_eq!((lines.lines().count(), summary.empty), (2, vec!["none".to_string()]));
    let expected = [
        "new /sessions/a/traces?format=jsonl&since=5 Bearer mine",
        "new /sessions/none/traces?format=jsonl Bearer other",
        "/sessions/a/traces?format=jsonl Bearer other",
    ];
    assert_eq!(*requests.lock().unwrap(), expected);
}

#[tokio::test]
async fn a_unix_socket_is_an_admin_listener_too() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("admin.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, Requests::default()));
        }
    });
    let url = format!("unix:{}", path.display());
    let (lines, _) = exported(&["--admin", &url], None).await.expect("an export");
    assert_eq!(lines.lines().count(), 3);
}

#[tokio::test]
async fn a_failure_says_what_failed() {
    let (url, _) = server().await;
    let export = async |session: &str| exported(&["--admin", &url, "--session", session], None).await;
    for (session, problem) in [
        ("denied", "401 Unauthorized: give its token by --token or VLLM_LB_ADMIN_TOKEN: {\"error\":\"no\"}"),
        ("unknown", "404 Not Found: nothing"),
        ("..", "not of JSON lines"),
        ("cut", "reading a body"),
    ] {
        let seen = export(session).await.expect_err(session);
        assert!(seen.starts_with(&url) && seen.contains(problem), "{seen}");
    }
    let closed = exported(&["--admin", "http://127.0.0.1:1"], None).await.expect_err("no server is there");
    assert!(closed.contains("127.0.0.1:1") && closed.contains("refused"), "{closed}");
    let missing = exported(&["--store", "sqlite:/nonexistent/traces.db"], None).await.expect_err("no file");
    assert!(missing.contains("cannot read /nonexistent/traces.db"), "{missing}");
}

#[tokio::test]
async fn a_file_is_there_once_it_is_complete() {
    let (url, _) = server().await;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("calls.jsonl");
    let file = path.to_str().expect("is text");
    let left = || fs::read_dir(directory.path()).expect("a directory").count();
    let cut =
        exported(&["--admin", &url, "--session", "a", "--session", "cut", "--output", file], None).await;
    assert!(cut.is_err() && left() == 0, "{cut:?}");
    let (lines, _) = exported(&["--admin", &url, "--output", file], None).await.expect("an export");
    assert_eq!((lines.as_str(), left()), ("", 1));
    assert_eq!(fs::read_to_string(&path).expect("the file").lines().count(), 3);
}

/// A pipe after the end of its reader.
struct ClosedPipe;

impl Write for ClosedPipe {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_reader_that_ends_ends_the_export() {
    let (url, _) = server().await;
    let ended = run(&export_args(&["--admin", &url]), None, &mut ClosedPipe).await;
    assert!(matches!(ended, Err(ExportError::OutputClosed)), "{ended:?}");
}
