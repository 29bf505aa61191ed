//! JSON as it is read on the way of a request: where values stand, never a tree of them.
//!
//! | core | reads | for |
//! | --- | --- | --- |
//! | [`GrowingObject`] | a buffer that grows, going on where it stopped | bodies that are peeked at |
//! | [`value_end`], [`walk`], [`each`], [`JsonCursor`] | a slice that may be cut | prompts, edits |
//! | [`ChunkWalker`] | chunks that pass by and are not kept | answers, bodies behind a peek |
//!
//! They agree on what JSON is, and on where each value ends: there is one rule for white space
//! ([`skip_space`]), one for strings ([`string_end`]), one grammar of numbers and literals (`scalar`)
//! and one decoding of escapes ([`unescape`], [`decode`]). What serde_json reads they read as serde_json
//! does. They are laxer in four things, and in no other:
//!
//! - inside an object or array that is skipped, only quotes and brackets are examined, and the kinds of
//!   brackets are not compared;
//! - in strings, escapes and control characters are not checked, nor is UTF-8;
//! - `NaN`, `Infinity` and `-Infinity` are numbers, as for Python;
//! - a byte-order mark may stand before a whole document ([`document`], [`GrowingObject`]).
//!
//! The upstream refuses what is wrong there, in its own words; no reading is ever a reason to drop a body.
//!
//! Never: recursion, a copy of a value, a panic, a byte that is examined more than a bounded number of times.

mod bytes;
mod chunks;
mod cursor;
mod growing;
mod minify;
mod object;
mod scalar;
mod slice;
mod space;
mod text;
pub(crate) mod work;

pub(crate) use self::bytes::{WINDOW_BYTES, string_end, windows};
pub(crate) use self::chunks::{ChunkVisitor, ChunkWalker};
pub(crate) use self::cursor::{EndOfJson, JsonCursor, JsonList, ObjectSlots, RawValue, each};
pub use self::growing::ScanProgress;
pub(crate) use self::growing::{
    ContainerSkip, GrowingObject, GrownValue, MemberKind, MemberSink, ValueMeter,
};
pub(crate) use self::minify::Minifier;
pub(crate) use self::object::{
    JsonMember, JsonObject, document, document_with, inside, is_empty_list, is_empty_object, items, object,
    read_object, text,
};
pub(crate) use self::scalar::ScalarKind;
pub(crate) use self::slice::{
    JsonResult, MAX_KEY_BYTES, MAX_MEMBERS, ReadFault, Span, has_at_most, read_value, value_end,
    visit_structure, walk, walk_raw, walk_rest,
};
pub(crate) use self::space::{is_space, skip_space, trim_end};
pub(crate) use self::text::{
    ByteSink, ShortText, code_unit, decode, escape, is_undecided, lone_unit, unescape,
};

/// Whether Python would read this body as UTF-16 or UTF-32, by a mark or by the zeros in its first four
/// bytes. Such a body is not followed here. In UTF-8 no JSON has a zero there.
pub fn is_wide(body: &[u8]) -> bool {
    body.starts_with(b"\xff\xfe")
        || body.starts_with(b"\xfe\xff")
        || body.iter().take(4).any(|byte| *byte == 0)
}

#[cfg(test)]
mod tests;
