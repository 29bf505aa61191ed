//! Names that several rooms use: header names and the product's own.

/// The product's name in `User-Agent`.
pub(crate) const PRODUCT: &str = concat!("vllm-lb/", env!("CARGO_PKG_VERSION"));

/// The header field with the id of a request.
pub(crate) const X_REQUEST_ID: &str = "x-request-id";
/// The header field with the trace of a request and the span that is its parent.
pub(crate) const TRACEPARENT: &str = "traceparent";
/// The header field with further data of the systems that record a trace.
pub(crate) const TRACESTATE: &str = "tracestate";
/// The header field with the addresses of the client and of proxies.
pub(crate) const X_FORWARDED_FOR: &str = "x-forwarded-for";
/// The header field with the host that the client requested.
pub(crate) const X_FORWARDED_HOST: &str = "x-forwarded-host";
/// The header field with the scheme that the client used.
pub(crate) const X_FORWARDED_PROTO: &str = "x-forwarded-proto";
/// The beginning of the names of all header fields that the balancer adds about itself and its choice.
pub(crate) const OWN_FIELD_PREFIX: &str = "x-vllm-lb-";
/// The upstream that answered, with `expose: true`.
pub(crate) const X_UPSTREAM: &str = "x-vllm-lb-upstream";
/// How many upstreams were tried, with `expose: true`.
pub(crate) const X_ATTEMPTS: &str = "x-vllm-lb-attempts";
/// The leading blocks of the prompt that the upstream was believed to hold, of all known blocks, with
/// `expose: true`.
pub(crate) const X_HIT: &str = "x-vllm-lb-hit";
/// The forecast of the time from the choice to the first token, in milliseconds, with `expose: true`.
pub(crate) const X_FORECAST: &str = "x-vllm-lb-forecast-ms";
/// The longest time to the first token that the client accepts, in milliseconds.
pub(crate) const X_SLO_TTFT: &str = "x-slo-ttft-ms";
/// Why this upstream was chosen, with `expose: true`.
pub(crate) const X_REASON: &str = "x-vllm-lb-reason";
/// The balancer that answered, with `expose: true`.
pub(crate) const X_BALANCER: &str = "x-vllm-lb-balancer";
/// The default cookie that names a session. In two parts, since names of metrics are recognised by the first.
pub(crate) const SESSION_COOKIE: &str = concat!("vllm_lb", "_session");
/// Controls whether client libraries retry, independent of the status.
pub(crate) const X_SHOULD_RETRY: &str = "x-should-retry";

/// Selects one of the engines of an upstream that runs several.
pub(crate) const X_DATA_PARALLEL_RANK: &str = "x-data-parallel-rank";
/// The longest text of a client that is kept or shown to operators, in bytes.
pub(crate) const MAX_SHOWN_BYTES: usize = 128;

/// The longest model name in a request, in bytes; longer texts of a client are cut in errors.
pub(crate) const MAX_MODEL_BYTES: usize = 4096;

/// Marks the end of a text that was cut.
const ELLIPSIS: &str = "…";

/// Cuts a text of a client to `limit` bytes. Returns its beginning, and the mark of a cut, empty without one.
pub(crate) fn cut(text: &str, limit: usize) -> [&str; 2] {
    if text.len() <= limit {
        return [text, ""];
    }
    let end = (0..=limit.saturating_sub(ELLIPSIS.len())).rfind(|at| text.is_char_boundary(*at));
    [&text[..end.unwrap_or_default()], ELLIPSIS]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_long_texts_between_characters() {
        for (text, wanted) in [
            (String::new(), String::new()),
            ("a".repeat(128), "a".repeat(128)),
            ("a".repeat(129), "a".repeat(125) + "…"),
            ("é".repeat(64), "é".repeat(64)),
            ("é".repeat(65), "é".repeat(62) + "…"),
            ("\u{1f600}".repeat(1 << 19), "\u{1f600}".repeat(31) + "…"),
        ] {
            assert_eq!(cut(&text, MAX_SHOWN_BYTES).concat(), wanted);
            assert!(wanted.len() <= MAX_SHOWN_BYTES);
        }
    }
}
