//! Reads the token usage, the id and the failure that an answer reports.
//!
//! The answer passes by in chunks that are cut anywhere; a [`UsageMeter`] reads each and keeps a few numbers.
//! Where the interfaces say it:
//!
//! - chat, completions, generate and pooling in `usage`: `prompt_tokens`, `completion_tokens`,
//!   `prompt_tokens_details.cached_tokens`, `completion_tokens_details.reasoning_tokens`;
//! - Responses in `usage`, in streams that of the event's `response`: `input_tokens`, `output_tokens`,
//!   `input_tokens_details.cached_tokens`, `output_tokens_details.reasoning_tokens`;
//! - Messages in `usage`, in streams of the event or of its `message`: `output_tokens`, and a prompt in three
//!   parts, `input_tokens`, `cache_read_input_tokens` (what was cached) and `cache_creation_input_tokens`.
//!
//! A stream fails by an event with an `error` in it, or in its `response`, or one of the type `error` or
//! `response.failed`. As each is the last that there is, nothing behind it is needed to tell.
//!
//! What is not said, or said to be null, is unknown and never 0. Of two numbers the later counts: a stream
//! may tell its usage again and again, and a message's first event knows nothing of the cache yet. An
//! object that is cut off before its end says nothing.
//!
//! JSON is read as JSON, so a text that quotes a usage is a text. Of a stream, only events that hold one of
//! three words are read so; the others are passed over at the speed of memory. Keys are known as every
//! engine writes them: without escapes. A line of `data` is a document; engines write each on one line.
//!
//! Never: hold a byte back, allocate for a chunk, keep more than one name, fail.

mod json;

use std::sync::LazyLock;

use memchr::memmem::Finder;

use self::json::UsageDocument;
use super::media_type;
use crate::sse::{LineSplitter, SsePiece, count_work};

/// Numbers of tokens; what is unknown is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The whole prompt, what was cached included.
    pub prompt_tokens: Option<u64>,
    pub cached_tokens: Option<u64>,
    /// What was generated, reasoning included.
    pub output_tokens: Option<u64>,
    pub reasoning_tokens: Option<u64>,
}

/// An error that a stream reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamError {
    /// A status of HTTP, where the interface says one.
    pub code: Option<u16>,
}

/// Reads one answer. See the module.
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
        /// The line in progress is one of data, and is read in pieces.
        is_data: bool,
    },
}

/// A byte-order mark and `data:`: whether a line is one of data. What follows is read as it comes.
const MAX_HEAD_BYTES: usize = 8;

/// The shortest of the words that tell that an event may say something.
const MIN_WORD_BYTES: usize = "\"usage\"".len();

/// Up to here, a chunk in which one event says something is read without a search in each of its events.
const MAX_READ_BYTES: usize = 1 << 10;

/// The readings of the documents so far.
#[derive(Debug, Default)]
struct MeterReadings {
    counts: UsageCounts,
    id: Option<Box<str>>,
    failure: Option<StreamError>,
}

/// The numbers of a usage under the names that they have.
#[derive(Clone, Copy, Debug, Default)]
struct UsageCounts {
    prompt: Option<u64>,
    input: Option<u64>,
    cache_read: Option<u64>,
    cache_creation: Option<u64>,
    cached: Option<u64>,
    output: Option<u64>,
    reasoning: Option<u64>,
}

// === impl Meter ===

impl UsageMeter {
    /// For an answer of this type; `None` for one that has no usage to tell, such as sound.
    pub fn of(content_type: Option<&str>) -> Option<Self> {
        let media = media_type(content_type);
        let form = if media.eq_ignore_ascii_case("text/event-stream") {
            MeterInput::Events { lines: LineSplitter::new(MAX_HEAD_BYTES), is_data: false }
        } else if media.eq_ignore_ascii_case("application/json") {
            MeterInput::Document
        } else {
            return None;
        };
        Some(UsageMeter { form, document: UsageDocument::default(), found: MeterReadings::default() })
    }

    /// Takes note of the next chunk.
    pub fn feed(&mut self, chunk: &[u8]) {
        let MeterInput::Events { lines, is_data } = &mut self.form else {
            return self.document.feed(chunk, &mut self.found);
        };
        let mut rest = chunk;
        // Most chunks are whole events that say nothing that is kept: one search finds that out.
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
                // Too short to say anything, or the end of a line that was cut.
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

    /// What is known by now.
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

    /// The answer's own id, unless it is an unusually long one.
    pub fn id(&self) -> Option<&str> {
        self.found.id.as_deref()
    }

    /// What a stream failed by. A document has a status for that.
    pub fn failure(&self) -> Option<StreamError> {
        self.found.failure.filter(|_| matches!(self.form, MeterInput::Events { .. }))
    }
}

/// Whether an event may say something that is kept. It must not miss what reading it would find.
fn may_have_readings(data: &[u8]) -> bool {
    static WORDS: LazyLock<[Finder<'static>; 3]> =
        LazyLock::new(|| ["\"usage\"", "\"error\"", "\"response.failed\""].map(Finder::new));
    let is_said = |word: &Finder<'_>| {
        let mut ends = word.find_iter(data).map(|at| at + word.needle().len());
        ends.any(|end| !data[end..].starts_with(b":null"))
    };
    count_work(data.len());
    data.len() > MIN_WORD_BYTES && WORDS.iter().any(is_said)
}

// === impl Found ===

impl MeterReadings {
    /// An error was told of, of which more may follow.
    fn fail(&mut self) {
        self.failure.get_or_insert_default();
    }
}

// === impl Failure ===

impl StreamError {
    /// The status that the answer would have had, had it not begun as a good one.
    pub fn status(self) -> u16 {
        self.code.unwrap_or(500)
    }
}

// === impl Counts ===

impl UsageCounts {
    /// What `later` says counts.
    fn update(&mut self, later: &UsageCounts) {
        self.prompt = later.prompt.or(self.prompt);
        self.input = later.input.or(self.input);
        self.cache_read = later.cache_read.or(self.cache_read);
        self.cache_creation = later.cache_creation.or(self.cache_creation);
        self.cached = later.cached.or(self.cached);
        self.output = later.output.or(self.output);
        self.reasoning = later.reasoning.or(self.reasoning);
    }
}

#[cfg(test)]
mod tests;
