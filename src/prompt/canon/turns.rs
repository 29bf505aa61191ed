//! A conversation in the canonical text: one form for the notations of three interfaces.
//!
//! A message, an item or a block is first scanned as a whole, so that its keys may come in any order, and
//! then written piece by piece. A cut one is written in the canonical order up to its first missing piece.
//!
//! Never: recursion. Messages contain parts, and results of tools contain plain parts; nothing deeper is
//! read.

use super::super::chain::TextSink;
use super::text::without_billing;
use super::text_form::write_text;
use super::{media, plain_message};
use crate::json::{
    ByteSink, EndOfJson, JsonCursor, JsonList, Minifier, ObjectSlots, RawValue, ShortText, decode,
};

/// Begins a turn: the role follows.
const TURN: u8 = 1;
/// Ends a short text that something else follows.
const END: u8 = 2;
/// Begins a call: the name of the tool and the arguments follow.
const CALL: u8 = 4;
/// Begins the description of a tool.
const TOOL: u8 = 5;
/// Begins the name of the speaker of a message.
const NAME: u8 = 6;
/// Begins the documents.
const DOCUMENTS: u8 = 7;

/// Joins the texts of a message, in the form that a text has.
pub(super) const LINE_FEED: &[u8] = b"\\n";

type ItemSlots<'a> = ObjectSlots<'a, 8>;
const ITEM: [&str; 8] = ["role", "type", "content", "tool_calls", "name", "arguments", "input", "output"];
const ITEM_ROLE: usize = 0;
const ITEM_TYPE: usize = 1;
const ITEM_CONTENT: usize = 2;
const TOOL_CALLS: usize = 3;
const ITEM_NAME: usize = 4;
const ITEM_ARGUMENTS: [usize; 2] = [5, 6];
const ITEM_OUTPUT: usize = 7;

/// The values of the known keys of a part, in the order of `PART`.
pub(super) type PartSlots<'a> = ObjectSlots<'a, 16>;
#[rustfmt::skip]
const PART: [&str; 16] = [
    "type", "text", "refusal", "name", "input", "content",
    // The identity of a picture, in order of precedence.
    "uuid", "image_url", "video_url", "audio_url", "input_audio", "source", "file", "file_data", "file_url",
    "file_id",
];
const PART_TYPE: usize = 0;
const PART_TEXT: usize = 1;
const PART_REFUSAL: usize = 2;
const PART_NAME: usize = 3;
const PART_INPUT: usize = 4;
const PART_CONTENT: usize = 5;
const FIRST_PAYLOAD: usize = 6;

/// Writes a conversation.
pub(super) struct ConversationWriter<'a, 's, S> {
    pub out: &'s mut S,
    /// The pieces after the system text that are not written yet.
    pub head: Option<ConversationHead<'a>>,
    /// The turn in progress is the user's.
    pub in_user_turn: bool,
}

/// The values that are written between the system text and the messages.
#[derive(Clone, Copy, Default)]
pub(super) struct ConversationHead<'a> {
    pub tools: Option<RawValue<'a>>,
    pub documents: Option<RawValue<'a>>,
}

#[derive(Clone, Copy)]
enum TurnRole<'a> {
    System,
    User,
    Assistant,
    Tool,
    /// As it stands between its quotes.
    Other(&'a [u8]),
}

/// A message as far as it has been written.
struct OpenTurn<'a> {
    role: TurnRole<'a>,
    /// Between its texts.
    join: &'static [u8],
    begun: bool,
    after_text: bool,
}

enum ItemKind<'a> {
    Message(TurnRole<'a>),
    Call,
    Result,
    /// Reasoning, which templates drop from past turns, and other content that is not prompt.
    Nothing,
}

// === impl OpenTurn ===

impl<'a> OpenTurn<'a> {
    fn of(role: TurnRole<'a>) -> Self {
        OpenTurn { role, join: LINE_FEED, begun: false, after_text: false }
    }
}

// === impl TurnRole ===

impl<'a> TurnRole<'a> {
    fn of(raw: RawValue<'a>) -> Result<Self, EndOfJson> {
        raw.end()?;
        let text = raw.string().ok_or(EndOfJson)?;
        let named = |text: &[u8]| match text {
            b"system" | b"developer" => Some(TurnRole::System),
            b"user" => Some(TurnRole::User),
            b"assistant" => Some(TurnRole::Assistant),
            b"tool" | b"function" => Some(TurnRole::Tool),
            _ => None,
        };
        // Few roles are written with escapes.
        if let Some(role) = named(text) {
            return Ok(role);
        }
        let mut short = ShortText::default();
        decode(text, true, &mut short);
        Ok(short.text().and_then(named).unwrap_or(TurnRole::Other(text)))
    }

    fn write<S: TextSink>(self, out: &mut S) {
        match self {
            TurnRole::System => out.write(b"system"),
            TurnRole::User => out.write(b"user"),
            TurnRole::Assistant => out.write(b"assistant"),
            TurnRole::Tool => out.write(b"tool"),
            TurnRole::Other(text) => {
                write_text(text, true, out);
            }
        }
    }
}

/// What an element of a conversation is. Items of Responses that are no messages have no role.
fn kind<'a>(item: &ItemSlots<'a>) -> Result<ItemKind<'a>, EndOfJson> {
    if let Ok(Some(role)) = item.get(ITEM_ROLE) {
        return Ok(ItemKind::Message(TurnRole::of(role)?));
    }
    let Some(named) = short(item.get(ITEM_TYPE)?)? else {
        return item.get(ITEM_ROLE).map(|_| ItemKind::Nothing);
    };
    match named.text().unwrap_or_default() {
        b"function_call" | b"custom_tool_call" | b"mcp_call" => Ok(ItemKind::Call),
        b"message" => item.get(ITEM_ROLE).map(|_| ItemKind::Nothing),
        text if text.ends_with(b"_output") => Ok(ItemKind::Result),
        _ => Ok(ItemKind::Nothing),
    }
}

/// A short text, where the value is one.
fn short(raw: Option<RawValue<'_>>) -> Result<Option<ShortText>, EndOfJson> {
    let Some(raw) = raw else { return Ok(None) };
    raw.end()?;
    let mut text = ShortText::default();
    decode(raw.string().unwrap_or_default(), true, &mut text);
    Ok(Some(text))
}

// === impl ConversationWriter: the order of things ===

impl<'a, S: TextSink> ConversationWriter<'a, '_, S> {
    /// The system's text, where an interface has a field for it.
    pub(super) fn system(&mut self, raw: RawValue<'a>, join: &'static [u8]) {
        let mut turn = OpenTurn::of(TurnRole::System);
        turn.join = join;
        // The upstream reports errors in it.
        let _ = self.plain_content(&mut turn, raw);
    }

    /// A conversation that is a single text, given the bytes between its quotes: how many were used.
    pub(super) fn user(&mut self, text: &[u8], whole: bool) -> usize {
        self.end_head();
        if text.is_empty() {
            return 0;
        }
        self.begin(&mut OpenTurn::of(TurnRole::User));
        let used = write_text(text, whole, self.out);
        if whole {
            self.end_question();
        }
        used
    }

    /// Writes the messages or items. `Err`: the offset from which they are not, or not completely, written.
    pub(super) fn list(&mut self, bytes: &'a [u8]) -> Result<(), usize> {
        let mut list = JsonList::new(bytes);
        loop {
            match list.next() {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(EndOfJson) => {
                    self.out.checkpoint();
                    return Err(list.cursor.at);
                }
            }
            let at = list.cursor.at;
            self.element(&mut list.cursor).map_err(|EndOfJson| at)?;
        }
    }

    /// Writes one message or item. The upstream reports errors inside of a complete one.
    pub(super) fn element(&mut self, cursor: &mut JsonCursor<'a>) -> Result<(), EndOfJson> {
        if cursor.byte() != Ok(b'{') {
            self.out.checkpoint();
            return cursor.value()?.end();
        }
        if let Some((role, content)) = plain_message::read(cursor) {
            return self.plain_message(TurnRole::of(role)?, content);
        }
        let item = cursor.object(&ITEM);
        let kind = kind(&item);
        if matches!(&kind, Ok(kind) if !matches!(kind, ItemKind::Message(TurnRole::System))) {
            self.end_head();
        }
        if !item.whole {
            self.out.checkpoint();
        }
        let written = kind.and_then(|kind| self.item(&kind, &item));
        if !item.whole {
            return written.and(Err(EndOfJson));
        }
        self.end_question();
        Ok(())
    }

    fn plain_message(&mut self, role: TurnRole<'a>, content: RawValue<'a>) -> Result<(), EndOfJson> {
        if !matches!(role, TurnRole::System) {
            self.end_head();
        }
        self.text(&mut OpenTurn::of(role), content)?;
        self.end_question();
        Ok(())
    }

    /// Ends the turn; the user's first turn also ends the opening of the conversation.
    fn end_question(&mut self) {
        if std::mem::take(&mut self.in_user_turn) {
            self.out.opened();
        }
    }

    /// Writes the pieces between the system text and the messages.
    pub(super) fn end_head(&mut self) {
        let Some(head) = self.head.take() else { return };
        if let Some(tools) = head.tools {
            // What is wrong with them is left to the upstream.
            let _ = self.tools(tools);
        }
        if let Some(documents) = head.documents.filter(|documents| documents.bytes != b"[]") {
            self.out.write(&[DOCUMENTS]);
            Minifier::new(self.out).write(documents.bytes);
        }
    }

    fn item(&mut self, kind: &ItemKind<'a>, item: &ItemSlots<'a>) -> Result<(), EndOfJson> {
        match *kind {
            ItemKind::Nothing => Ok(()),
            ItemKind::Message(role) => self.message(role, item),
            ItemKind::Call => self.call(item.get(ITEM_NAME)?, || item.first_of(&ITEM_ARGUMENTS)),
            ItemKind::Result => match item.get(ITEM_OUTPUT)? {
                Some(output) => self.plain_content(&mut OpenTurn::of(TurnRole::Tool), output),
                None => Ok(()),
            },
        }
    }

    /// Writes the name last: most messages have none, and its key may come at the end of the message.
    fn message(&mut self, role: TurnRole<'a>, item: &ItemSlots<'a>) -> Result<(), EndOfJson> {
        let mut turn = OpenTurn::of(role);
        if let Some(content) = item.get(ITEM_CONTENT)? {
            self.content(&mut turn, content)?;
        }
        if let Some(calls) = item.get(TOOL_CALLS)? {
            self.calls(calls)?;
        }
        // A tool's name is said in the call.
        if let (false, Some(name)) = (matches!(role, TurnRole::Tool), item.get(ITEM_NAME)?) {
            self.out.write(&[NAME]);
            self.short_text(Some(name))?;
        }
        Ok(())
    }
}

// === impl ConversationWriter: what messages consist of ===

impl<'a, S: TextSink> ConversationWriter<'a, '_, S> {
    fn content(&mut self, turn: &mut OpenTurn<'a>, raw: RawValue<'a>) -> Result<(), EndOfJson> {
        if raw.first() != b'[' {
            return self.text(turn, raw);
        }
        let mut list = JsonList::new(raw.bytes);
        while list.next()? {
            if list.cursor.byte()? != b'{' {
                self.text(turn, list.cursor.value()?)?;
                continue;
            }
            let part = list.cursor.object(&PART);
            let named = short(part.get(PART_TYPE)?)?;
            match named.as_ref().and_then(ShortText::text).unwrap_or_default() {
                b"tool_use" | b"server_tool_use" | b"mcp_tool_use" => {
                    self.call(part.get(PART_NAME)?, || part.get(PART_INPUT))?;
                    turn.begun = false;
                }
                kind if kind.ends_with(b"tool_result") => {
                    if let Some(content) = part.get(PART_CONTENT)? {
                        self.plain_content(&mut OpenTurn::of(TurnRole::Tool), content)?;
                    }
                    turn.begun = false;
                }
                kind => self.plain_part(turn, kind, &part)?,
            }
            if !part.whole {
                return Err(EndOfJson);
            }
        }
        Ok(())
    }

    /// Content that holds neither calls nor results.
    fn plain_content(&mut self, turn: &mut OpenTurn<'a>, raw: RawValue<'a>) -> Result<(), EndOfJson> {
        if raw.first() != b'[' {
            return self.text(turn, raw);
        }
        let mut list = JsonList::new(raw.bytes);
        while list.next()? {
            if list.cursor.byte()? != b'{' {
                self.text(turn, list.cursor.value()?)?;
                continue;
            }
            let part = list.cursor.object(&PART);
            let named = short(part.get(PART_TYPE)?)?;
            let kind = named.as_ref().and_then(ShortText::text).unwrap_or_default();
            self.plain_part(turn, kind, &part)?;
            if !part.whole {
                return Err(EndOfJson);
            }
        }
        Ok(())
    }

    fn plain_part(
        &mut self,
        turn: &mut OpenTurn<'a>,
        kind: &[u8],
        part: &PartSlots<'a>,
    ) -> Result<(), EndOfJson> {
        let text = match kind {
            b"text" | b"input_text" | b"output_text" => part.get(PART_TEXT)?,
            b"" if part.get(PART_TEXT)?.is_some() => part.get(PART_TEXT)?,
            b"refusal" => part.get(PART_REFUSAL)?,
            b"thinking" | b"redacted_thinking" | b"reasoning" | b"reasoning_text" | b"summary_text" => None,
            b"tool_use" | b"tool_result" | b"tool_reference" => None,
            _ => return self.media(turn, kind, part),
        };
        text.map_or(Ok(()), |text| self.text(turn, text))
    }

    fn media(&mut self, turn: &mut OpenTurn<'a>, kind: &[u8], part: &PartSlots<'a>) -> Result<(), EndOfJson> {
        if !part.whole {
            return Err(EndOfJson);
        }
        let payloads = (FIRST_PAYLOAD..PART.len()).map(|slot| part.get(slot));
        let Some(payload) = payloads.filter_map(Result::ok).flatten().next() else { return Ok(()) };
        self.begin(turn);
        turn.after_text = false;
        media::write(kind, payload, self.out);
        Ok(())
    }

    /// Begins the turn with its first content: an empty message is not a turn.
    fn begin(&mut self, turn: &mut OpenTurn<'a>) {
        if !turn.begun {
            self.end_question();
            self.in_user_turn = matches!(turn.role, TurnRole::User);
            self.out.write(&[TURN]);
            turn.role.write(self.out);
            self.out.write(&[END]);
            (turn.begun, turn.after_text) = (true, false);
        }
    }

    /// Writes the available part of a text; other values are omitted.
    fn text(&mut self, turn: &mut OpenTurn<'a>, raw: RawValue<'a>) -> Result<(), EndOfJson> {
        let Some(mut text) = raw.string() else { return raw.end() };
        if matches!(turn.role, TurnRole::System) {
            text = without_billing(text, raw.whole)?;
        }
        if text.is_empty() {
            return raw.end();
        }
        self.begin(turn);
        if turn.after_text {
            self.out.write(turn.join);
        }
        turn.after_text = true;
        write_text(text, raw.whole, self.out);
        raw.end()
    }

    fn calls(&mut self, raw: RawValue<'a>) -> Result<(), EndOfJson> {
        const CALLED: [&str; 5] = ["function", "custom", "name", "arguments", "input"];
        const CALLED_ARGUMENTS: [usize; 2] = [3, 4];
        if raw.first() != b'[' {
            return raw.end();
        }
        let mut list = JsonList::new(raw.bytes);
        while list.next()? {
            let mut call = list.cursor.object(&CALLED);
            let whole = call.whole;
            if let Some(inner) = call.first_of(&[0, 1])? {
                call = JsonCursor::new(inner.bytes).object(&CALLED);
            }
            self.call(call.get(2)?, || call.first_of(&CALLED_ARGUMENTS))?;
            if !whole {
                return Err(EndOfJson);
            }
        }
        Ok(())
    }

    /// Without its id, which is random.
    fn call(
        &mut self,
        name: Option<RawValue<'a>>,
        arguments: impl FnOnce() -> Result<Option<RawValue<'a>>, EndOfJson>,
    ) -> Result<(), EndOfJson> {
        self.end_question();
        self.out.write(&[CALL]);
        self.short_text(name)?;
        let Some(arguments) = arguments()? else { return Ok(()) };
        let mut minifier = Minifier::new(self.out);
        match arguments.string() {
            Some(text) => {
                decode(text, arguments.whole, &mut minifier);
            }
            None => minifier.write(arguments.bytes),
        }
        arguments.end()
    }

    /// The schema keeps the order of its keys: that order is the prompt's.
    fn tools(&mut self, raw: RawValue<'a>) -> Result<(), EndOfJson> {
        #[rustfmt::skip]
        const NAMES: [&str; 8] = [
            "function", "custom", "name", "type", "description", "parameters", "input_schema", "format",
        ];
        if raw.first() != b'[' {
            return Ok(());
        }
        let mut list = JsonList::new(raw.bytes);
        while list.next()? {
            let mut tool = list.cursor.object(&NAMES);
            if let Some(inner) = tool.first_of(&[0, 1])? {
                tool = JsonCursor::new(inner.bytes).object(&NAMES);
            }
            self.out.write(&[TOOL]);
            self.short_text(tool.first_of(&[2, 3])?)?;
            self.short_text(tool.get(4)?)?;
            if let Some(schema) = tool.first_of(&[5, 6, 7])? {
                Minifier::new(self.out).write(schema.bytes);
            }
        }
        Ok(())
    }

    /// Writes a text that must be complete, and its end mark.
    fn short_text(&mut self, raw: Option<RawValue<'a>>) -> Result<(), EndOfJson> {
        if let Some(raw) = raw {
            write_text(raw.string().unwrap_or_default(), raw.whole, self.out);
            raw.end()?;
        }
        self.out.write(&[END]);
        Ok(())
    }
}
