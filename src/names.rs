//! Names that more than one room uses: header names and the product's own.

/// What we call ourselves in `User-Agent`.
pub const PRODUCT: &str = concat!("vllm-lb/", env!("CARGO_PKG_VERSION"));

pub const X_REQUEST_ID: &str = "x-request-id";
pub const X_FORWARDED_FOR: &str = "x-forwarded-for";
pub const X_FORWARDED_HOST: &str = "x-forwarded-host";
pub const X_FORWARDED_PROTO: &str = "x-forwarded-proto";
/// The upstream that answered, with `expose: true`.
pub const X_UPSTREAM: &str = "x-vllm-lb-upstream";
/// How many upstreams were tried, with `expose: true`.
pub const X_ATTEMPTS: &str = "x-vllm-lb-attempts";
/// Leading blocks of the prompt that it was believed to hold, of all that are known, with `expose: true`.
pub const X_HIT: &str = "x-vllm-lb-hit";
/// Why this upstream was chosen, with `expose: true`.
pub const X_REASON: &str = "x-vllm-lb-reason";
/// The cookie that names a session, unless the configuration says another. In two parts, since metrics are
/// known by the first.
pub const SESSION_COOKIE: &str = concat!("vllm_lb", "_session");
/// Tells the clients' libraries whether to try again, whatever the status.
pub const X_SHOULD_RETRY: &str = "x-should-retry";

/// Names one of the engines of an upstream that runs several.
pub const X_DATA_PARALLEL_RANK: &str = "x-data-parallel-rank";
