//! The `usage` of each kind of answer: the same numbers, with the fields that vLLM sets there.

use serde_json::{Value, json};

/// The token counts of an answer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AnswerUsage {
    pub prompt: usize,
    pub completion: usize,
    /// `None` when the server does not report cached tokens.
    pub cached: Option<usize>,
}

/// When the usage of answers reports cached tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CachedReport {
    Never,
    /// Only where there are any.
    Hits,
    Always,
}

// === impl CachedReport ===

impl CachedReport {
    /// Returns the number that the usage reports.
    pub(super) fn of(self, cached: usize) -> Option<usize> {
        Some(cached)
            .filter(|cached| self == CachedReport::Always || self == CachedReport::Hits && *cached > 0)
    }
}

// === impl AnswerUsage ===

impl AnswerUsage {
    /// Returns the usage of a whole answer; `created` is the API's value for newly cached tokens.
    pub(super) fn whole(&self, created: Value) -> Value {
        let details = self.cached.map(|cached| {
            json!({"cached_tokens": cached, "created_cache_tokens": created, "multimodal_tokens": null})
        });
        let mut usage = self.counts();
        usage["prompt_tokens_details"] = json!(details);
        usage["completion_tokens_details"] = Value::Null;
        usage
    }

    /// Returns the usage in the last chunk of a stream of chat or, without created tokens, of completions.
    pub(super) fn last(&self, created: bool) -> Value {
        let details = self.cached.map(|cached| {
            if created {
                json!({"cached_tokens": cached, "created_cache_tokens": 0})
            } else {
                json!({"cached_tokens": cached})
            }
        });
        let mut usage = self.counts();
        usage["prompt_tokens_details"] = json!(details);
        usage
    }

    /// The `usage` object of chat and completions.
    pub(super) fn counts(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
        })
    }

    /// Returns the usage in every chunk of a stream with `continuous_usage_stats`.
    pub(super) fn running(&self) -> Value {
        let mut usage = self.counts();
        usage["completion_tokens_details"] = Value::Null;
        usage
    }
}
