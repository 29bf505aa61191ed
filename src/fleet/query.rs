//! The query of a request for the upstreams that may take it.

use std::sync::Arc;
use std::time::Duration;

use crate::route::upstreams::{RouteNames, RouteUpstreams};

/// The requirements of a request for its upstream.
#[derive(Clone, Copy, Debug, Default)]
pub struct UpstreamQuery<'a> {
    /// The model; `None`: the request names no model, or its model does not matter.
    pub model: Option<&'a str>,
    /// The prompt tokens, estimated.
    pub tokens: u64,
    /// The ids of the upstreams that this request has tried.
    pub tried: &'a [usize],
    /// Tried upstreams may take the request again when no other can.
    pub again: bool,
    /// The ids of tried upstreams that declined this request: used only when no other will become available.
    pub declined: &'a [usize],
    /// The id of the only upstream that may take the request.
    pub only: Option<usize>,
    /// The upstreams that may take the request; `None`: all. An unknown id means an upstream that may still
    /// be discovered.
    pub among: Option<&'a RouteUpstreams>,
    /// The names that `among` was resolved from: requests with equal names wait in one line of the queue,
    /// also when the names resolve to other upstreams later.
    pub names: Option<&'a Arc<RouteNames>>,
    /// Routes define model names that no upstream serves: the error for an unknown model must list them.
    pub has_aliases: bool,
    /// The longest forecast with which the request leaves the queue; requests with and without a limit wait
    /// in lines of their own.
    pub slo: Option<Duration>,
    /// Full upstreams are candidates as well.
    pub even_full: bool,
}
