//! Reads the token usage, the id and the failure that an answer reports.
//!
//! The answer arrives in chunks that are cut anywhere; a [`UsageMeter`] reads each and keeps a few numbers.
//! The interfaces report usage in these fields:
//!
//! - chat, completions, generate and pooling in `usage`: `prompt_tokens`, `completion_tokens`,
//!   `prompt_tokens_details.cached_tokens`, `completion_tokens_details.reasoning_tokens`;
//! - Responses in `usage`, in streams that of the event's `response`: `input_tokens`, `output_tokens`,
//!   `input_tokens_details.cached_tokens`, `output_tokens_details.reasoning_tokens`;
//! - Messages in `usage`, in streams of the event or of its `message`: `output_tokens`, and a prompt in three
//!   parts, `input_tokens`, `cache_read_input_tokens` (what was cached) and `cache_creation_input_tokens`.
//!
//! A stream fails by an event with an `error` in it or in its `response`, or of the type `error` or
//! `response.failed`. Such an event is the last one of its stream.
//!
//! A number that is absent or null is unknown, never 0. Of two numbers the later counts: a stream may report
//! its usage many times, and the first event of a message does not include the cache yet. An object that is
//! cut off before its end is ignored.
//!
//! JSON is parsed, so a text that quotes a usage stays a text. In a stream only events that contain one of
//! three words are parsed; the others are skipped at the speed of memory. Keys are recognised as every
//! engine writes them: without escapes. A line of `data` is a document; engines write each on one line.
//!
//! Never: delay a byte, allocate for a chunk, keep more than one name, fail.

mod json;
mod readings;

use std::sync::LazyLock;

use memchr::memmem::Finder;

use self::json::UsageDocument;
use self::readings::MeterReadings;
pub use self::readings::StreamError;
use super::{is_event_stream, media_type};
use crate::sse::{LineSplitter, SsePiece, count_work};

/// The token counts that an answer reports; unknown ones are `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The whole prompt, cached tokens included.
    pub prompt_tokens: Option<u64>,
    pub cached_tokens: Option<u64>,
    /// The generated tokens, reasoning included.
    pub output_tokens: Option<u64>,
    pub reasoning_tokens: Option<u64>,
}

/// The field in which an answer reports cached tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CachedTokensField {
    /// `prompt_tokens_details.cached_tokens`.
    PromptDetails,
    /// `cache_read_input_tokens`.
    CacheRead,
}

/// Reads the usage, the id and the failure of one answer.
#[derive(Debug)]
pub struct UsageMeter {
    form: MeterInput,
    document: UsageDocument,
    found: MeterReadings,
}

#[derive(Debug)]
enum MeterInput {
    /// One document of JSON.
    Document,
    /// A stream of events, of which each line of data is a document.
    Events {
        lines: LineSplitter,
        /// The line in progress is a `data` line, which is read in pieces.
        is_data: bool,
    },
}

/// The bytes that decide whether a line is a `data` line: a byte-order mark and `data:`.
const MAX_HEAD_BYTES: usize = 8;

/// The length of the shortest word by which an event is selected for parsing.
const MIN_WORD_BYTES: usize = "\"usage\"".len();

/// The largest chunk that is parsed as a whole, without a search in each event, if one of its events may
/// have a reading.
const MAX_READ_BYTES: usize = 1 << 10;

// === impl UsageMeter ===

impl UsageMeter {
    /// Creates a meter for an answer of this type; `None` for types without usage, such as sound.
    pub fn of(content_type: Option<&str>) -> Option<Self> {
        let media = media_type(content_type);
        let form = if is_event_stream(content_type) {
            MeterInput::Events { lines: LineSplitter::new(MAX_HEAD_BYTES), is_data: false }
        } else if media.eq_ignore_ascii_case("application/json") {
            MeterInput::Document
        } else {
            return None;
        };
        Some(UsageMeter { form, document: UsageDocument::default(), found: MeterReadings::default() })
    }

    /// Reads the next chunk.
    pub fn feed(&mut self, chunk: &[u8]) {
        let MeterInput::Events { lines, is_data } = &mut self.form else {
            return self.document.feed(chunk, &mut self.found);
        };
        let mut rest = chunk;
        // Most chunks are complete events without a value to keep, which a single search shows.
        let (mut may_skip, mut is_told) = (self.found.id.is_some(), false);
        loop {
            if may_skip && lines.is_between_lines() {
                may_skip = false;
                let (front, behind) = lines.split_whole(rest);
                if may_have_readings(front) {
                    is_told = front.len() <= MAX_READ_BYTES;
                } else {
                    lines.skip(front);
                    rest = behind;
                }
            }
            let Some(piece) = lines.next(&mut rest) else { return };
            match piece {
                // Too short for a value, or the end of a line that was cut.
                SsePiece::Line(_) | SsePiece::LineFeed => {}
                SsePiece::Long { part, begins: true, ends } => {
                    let data = part.data().map(|span| &part.raw()[span]);
                    *is_data = !ends && data.is_some();
                    let is_read =
                        |data: &&[u8]| !ends || is_told || self.found.id.is_none() || may_have_readings(data);
                    if let Some(data) = data.filter(is_read) {
                        self.document = UsageDocument::default();
                        self.document.feed(data, &mut self.found);
                    }
                }
                SsePiece::Long { part, begins: false, .. } if *is_data => {
                    self.document.feed(part.text(), &mut self.found);
                }
                SsePiece::Long { .. } => {}
            }
        }
    }

    /// The usage reported so far.
    pub fn usage(&self) -> Usage {
        let counts = &self.found.counts;
        let apart = [counts.cache_read, counts.cache_creation];
        let whole = |input| apart.into_iter().flatten().try_fold(input, u64::checked_add);
        Usage {
            prompt_tokens: counts.prompt.or_else(|| counts.input.and_then(whole)),
            cached_tokens: counts.cached.or(counts.cache_read),
            output_tokens: counts.output,
            reasoning_tokens: counts.reasoning,
        }
    }

    /// The field in which the answer reports cached tokens, or would; `None` for answers without a prompt in
    /// their usage, and for Responses, which always report them.
    pub fn cached_tokens_field(&self) -> Option<CachedTokensField> {
        let counts = &self.found.counts;
        match (counts.prompt, counts.input, counts.cached) {
            (Some(_), ..) => Some(CachedTokensField::PromptDetails),
            (None, Some(_), None) => Some(CachedTokensField::CacheRead),
            _ => None,
        }
    }

    /// The answer's own id, unless it is longer than the limit.
    pub fn id(&self) -> Option<&str> {
        self.found.id.as_deref()
    }

    /// The error that ended a stream. A single document has a status instead.
    pub fn failure(&self) -> Option<StreamError> {
        self.found.failure.filter(|_| matches!(self.form, MeterInput::Events { .. }))
    }
}

/// Whether an event may have a value to keep. False positives cost time; false negatives would lose a value.
fn may_have_readings(data: &[u8]) -> bool {
    static WORDS: LazyLock<[Finder<'static>; 3]> =
        LazyLock::new(|| ["\"usage\"", "\"error\"", "\"response.failed\""].map(Finder::new));
    // A null says nothing. In what is no JSON, a value may stand before it, which counts.
    let is_null = |start: usize, end: usize| {
        matches!(data[..start].last(), Some(b'{' | b',')) && data[end..].starts_with(b":null")
    };
    let is_said =
        |word: &Finder<'_>| word.find_iter(data).any(|start| !is_null(start, start + word.needle().len()));
    count_work(data.len());
    data.len() > MIN_WORD_BYTES && WORDS.iter().any(is_said)
}

#[cfg(test)]
mod tests;
