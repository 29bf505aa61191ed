//! Requests to the API server: its address, the credentials, pages of the list, and the watch.
//!
//! The crate `kube` reads kubeconfigs and makes the TLS client. Lists and watches are requested here and not
//! with its runtime, so that every page and every line has a limit, a `retry-after` is respected, and an
//! event that cannot be read leads to a new list.
//!
//! The client is made anew after a failure, so that rotated tokens, keys and authorities are read at once;
//! without a failure when its `credentials` are due, and `kube` reads the authorities of a pod every minute.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use http::header::RETRY_AFTER;
use http::{Response, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use kube::api::{ListParams, WatchParams};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::core::Request;
use kube::{Client, Config};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::runtime::Handle;

use super::credentials;
use super::failure::ApiFailure;
use super::files::{OnSlow, check_kubeconfig, kubeconfig_paths, read_files};
use super::messages::{self, ApiStatus, GONE_STATUS, SlicePage};
use super::slices::SERVICE_LABEL;
use crate::config::types::KubernetesService;
use crate::fleet::now;

/// The largest number of slices in a page.
const PAGE_SLICES: u32 = 100;

/// The largest page: a slice with a hundred endpoints has 40 KB.
const MAX_PAGE_BYTES: usize = 32 << 20;

/// The largest body of a refusal that is read.
const MAX_REFUSAL_BYTES: usize = 64 << 10;

/// The time limit of connecting, with TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The time limit for the head of an answer, and for a whole page.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// The time after which the server ends a watch, and the watch starts again. A connection that died without a
/// sign is noticed at that time.
pub(super) const WATCH_SECONDS: u32 = 60;

/// Where Kubernetes mounts the account of a pod.
const ACCOUNT_DIRECTORY: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The slices of one service at an API server.
pub(super) struct SliceApi {
    client: Client,
    request: Request,
    selector: String,
    namespace: String,
    /// When the credentials are to be read again.
    renew_at: Option<Instant>,
}

// === impl SliceApi ===

impl SliceApi {
    /// Reads the address and the credentials, and makes a client; connects at the first request.
    pub(super) async fn open(service: &KubernetesService, on_slow: OnSlow<'_>) -> Result<Self, ApiFailure> {
        let (service_read, runtime) = (service.clone(), Handle::current());
        let read = read_files(move || runtime.block_on(settings(&service_read)), on_slow).await;
        let mut config = read.and_then(|read| read).map_err(ApiFailure::Unreached)?;
        let renew_at = credentials::resolve(&mut config.auth_info, on_slow).await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        // Retries are paced by the watch, which respects `retry-after`.
        config.default_retry = false;
        // Keys and certificates are read from files.
        let made = read_files(move || Client::try_from(config), on_slow).await;
        let made = made.and_then(|made| made.map_err(|error| causes(&error)));
        let client = made.map_err(ApiFailure::Unreached)?;
        let namespace = service.namespace.clone();
        let namespace = namespace.unwrap_or_else(|| client.default_namespace().trim().to_string());
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices");
        let selector = format!("{SERVICE_LABEL}={}", service.service);
        Ok(SliceApi { client, request: Request::new(path), selector, namespace, renew_at })
    }

    /// Whether the credentials are to be read again before the next round.
    pub(super) fn is_due(&self) -> bool {
        self.renew_at.is_some_and(|due| due <= now())
    }

    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Requests a page of the list, the first one without `key`.
    pub(super) async fn page(&self, key: Option<&str>) -> Result<SlicePage, ApiFailure> {
        let mut parameters = ListParams::default().labels(&self.selector).limit(PAGE_SLICES);
        parameters.continue_token = key.map(String::from);
        let request = self.request.list(&parameters).map_err(invalid)?;
        let exchange = async {
            let answer = self.send(request).await?;
            let body = Limited::new(answer.into_body(), MAX_PAGE_BYTES).collect().await;
            let body = body.map_err(|error| ApiFailure::Unreached(format!("the list broke off: {error}")))?;
            messages::page(&body.to_bytes()).map_err(ApiFailure::Invalid)
        };
        tokio::time::timeout(ANSWER_TIMEOUT, exchange)
            .await
            .unwrap_or(Err(ApiFailure::Silent(ANSWER_TIMEOUT)))
    }

    /// Requests the events after a version. The body of the answer has no end of its own.
    pub(super) async fn watch(&self, resource_version: &str) -> Result<Body, ApiFailure> {
        let parameters = WatchParams::default().labels(&self.selector).timeout(WATCH_SECONDS);
        let request = self.request.watch(&parameters, resource_version);
        let request = request.map_err(invalid)?;
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, self.send(request)).await;
        Ok(answer.unwrap_or(Err(ApiFailure::Silent(ANSWER_TIMEOUT)))?.into_body())
    }

    /// Sends a request. An answer other than 200 is a failure.
    async fn send(&self, request: http::Request<Vec<u8>>) -> Result<Response<Body>, ApiFailure> {
        let answer = self.client.send(request.map(Body::from)).await;
        let answer = answer.map_err(|error| ApiFailure::Unreached(causes(&error)))?;
        let status = answer.status();
        if status == StatusCode::OK {
            return Ok(answer);
        }
        if status.as_u16() == GONE_STATUS {
            return Err(ApiFailure::Expired);
        }
        let header = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let retry_after = header.and_then(messages::retry_after);
        let body = Limited::new(answer.into_body(), MAX_REFUSAL_BYTES).collect().await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        let why = ApiStatus::parse(status.as_u16(), &body).explain(&self.namespace);
        Err(ApiFailure::Refused { why, retry_after })
    }
}

fn invalid(error: kube::core::request::Error) -> ApiFailure {
    ApiFailure::Invalid(error.to_string())
}

/// Returns the address and the credentials: of the configured file, of `$KUBECONFIG`, of the pod, or of the
/// user's own file, in this order.
#[allow(clippy::disallowed_methods, reason = "Kubernetes gives its pods the address of its API in variables")]
async fn settings(service: &KubernetesService) -> Result<Config, String> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let pod = (variable("KUBERNETES_SERVICE_HOST"), variable("KUBERNETES_SERVICE_PORT"));
    let file = match (&service.kubeconfig, variable("KUBECONFIG"), pod) {
        (Some(path), ..) => {
            check_kubeconfig(path)?;
            Kubeconfig::read_from(path)
        }
        (None, None, (Some(host), Some(port))) => {
            return in_pod(Path::new(ACCOUNT_DIRECTORY), &host, &port);
        }
        (None, named, _) => {
            kubeconfig_paths(named.as_deref()).iter().try_for_each(|path| check_kubeconfig(path))?;
            Kubeconfig::read()
        }
    };
    let file = file.map_err(|error| causes(&error))?;
    let has_proxy = has_proxy(&file, service.context.as_deref());
    let options = KubeConfigOptions { context: service.context.clone(), ..KubeConfigOptions::default() };
    let mut config = Config::from_custom_kubeconfig(file, &options).await.map_err(|error| causes(&error))?;
    // The balancer reads proxies from no variable of the environment.
    if !has_proxy {
        config.proxy_url = None;
    }
    Ok(config)
}

/// Whether the cluster of the context, or of the current one, has a proxy.
fn has_proxy(file: &Kubeconfig, context: Option<&str>) -> bool {
    let context = context.or(file.current_context.as_deref());
    let context = file.contexts.iter().find(|named| Some(named.name.as_str()) == context);
    let cluster = context.and_then(|named| Some(named.context.as_ref()?.cluster.as_str()));
    let cluster = file.clusters.iter().find(|named| Some(named.name.as_str()) == cluster);
    let proxy = cluster.and_then(|named| named.cluster.as_ref()?.proxy_url.as_deref());
    proxy.is_some_and(|url| !url.is_empty())
}

/// Returns the address of the cluster that the pod runs in, and the account of the pod.
fn in_pod(directory: &Path, host: &str, port: &str) -> Result<Config, String> {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_string() };
    let address = format!("https://{host}:{port}");
    let url: Uri = address.parse().map_err(|error| format!("address {address}: {error}"))?;
    let file = |name: &str| directory.join(name);
    let failure = |name: &str, error: &dyn std::fmt::Display| format!("{}: {error}", file(name).display());
    let namespace =
        std::fs::read_to_string(file("namespace")).map_err(|error| failure("namespace", &error))?;
    let authorities = CertificateDer::pem_file_iter(file("ca.crt")).and_then(Iterator::collect);
    let authorities: Vec<CertificateDer<'_>> = authorities.map_err(|error| failure("ca.crt", &error))?;
    let mut config = Config::new(url);
    config.default_namespace = namespace.trim().to_string();
    config.root_cert = Some(authorities.iter().map(|authority| authority.to_vec()).collect());
    config.root_cert_file = Some(file("ca.crt"));
    config.auth_info.token_file = Some(file("token").display().to_string());
    Ok(config)
}

/// Returns an error with its causes, of which the last one has the reason.
fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(reason) = without_secrets(cause) {
            return reason;
        }
        let cause_text = cause.to_string();
        if text.is_empty() {
            text = cause_text;
        } else if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// Describes an error that quotes secrets in its own text: lines of a kubeconfig.
fn without_secrets(error: &(dyn Error + 'static)) -> Option<String> {
    let KubeconfigError::Parse(why) = error.downcast_ref::<KubeconfigError>()? else { return None };
    let line = why.location().map(|place| format!(", see line {}", place.line()));
    Some(format!("the kubeconfig cannot be parsed{}", line.unwrap_or_default()))
}

#[cfg(test)]
mod tests;
