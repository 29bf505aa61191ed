//! What capturing a call changes in its request and undoes in its answer.
//!
//! - [`session_edit`] sets the parameters of a session and its model in a body.
//! - [`capture_question`] requests log-probabilities and token ids where the client did not decide on them.
//! - [`AnswerCleanup`] puts these fields back to the `null` that vLLM writes without the request, and reports
//!   when the content of an answer is complete.
//!
//! After the cleanup an answer has the bytes of one that was not captured. A refusal stays as it is: where it
//! counts the fields of the body, it counts the added ones.
//!
//! Never: a tree of a body or an answer, a change to bytes that are no value of a named field.

mod cleanup;
mod document;
mod question;
mod session;
mod terminal;

pub use cleanup::{AnswerCleanup, CleanedPiece};
pub use question::{CaptureQuestion, capture_question};
pub use session::{memory_needed, session_edit};

#[cfg(test)]
mod tests;
