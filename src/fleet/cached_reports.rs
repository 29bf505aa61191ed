//! Tells a prompt of which nothing was cached from an engine that does not report cached tokens.
//!
//! Engines report them with `--enable-prompt-tokens-details`. vLLM 0.32 then reports 0 as well; older
//! versions leave the number out where it is 0 (`prompt_tokens_details: null`). Were such answers skipped,
//! only hits would count. So once an upstream has reported a number in a field, a whole answer without it
//! means 0. Each field for itself: Responses report cached tokens whatever the flags are.
//!
//! Relaxed atomics: each answer reads them, and only the first number of a process writes.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::reply::usage::{CachedTokensField, Usage};

/// The fields in which one upstream has reported cached tokens.
#[derive(Default)]
pub(super) struct CachedTokenReports {
    prompt_details: AtomicBool,
    cache_read: AtomicBool,
}

impl CachedTokenReports {
    /// Returns the cached tokens of an answer that reports them in `field`. `is_whole`: the answer has ended,
    /// so that no later usage follows. An answer without output, as of an embedding, has no cached tokens to
    /// report.
    pub(super) fn cached_tokens(
        &self,
        usage: &Usage,
        field: Option<CachedTokensField>,
        is_whole: bool,
    ) -> Option<u64> {
        let Some(field) = field else { return usage.cached_tokens };
        let reports = match field {
            CachedTokensField::PromptDetails => &self.prompt_details,
            CachedTokensField::CacheRead => &self.cache_read,
        };
        if usage.cached_tokens.is_some() {
            if !reports.load(Relaxed) {
                reports.store(true, Relaxed);
            }
            return usage.cached_tokens;
        }
        let is_generated = usage.output_tokens.is_some_and(|tokens| tokens > 0);
        (is_whole && is_generated && reports.load(Relaxed)).then_some(0)
    }

    /// Forgets the reports: the process is another one.
    pub(super) fn reset(&self) {
        self.prompt_details.store(false, Relaxed);
        self.cache_read.store(false, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_number_means_none_once_its_field_was_reported() {
        use CachedTokensField::{CacheRead, PromptDetails};
        let reports = CachedTokenReports::default();
        let found = |cached_tokens, field, is_whole, output| {
            let usage = Usage { cached_tokens, output_tokens: Some(output), ..Usage::default() };
            reports.cached_tokens(&usage, field, is_whole)
        };
        assert_eq!(found(Some(9), None, true, 5), Some(9), "a response teaches nothing");
        assert_eq!(found(None, Some(PromptDetails), true, 5), None);
        assert_eq!(found(Some(64), Some(PromptDetails), false, 5), Some(64));
        assert_eq!(found(None, Some(PromptDetails), true, 5), Some(0));
        assert_eq!(found(None, Some(PromptDetails), false, 5), None, "a later event may report them");
        assert_eq!(found(None, Some(PromptDetails), true, 0), None, "an embedding");
        assert_eq!(found(None, Some(CacheRead), true, 5), None, "the other field");
        assert_eq!(found(Some(0), Some(CacheRead), true, 5), Some(0));
        assert_eq!(found(None, Some(CacheRead), true, 5), Some(0));
        assert_eq!(found(None, None, true, 5), None);
        reports.reset();
        for field in [PromptDetails, CacheRead] {
            assert_eq!(found(None, Some(field), true, 5), None, "{field:?} of another process");
        }
    }
}
