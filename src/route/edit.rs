//! One edit of a request's body as a value: it can run on any thread, and its memory is known in advance.
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
use super::translate::{self, ChatTranslation};
use super::virtual_models::RoutePlan;
use crate::prompt::scan::Scanner;
use crate::reject::Reject;

/// The largest body, in bytes, that is edited on its request's own thread: this takes a millisecond at most.
pub const MAX_WORKER_BYTES: usize = 256 << 10;

/// The same for edits that examine every message or parse the body into a tree.
pub const MAX_WORKER_TREE_BYTES: usize = 32 << 10;

/// The edit of one body.
#[derive(Debug)]
pub struct BodyEdit {
    pub plan: Arc<RoutePlan>,
    /// The dialect that the upstreams receive.
    pub upstream_dialect: BodyDialect,
    /// The `content-type` of a body that is a form.
    pub form: Option<String>,
    /// The translation, if the upstreams receive another dialect than the client's.
    pub translation: Option<ChatTranslation>,
    /// The scanner that has read the body.
    pub scanner: Option<Scanner>,
}

/// The result of an edit.
#[derive(Debug)]
pub struct EditedBody {
    /// The edited body; `None`: the body is forwarded unchanged.
    pub body: Option<Vec<u8>>,
    pub added_fields: AddedAnswerFields,
    /// The translation of the answer.
    pub translation: Option<ChatTranslation>,
}

impl BodyEdit {
    fn edits(&self) -> &BodyRewrite {
        self.plan.edits(self.upstream_dialect)
    }

    /// The most memory that `run` takes beside a body of `body_len` bytes, the new body included.
    pub fn memory_needed(&self, body_len: usize) -> u64 {
        let translation = match &self.translation {
            // The translated chat is edited too, and can be larger.
            Some(_) => translate::memory_needed(body_len),
            None => 0,
        };
        let edited_len = if self.translation.is_some() { translate::chat_bytes(body_len) } else { body_len };
        translation + self.edits().memory_needed(edited_len)
    }

    /// Whether the edit of a body of `body_len` bytes takes too long for a thread that serves other requests.
    pub fn leaves_worker(&self, body_len: usize) -> bool {
        let reads_all = self.translation.is_some() || self.edits().reads_all();
        body_len > if reads_all { MAX_WORKER_TREE_BYTES } else { MAX_WORKER_BYTES }
    }

    /// Runs the edit. `Err`: the body cannot be translated for the upstreams of its route, or is too large.
    pub fn run(mut self, body: &Bytes) -> Result<EditedBody, Reject> {
        if self.scanner.is_some() && is_wide(body) {
            return Err(wide());
        }
        let tags = self.plan.route.think_tags;
        let chat = match &mut self.translation {
            Some(exchange) => exchange.request(body, tags)?,
            None => None,
        };
        // The scanner has not read the translated body.
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

/// The reject of JSON in UTF-16 or UTF-32, which engines read and the balancer does not.
pub fn wide() -> Reject {
    Reject::Field { param: "body".into(), message: "The body must be JSON in UTF-8.".into() }
}

#[cfg(test)]
mod tests;
