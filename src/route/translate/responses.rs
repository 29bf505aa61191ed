//! Responses: items of an input become a chat's messages, and a chat's answer becomes items of an output.
//!
//! A field that a chat does not have is dropped where the engine ignores it too (`store`, `include` of what
//! OpenAI keeps), and rejected where the client relies on it (OpenAI's own tools, a stored response). Fields
//! in no list are passed on by their names: sampling fields are vLLM's own.

mod answer;
mod events;
mod items;
mod request;
mod response;

pub(super) use self::answer::whole;
pub(super) use self::events::ResponseEvents;
pub(super) use self::request::translate;
pub(super) use self::response::{RequestEcho, ResponseBuilder};
