//! A lease is one request in flight on one upstream: taking it raises the upstream's gauges, dropping
//! it, on whatever path, lowers them by the same amounts. There is no other way up or down.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::upstream::Upstream;

/// How a request on an upstream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A whole answer with this status.
    Answered(u16),
    /// The client left first.
    ClientGone,
    /// The upstream could not be reached.
    Unreached,
    /// The upstream ended the answer, or the connection, before it was whole.
    Broken,
}

impl Outcome {
    pub fn label(self) -> &'static str {
        match self {
            Outcome::Answered(status) if status < 400 => "ok",
            Outcome::Answered(status) if status < 500 => "client_error",
            Outcome::Answered(_) => "server_error",
            Outcome::ClientGone => "client_gone",
            Outcome::Unreached => "unreached",
            Outcome::Broken => "broken",
        }
    }
}

pub struct Lease {
    upstream: Arc<Upstream>,
    tokens: u64,
    /// Still part of the backlog: no byte of an answer has come.
    waiting: bool,
}

impl Lease {
    /// Takes a lease for a request of `tokens` prompt tokens, all of which the upstream has to prefill.
    pub fn take(upstream: Arc<Upstream>, tokens: u64) -> Self {
        upstream.gauges.active.fetch_add(1, Relaxed);
        upstream.gauges.backlog.fetch_add(tokens, Relaxed);
        upstream.gauges.context.fetch_add(tokens, Relaxed);
        Lease { upstream, tokens, waiting: true }
    }

    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// The first byte of the answer's body came: the prefill is done. Returns whether it was the first.
    pub fn first_byte(&mut self) -> bool {
        let first = std::mem::take(&mut self.waiting);
        if first {
            self.upstream.gauges.backlog.fetch_sub(self.tokens, Relaxed);
        }
        first
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.first_byte();
        self.upstream.gauges.context.fetch_sub(self.tokens, Relaxed);
        self.upstream.gauges.active.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::upstream::Load;
    use super::*;
    use crate::config::types::{UpstreamConfig, UpstreamUrl};
    use proptest::prelude::*;

    fn upstream() -> Arc<Upstream> {
        let url =
            UpstreamUrl { https: false, host: "gpu".into(), port: 1, unix: None, prefix: String::new() };
        Arc::new(Upstream::new(0, UpstreamConfig::new(url)).expect("it needs no file"))
    }

    #[test]
    fn the_backlog_ends_with_the_first_byte_and_the_rest_with_the_lease() {
        let upstream = upstream();
        let mut lease = Lease::take(upstream.clone(), 700);
        assert_eq!(upstream.load(), Load { active: 1, backlog: 700, context: 700 });
        assert!(lease.first_byte());
        assert!(!lease.first_byte());
        assert_eq!(upstream.load(), Load { active: 1, backlog: 0, context: 700 });
        drop(lease);
        assert_eq!(upstream.load(), Load::default());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take(u64),
        FirstByte(prop::sample::Index),
        Drop(prop::sample::Index),
        Panic(prop::sample::Index),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0u64..1 << 40).prop_map(Step::Take),
            any::<prop::sample::Index>().prop_map(Step::FirstByte),
            any::<prop::sample::Index>().prop_map(Step::Drop),
            any::<prop::sample::Index>().prop_map(Step::Panic),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn leases_go_back_to_zero_after_any_sequence_of_outcomes(steps in steps()) {
            let upstream = upstream();
            let mut held: Vec<Lease> = Vec::new();
            for step in steps {
                match step {
                    Step::Take(tokens) => held.push(Lease::take(upstream.clone(), tokens)),
                    Step::FirstByte(at) if !held.is_empty() => {
                        let at = at.index(held.len());
                        held[at].first_byte();
                    }
                    Step::Drop(at) if !held.is_empty() => drop(held.swap_remove(at.index(held.len()))),
                    Step::Panic(at) if !held.is_empty() => {
                        let lease = held.swap_remove(at.index(held.len()));
                        let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
                            let _held = lease;
                            std::panic::resume_unwind(Box::new("a request's task died"));
                        }));
                        prop_assert!(unwound.is_err());
                    }
                    _ => {}
                }
                prop_assert_eq!(upstream.load().active, held.len() as u64);
                let context: u64 = held.iter().map(|lease| lease.tokens).sum();
                prop_assert_eq!(upstream.load().context, context);
            }
            drop(held);
            prop_assert_eq!(upstream.load(), Load::default());
        }
    }
}
