//! The HTTP of the API server: lists, watches and refusals.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::stream;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::super::Duration;
use super::super::wire::Stream;
use super::{Cluster, Item, Refusal, SeenRequest, Shared, Verb, error_event, is_selected, line, refusal};

/// What a body ends with when its connection is cut.
type Cut = std::io::Error;

type AnswerBody = UnsyncBoxBody<Bytes, Cut>;

// === impl Shared ===

impl Shared {
    pub fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Feeds a watch.
    async fn feed(
        &self,
        query: HashMap<String, String>,
        begins: usize,
        to: mpsc::Sender<Result<Frame<Bytes>, Cut>>,
    ) {
        let mut changed = self.changed.subscribe();
        let from: u64 = query.get("resourceVersion").and_then(|from| from.parse().ok()).unwrap_or(0);
        let mut at = 0;
        loop {
            let news = self.cluster().log[at..].to_vec();
            for entry in news {
                let is_new = at >= begins;
                at += 1;
                match entry.item {
                    // A watch gets what it missed, but of what is no event only what comes from now on.
                    Item::Event { kind: "BOOKMARK", .. } | Item::Bytes(_) | Item::End { .. } if !is_new => {}
                    Item::Event { kind, object } => {
                        let wanted = kind == "BOOKMARK" || is_selected(&object, query.get("labelSelector"));
                        if entry.version > from && wanted || kind == "BOOKMARK" {
                            drop(to.send(Ok(Frame::data(line(kind, &object).into()))).await);
                        }
                    }
                    Item::Bytes(bytes) => drop(to.send(Ok(Frame::data(bytes.into()))).await),
                    Item::End { cut } => {
                        if cut {
                            drop(to.send(Err(Cut::other("the test cuts it"))).await);
                        }
                        return;
                    }
                }
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    }
}

/// Serves until dropped.
pub async fn accept(listener: TcpListener, acceptor: Option<TlsAcceptor>, shared: Arc<Shared>) {
    // Ends its tasks when it is dropped.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (shared, acceptor) = (shared.clone(), acceptor.clone());
        connections.spawn(async move {
            match acceptor {
                None => serve(stream, shared).await,
                // A client that does not trust the certificate disconnects.
                Some(acceptor) => {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        serve(stream, shared).await;
                    }
                }
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(stream: impl Stream + 'static, shared: Arc<Shared>) {
    let service = service_fn(move |request| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(answer(request, shared).await) }
    });
    // Ends with an error when a body is cut, which closes the connection.
    drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Response<AnswerBody> {
    let query = query(request.uri().query().unwrap_or_default());
    let verb = match (query.contains_key("watch"), query.contains_key("continue")) {
        (true, _) => Verb::Watch,
        (false, true) => Verb::Page,
        (false, false) => Verb::List,
    };
    let authorization = text(request.headers(), AUTHORIZATION.as_str());
    let path = request.uri().path().to_string();
    let (late, begins) = {
        let mut cluster = shared.cluster();
        let seen = SeenRequest {
            verb,
            path: path.clone(),
            query: query.clone(),
            authorization: authorization.clone(),
        };
        cluster.requests.push(seen);
        (cluster.late, cluster.log.len())
    };
    tokio::time::sleep(late).await;
    if let Err(refusal) = allow(&shared, verb, &path, authorization.as_deref()) {
        return refused(&refusal);
    }
    match verb {
        Verb::List | Verb::Page => match shared.cluster().page(&query) {
            Ok(page) => whole(StatusCode::OK, page.to_string()),
            Err(status) => refused(&refusal(status, "Expired", "The provided continue parameter is too old")),
        },
        Verb::Watch => {
            let from: u64 = query.get("resourceVersion").and_then(|from| from.parse().ok()).unwrap_or(0);
            // The real server answers 200, and the refusal is the first event.
            if from < shared.cluster().oldest {
                return whole(StatusCode::OK, format!("{}\n", error_event(410, "Expired")));
            }
            watched(query, begins, shared)
        }
    }
}

/// The refusal of a request, if there is one.
fn allow(shared: &Shared, verb: Verb, path: &str, authorization: Option<&str>) -> Result<(), Refusal> {
    let mut cluster = shared.cluster();
    let bearer = cluster.token.as_ref().map(|token| format!("Bearer {token}"));
    if bearer.is_some() && bearer.as_deref() != authorization {
        return Err(refusal(401, "Unauthorized", "Unauthorized"));
    }
    if path != "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices" {
        return Err(refusal(404, "NotFound", "the server could not find the requested resource"));
    }
    let Some(refusal) = cluster.refusals.get_mut(&verb).filter(|refusal| refusal.times > 0) else {
        return Ok(());
    };
    refusal.times -= 1;
    Err(refusal.clone())
}

fn watched(query: HashMap<String, String>, begins: usize, shared: Arc<Shared>) -> Response<AnswerBody> {
    let (sender, receiver) = mpsc::channel(16);
    let seconds = query.get("timeoutSeconds").and_then(|seconds| seconds.parse().ok()).unwrap_or(300);
    shared.watches.fetch_add(1, Ordering::Relaxed);
    tokio::spawn(async move {
        let client_has_gone = sender.clone();
        tokio::select! {
            () = shared.feed(query, begins, sender) => {}
            () = client_has_gone.closed() => {}
            () = tokio::time::sleep(Duration::from_secs(seconds)) => {}
        }
        shared.watches.fetch_sub(1, Ordering::Relaxed);
    });
    let frames =
        stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
    let body = BodyExt::boxed_unsync(StreamBody::new(Box::pin(frames)));
    Response::builder().header(CONTENT_TYPE, "application/json").body(body).expect("is valid")
}

fn refused(refusal: &Refusal) -> Response<AnswerBody> {
    let mut answer = whole(StatusCode::from_u16(refusal.status).expect("is a status"), refusal.body.clone());
    for (name, value) in &refusal.headers {
        answer.headers_mut().insert(*name, HeaderValue::from_static(value));
    }
    answer
}

fn whole(status: StatusCode, text: String) -> Response<AnswerBody> {
    let body = Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync();
    let answer = Response::builder().status(status).header(CONTENT_TYPE, "application/json");
    answer.body(body).expect("is valid")
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.to_string())
}

fn query(text: &str) -> HashMap<String, String> {
    let decoded = |part: &str| {
        let part = part.replace('+', " ");
        vllm_lb::config::url::decoded(&part).unwrap_or(part)
    };
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (decoded(key), decoded(value))).collect()
}
