//! Asks one health check, for supervisors that run a command.

use tokio::time::timeout;

use super::admin_client::AdminClient;
use crate::cli::health::HealthArgs;

/// What is asked where the URL has no path.
const DEFAULT_PATH: &str = "/ready";

/// Asks, and returns why the check failed. The body of a good answer is not read.
pub async fn run(args: &HealthArgs) -> Result<(), String> {
    let path = if args.url.prefix.is_empty() { DEFAULT_PATH } else { "" };
    let mut client = AdminClient::new(&args.url, (None, None), args.timeout)?;
    // The client's limit is for each step, this one is for all of them.
    match timeout(args.timeout, client.get(path)).await {
        Ok(answered) => answered.map(drop),
        Err(_) => Err(client.failed(format!("no answer within {:?}", args.timeout))),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::time::sleep;

    use super::*;
    use crate::config::url;

    const LIMIT: Duration = Duration::from_millis(500);

    /// Checks a server that answers one request with this text, at this path of it. Returns the request line.
    async fn checked(path: &str, answer: &'static str) -> (Result<(), String>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = url::upstream(&format!("http://{}{path}", listener.local_addr().unwrap())).unwrap();
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 4096];
            let length = stream.read(&mut head).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            head.truncate(length);
            // The connection stays open, as one of a balancer does.
            tokio::spawn(async move {
                sleep(Duration::from_secs(60)).await;
                drop(stream);
            });
            String::from_utf8(head).unwrap().lines().next().unwrap().to_string()
        });
        let result = run(&HealthArgs { url, timeout: LIMIT }).await;
        (result, served.await.unwrap())
    }

    #[tokio::test]
    async fn a_good_answer_is_health_and_no_path_asks_for_readiness() {
        let good = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(checked("", good).await, (Ok(()), "GET /ready HTTP/1.1".into()));
        assert_eq!(checked("/live", good).await, (Ok(()), "GET /live HTTP/1.1".into()));
    }

    #[tokio::test]
    async fn another_status_is_not_health_and_is_reported() {
        let (result, _) = checked("", "HTTP/1.1 503 Busy\r\ncontent-length: 3\r\n\r\nwhy").await;
        let error = result.expect_err("the status is no success");
        assert!(error.contains("503 Service Unavailable: why"), "{error}");
    }

    #[tokio::test]
    async fn silence_and_a_refused_connection_are_not_health() {
        let begun = Instant::now();
        let (result, _) = checked("", "").await;
        assert!(result.is_err() && begun.elapsed() < 10 * LIMIT, "{result:?} after {:?}", begun.elapsed());
        let url = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            url::upstream(&format!("http://{}", listener.local_addr().unwrap())).unwrap()
        };
        let refused = run(&HealthArgs { url, timeout: LIMIT }).await.unwrap_err();
        assert!(refused.contains("start the balancer, or name its admin listener"), "{refused}");
    }
}
