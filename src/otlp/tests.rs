//! The export towards collectors that do not take what they get.

use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::*;
use crate::config::url;
use crate::observe::ExpositionFormat;

fn exporter(endpoint: Option<&str>, observer: &Observer) -> Arc<SpanExporter> {
    let endpoint = endpoint.map(|text| url::upstream(text).unwrap());
    SpanExporter::start(&OtlpConfig { endpoint, ..OtlpConfig::default() }, observer.clone())
}

fn record() -> SpanRecord {
    spans::tests::record(Default::default())
}

fn count(observer: &Observer, result: &str) -> usize {
    let page = String::from_utf8(observer.render(ExpositionFormat::Text, &[])).unwrap();
    let name = format!("{}{{result=\"{result}\"}} ", concat!("vllm_lb", "_spans_total"));
    page.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0)
}

/// A collector that reads and never answers, and the number of bytes once the first of them have come.
async fn silent() -> (String, oneshot::Receiver<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (began, beginning) = oneshot::channel();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut bytes = vec![0; 1 << 16];
        let first = stream.read(&mut bytes).await.unwrap();
        let _ = began.send(first);
        while stream.read(&mut bytes).await.unwrap_or(0) > 0 {}
    });
    (url, beginning)
}

#[tokio::test]
async fn a_full_queue_drops_spans_without_a_wait() {
    let observer = Observer::default();
    let (url, beginning) = silent().await;
    let exporter = exporter(Some(&url), &observer);
    exporter.take(record());
    assert!(beginning.await.unwrap() > 0, "the collector has the first batch");
    let start = Instant::now();
    for _ in 0..MAX_WAITING_RECORDS + 100 {
        exporter.take(record());
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(count(&observer, "full"), 100);
    exporter.stop(Duration::from_millis(50)).await;
    assert_eq!(count(&observer, "stop"), MAX_WAITING_RECORDS + 1, "every other span is counted too");
    assert_eq!(count(&observer, "exported"), 0);
}

#[tokio::test]
async fn spans_without_an_endpoint_are_dropped() {
    let observer = Observer::default();
    let exporter = exporter(None, &observer);
    exporter.take(record());
    exporter.stop(Duration::from_secs(5)).await;
    assert_eq!((count(&observer, "off"), count(&observer, "stop")), (1, 0));
}

#[tokio::test]
async fn the_worker_ends_with_its_exporter() {
    let observer = Observer::default();
    let exporter = exporter(None, &observer);
    let task = exporter.task.lock().unwrap().take().unwrap();
    drop(exporter);
    task.await.unwrap();
}

/// Regression: the time of the next attempt could not be expressed, and the worker ended for good.
#[tokio::test]
async fn an_endless_pause_of_the_collector_drops_one_batch() {
    let observer = Observer::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let exporter = exporter(Some(&url), &observer);
    for batch in 1..=2 {
        exporter.take(record());
        let (mut stream, _) = listener.accept().await.unwrap();
        let answer = format!(
            "HTTP/1.1 503 Service Unavailable\r\nretry-after: {}\r\nconnection: close\r\n\
             content-length: 0\r\n\r\n",
            u64::MAX
        );
        assert!(stream.read(&mut [0; 1 << 16]).await.unwrap() > 0);
        stream.write_all(answer.as_bytes()).await.unwrap();
        let dropped = async {
            while count(&observer, "collector") < batch {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), dropped).await.expect("the batch is dropped");
    }
    exporter.stop(Duration::from_secs(5)).await;
    assert_eq!((count(&observer, "collector"), count(&observer, "stop")), (2, 0));
}

/// Regression: a success with a long or endless body was taken for a failure, and the spans were sent again.
#[tokio::test]
async fn a_success_is_final_whatever_its_body() {
    let endless = format!("HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n{}", "x".repeat(80_000));
    for answer in ["HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nno", &endless] {
        let observer = Observer::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let exporter = exporter(Some(&url), &observer);
        exporter.take(record());
        let (mut stream, _) = listener.accept().await.unwrap();
        assert!(stream.read(&mut [0; 1 << 16]).await.unwrap() > 0);
        stream.write_all(answer.as_bytes()).await.unwrap();
        let exported = async {
            while count(&observer, "exported") == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(8), exported).await.expect("the export is done");
        exporter.stop(Duration::from_secs(5)).await;
    }
}
