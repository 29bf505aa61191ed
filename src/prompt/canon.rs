//! The canonical prompt of a request, out of a body that may be cut, and its chain of hashes.
//!
//! Two requests whose prompts have a common beginning for an engine have a common beginning in the canonical
//! text, independent of JSON notation and of the interface (chat, responses, messages): an agent that changes
//! its interface keeps its cache. No intermediate form is built; text is hashed in place in the body, block
//! by block, unless it is escaped in an unusual way.
//!
//! # The text
//! The seed of the chain: the family (conversation, text, token ids), the model's name, `cache_salt`,
//! `chat_template`, and where they are given `previous_response_id` and the hashes of multimodal features.
//! Then the following pieces, each after a control byte that gives its kind:
//! 1. the system's text: `instructions`, `system`, and the messages of `system` or `developer` in front;
//! 2. tools: name, description, schema in its shortest form with the order of its keys kept;
//! 3. `documents` in their shortest form;
//! 4. messages: role, content, calls, name. Texts are in one form, independent of escapes in the body: only
//!    characters that JSON must escape are escaped, in the shortest way. The parts of one message are joined
//!    by a line feed (Anthropic's `system` by nothing, as vLLM does). A picture is a hash of its URL, data or
//!    `uuid` and weighs [`MEDIA_WEIGHT_BYTES`](super::chain::MEDIA_BYTES). A call is a name and arguments in
//!    their shortest form, a result is a turn of the tool.
//!
//! A text prompt is its text, a prompt of token ids is four bytes for each id; of a batch the first prompt
//! counts.
//!
//! Left out, because it is random or no prompt: ids, `status`, `cache_control`, `encrypted_content`,
//! Claude Code's billing line, reasoning (templates drop it from past turns), sampling. Left out although
//! templates may read it: `reasoning_effort`, `chat_template_kwargs`, `tool_choice`. A wrong guess there
//! costs an estimate; another seed would cost the cache. An empty text is no turn.
//!
//! # A body that is cut
//! The chain is a prefix of the whole body's chain, if the order in the body is that of the text. Tools,
//! `system` and documents after the conversation count if they are complete, and are left out otherwise: a
//! body whose tools are after the cut has a chain without them. Without a byte of the conversation, a cut
//! body has no chain. The last message is written up to its first unknown piece: a message whose role
//! follows its content is written once it is complete.
//!
//! # How to use it
//! ```
//! use vllm_lb::prompt::canon::{PromptDialect, PromptReader, PromptSource};
//! use vllm_lb::prompt::chain::BlockLayout;
//! use vllm_lb::prompt::scan::Scanner;
//!
//! let body = br#"{"model":"llama","messages":[{"role":"user","content":"Hello"#;
//! let mut scanner = Scanner::new();
//! scanner.scan(body);
//! let mut reader = PromptReader::default(); // keeps its buffers from one request to the next
//! let blocks = BlockLayout { bytes: 4, max_blocks: 1000 };
//! let request = PromptSource { dialect: PromptDialect::Chat, model: "llama", body, scanner: &scanner };
//! let known = reader.read(&request, blocks).clone();
//! assert_eq!((known.blocks.len(), known.bytes), (2, 11));
//!
//! // Later, while the body streams past.
//! if let Some(at) = reader.resume_offset() {
//!     reader.resume(&body[at..]);
//!     reader.resume(br#" world"}]}"#);
//! }
//! assert!(reader.chain().blocks.starts_with(&known.blocks));
//! assert_eq!(reader.chain().bytes, 17);
//! ```
//!
//! Never: a tree of the document, an allocation for a message, recursion, a panic.

mod continuation;
mod ids;
mod media;
mod plain_message;
mod text;
mod text_form;
mod turns;

use self::continuation::{CutPlace, CutPoint, PromptContinuation};
use self::text_form::write_text;
use self::turns::{ConversationHead, ConversationWriter, LINE_FEED};
use super::chain::{BlockLayout, Chain, ChainHasher, PromptFamily, TextDigest, TextSink};
use super::scan::{BodyField, ScanProgress, Scanner};
use crate::json::{ByteSink, JsonCursor, Minifier, RawValue, decode, skip_space};

/// The version of the canonical text and of its hashes. Raised by every change after which some prompt has
/// other hashes: balancers with different versions do not share chains.
pub const FORM_VERSION: u32 = 1;

/// The form in which a body carries its prompt. Other interfaces have no chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptDialect {
    /// `messages`, also as a batch of conversations, whose first one counts.
    Chat,
    /// `instructions` and `input`.
    Responses,
    /// `system` and `messages`.
    Messages,
    /// `prompt`, `prompt_embeds`.
    Completions,
    /// `token_ids`.
    Generate,
}

/// The input of a prompt reader.
#[derive(Clone, Copy)]
pub struct PromptSource<'a> {
    pub dialect: PromptDialect,
    /// The upstream's name of the model, or of a LoRA adapter: the caches of two models share nothing.
    pub model: &'a str,
    pub body: &'a [u8],
    /// The scanner that has scanned the body.
    pub scanner: &'a Scanner,
}

/// Reads prompts, one after the other.
#[derive(Debug, Default)]
pub struct PromptReader {
    hasher: ChainHasher,
    stop: Option<CutPoint>,
    rest: PromptContinuation,
}

// === impl PromptReader ===

impl PromptReader {
    /// Reads the chain of the available part of a body.
    pub fn read(&mut self, request: &PromptSource<'_>, blocks: BlockLayout) -> &Chain {
        let family = request.family();
        self.hasher.begin(request.seed(family), family, blocks);
        self.rest.clear();
        self.stop = request.write(&mut self.hasher);
        self.hasher.chain()
    }

    pub fn chain(&self) -> &Chain {
        self.hasher.chain()
    }

    /// The offset in the body at which [`resume`](Self::resume) continues; `None` when the chain ends here.
    pub fn resume_offset(&self) -> Option<usize> {
        self.stop.map(|stop| stop.at)
    }

    /// Reads the next piece of a cut body. False when no further piece is needed.
    ///
    /// At most one message of a mebibyte is held. The chain keeps all its blocks, unless a message has the
    /// same key twice.
    pub fn resume(&mut self, piece: &[u8]) -> bool {
        let Some(stop) = self.stop else { return false };
        if !self.rest.resume(stop.place, piece, &mut self.hasher) {
            self.stop = None;
            self.rest.clear();
        }
        self.stop.is_some()
    }
}

// === impl Request ===

/// Where a prompt that is no conversation begins.
enum PromptStart<'a> {
    Text(RawValue<'a>),
    /// After the bracket of the list.
    Ids(&'a [u8]),
}

impl<'a> PromptSource<'a> {
    fn raw(&self, field: BodyField) -> Option<(usize, RawValue<'a>)> {
        let (range, whole) = self.scanner.seen(field)?;
        let bytes = self.body.get(range.clone())?;
        (bytes != b"null").then_some((range.start, RawValue { bytes, whole }))
    }

    fn whole(&self, field: BodyField) -> Option<RawValue<'a>> {
        self.raw(field).map(|(_, raw)| raw).filter(|raw| raw.whole)
    }

    fn family(&self) -> PromptFamily {
        match self.dialect {
            PromptDialect::Chat | PromptDialect::Responses | PromptDialect::Messages => PromptFamily::Chat,
            PromptDialect::Generate => PromptFamily::Tokens,
            PromptDialect::Completions => match self.start(BodyField::Prompt) {
                Some((_, PromptStart::Ids(_))) => PromptFamily::Tokens,
                _ => PromptFamily::Text,
            },
        }
    }

    /// Hashes everything that is certain to separate two caches.
    fn seed(&self, family: PromptFamily) -> u64 {
        // No text holds this byte, so no two lists of texts are the same bytes.
        const BREAK: &[u8] = b"\xff";
        let mut digest = TextDigest::default();
        digest.write(match family {
            PromptFamily::Chat => b"chat",
            PromptFamily::Text => b"text",
            PromptFamily::Tokens => b"tokens",
        });
        digest.write(BREAK);
        digest.write(self.model.as_bytes());
        for field in [BodyField::CacheSalt, BodyField::ChatTemplate, BodyField::PreviousResponseId] {
            digest.write(BREAK);
            if let Some(text) = self.whole(field).and_then(RawValue::string) {
                decode(text, true, &mut digest);
            }
        }
        digest.write(BREAK);
        if let (PromptDialect::Generate, Some(features)) = (self.dialect, self.whole(BodyField::Features)) {
            let features = JsonCursor::new(features.bytes).object(&["mm_hashes"]);
            if let Ok(Some(hashes)) = features.get(0) {
                Minifier::new(&mut digest).write(hashes.bytes);
            }
        }
        digest.hash()
    }

    /// Writes the canonical text. Returns the place at which it can continue, if any.
    fn write<S: TextSink>(&self, out: &mut S) -> Option<CutPoint> {
        match self.dialect {
            PromptDialect::Chat => self.conversation(BodyField::Messages, None, out),
            PromptDialect::Responses => {
                let instructions = self.whole(BodyField::Instructions).map(|raw| (raw, LINE_FEED));
                self.conversation(BodyField::Input, instructions, out)
            }
            PromptDialect::Messages => {
                let system = self.whole(BodyField::System).map(|raw| (raw, &b""[..]));
                self.conversation(BodyField::Messages, system, out)
            }
            PromptDialect::Completions => {
                if let Some(embeds) = self.whole(BodyField::PromptEmbeds) {
                    media::write(b"embeds", embeds, out);
                }
                self.plain(BodyField::Prompt, out)
            }
            PromptDialect::Generate => self.plain(BodyField::TokenIds, out),
        }
    }

    fn conversation<S: TextSink>(
        &self,
        field: BodyField,
        system: Option<(RawValue<'a>, &'static [u8])>,
        out: &mut S,
    ) -> Option<CutPoint> {
        let said = self.raw(field);
        if said.is_none() && self.scanner.progress() == ScanProgress::Cut {
            return None;
        }
        let head = ConversationHead {
            tools: self.whole(BodyField::Tools),
            documents: self.whole(BodyField::Documents),
        };
        let is_bare = head.tools.is_none() && head.documents.is_none();
        let mut talk = ConversationWriter { out, head: Some(head), in_user_turn: false };
        if let Some((text, join)) = system {
            talk.system(text, join);
        }
        let Some((start, raw)) = said else {
            talk.end_head();
            return None;
        };
        if let Some(text) = raw.string() {
            let used = talk.user(text, raw.whole);
            let at = start + 1 + used;
            return (!raw.whole && !text.is_empty()).then_some(CutPoint { at, place: CutPlace::Text });
        }
        let batch = first_conversation(raw.bytes);
        let Err(at) = talk.list(&raw.bytes[batch..]) else {
            talk.end_head();
            return None;
        };
        let can_resume = !raw.whole && (is_bare || talk.head.is_none());
        can_resume.then_some(CutPoint { at: start + batch + at, place: CutPlace::Elements })
    }

    /// A prompt of text or token ids, and where its value begins in the body.
    fn start(&self, field: BodyField) -> Option<(usize, PromptStart<'a>)> {
        let (start, raw) = self.raw(field)?;
        let mut cursor = JsonCursor::new(raw.bytes);
        let mut byte = cursor.byte().ok()?;
        for _ in 0..2 {
            if byte == b'[' {
                cursor.at += 1;
                byte = cursor.byte().ok()?;
            }
        }
        let at = cursor.at;
        match byte {
            b'"' => Some((start + at, PromptStart::Text(cursor.value().ok()?))),
            b'0'..=b'9' if at > 0 => Some((start + at, PromptStart::Ids(&raw.bytes[at..]))),
            _ => None,
        }
    }

    fn plain<S: TextSink>(&self, field: BodyField, out: &mut S) -> Option<CutPoint> {
        let (start, prompt) = self.start(field)?;
        match prompt {
            PromptStart::Text(_) if self.dialect == PromptDialect::Generate => None,
            PromptStart::Text(raw) => {
                let used = write_text(raw.string()?, raw.whole, out);
                (!raw.whole).then_some(CutPoint { at: start + 1 + used, place: CutPlace::Text })
            }
            PromptStart::Ids(bytes) => {
                let read = ids::write(bytes, out);
                (!read.over).then_some(CutPoint { at: start + read.used, place: CutPlace::Ids })
            }
        }
    }
}

/// Where the list of messages begins: a batch is a list of such lists.
fn first_conversation(bytes: &[u8]) -> usize {
    let inner = skip_space(bytes, 1);
    if bytes.first() == Some(&b'[') && bytes.get(inner) == Some(&b'[') { inner } else { 0 }
}

#[cfg(test)]
mod tests;
