//! One edit of a request's body as a value: it can be carried out on any thread, and how much memory it takes
//! is known before.
//!
//! ```text
//! reserve edit.memory_needed(body.len())
//! edit.run(body), on a thread for blocking work if edit.leaves_worker(body.len())
//! ```
//!
//! Never: an await, a thread of its own.

use std::sync::Arc;

use bytes::Bytes;

use super::dialect::BodyDialect;
use super::rewrite::{AddedAnswerFields, BodyRewrite, RewrittenBody, is_wide};
use super::table::RoutePlan;
use super::translate::{self, ChatTranslation};
use crate::prompt::scan::Scanner;
use crate::reject::Reject;

/// Up to this size a body is edited where its request is served, in bytes: that takes a millisecond at most.
pub const MAX_WORKER_BYTES: usize = 256 << 10;

/// The same for edits that look into every message or make a tree of the body.
pub const MAX_WORKER_TREE_BYTES: usize = 32 << 10;

/// What is to be done to a body.
#[derive(Debug)]
pub struct BodyEdit {
    pub plan: Arc<RoutePlan>,
    /// The language that the upstreams are spoken to in.
    pub upstream_dialect: BodyDialect,
    /// The `content-type` of a body that is a form.
    pub form: Option<String>,
    /// The upstreams are spoken to in another language than the client's.
    pub translation: Option<ChatTranslation>,
    /// It has read the body.
    pub scanner: Option<Scanner>,
}

/// What became of it.
#[derive(Debug)]
pub struct EditedBody {
    /// `None`: it goes on as it is.
    pub body: Option<Vec<u8>>,
    pub added_fields: AddedAnswerFields,
    /// Knows now how to translate the answer.
    pub translation: Option<ChatTranslation>,
}

impl BodyEdit {
    fn edits(&self) -> &BodyRewrite {
        self.plan.edits(self.upstream_dialect)
    }

    /// The most memory that `run` takes beside a body of so many bytes, the new body included.
    pub fn memory_needed(&self, body_len: usize) -> u64 {
        let translation = match &self.translation {
            // The chat that is made of it is edited in its turn, and can be larger.
            Some(_) => translate::memory_needed(body_len),
            None => 0,
        };
        let edited_len = if self.translation.is_some() { translate::chat_bytes(body_len) } else { body_len };
        translation + self.edits().memory_needed(edited_len)
    }

    /// Whether editing a body of so many bytes takes longer than other requests should wait for a worker.
    pub fn leaves_worker(&self, body_len: usize) -> bool {
        let reads_all = self.translation.is_some() || self.edits().reads_all();
        body_len > if reads_all { MAX_WORKER_TREE_BYTES } else { MAX_WORKER_BYTES }
    }

    /// The body as it is sent. `Err`: it cannot be said to the upstreams of its route, or is too large.
    pub fn run(mut self, body: &Bytes) -> Result<EditedBody, Reject> {
        if self.scanner.is_some() && is_wide(body) {
            return Err(wide());
        }
        let tags = self.plan.route.think_tags;
        let chat = match &mut self.translation {
            Some(exchange) => exchange.request(body, tags)?,
            None => None,
        };
        // It has not read what the body was made into.
        let scanner = self.scanner.as_ref().filter(|_| chat.is_none());
        let bytes: &[u8] = chat.as_deref().unwrap_or(body);
        let edited = match &self.form {
            Some(kind) => {
                RewrittenBody { body: self.edits().edit_form(kind, bytes), ..RewrittenBody::default() }
            }
            None => self.edits().edit_known(bytes, &|at| scanner?.end_of(at))?,
        };
        let body = edited.body.or(chat);
        if let (Some(exchange), Some(chat)) = (&mut self.translation, &body) {
            exchange.record_sent_chat(chat);
        }
        Ok(EditedBody { body, added_fields: edited.added_fields, translation: self.translation })
    }
}

/// The refusal of JSON in UTF-16 or UTF-32, which engines read and which cannot be followed here.
pub fn wide() -> Reject {
    Reject::Field { param: "body".into(), message: "The body must be JSON in UTF-8.".into() }
}

#[cfg(test)]
mod tests;
