//! Messages: blocks become a chat's messages, and a chat's answer becomes blocks, as vLLM 0.32's own
//! `/v1/messages` does both.
//!
//! Fields that vLLM does not have there are dropped, as vLLM drops them. What it has no answer for is
//! refused: blocks and tools of other types, images that are in a store of files. What only the engine can
//! find out is taken as for most chat templates: `thinking: disabled` is `reasoning_effort: none`, and system
//! messages stay where they stand.

mod answer;
mod blocks;
mod events;
mod history;
mod request;
mod tools;

pub(super) use self::answer::{count, error, whole};
pub(super) use self::blocks::MessageBuilder;
pub(super) use self::events::MessageEvents;
pub(super) use self::request::{translate, translate_count};
