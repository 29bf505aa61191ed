//! Clears requested fields in one document: an answer, or the data of one event.

use crate::json::{self, JsonResult, ReadFault};
use crate::route::rewrite::AddedAnswerFields;
use crate::sse::{RepeatedHead, count_work};

/// vLLM's value of a field that is not requested.
pub(super) const NULL: &[u8] = b"null";

/// What became of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClearedDocument {
    /// Nothing was written.
    Unchanged,
    /// Nothing was written: it is no JSON, or not all of it.
    Unreadable,
    /// It was written, with what stands before and behind it.
    Written,
    /// Nothing was written. It is an event of tokens without text, which vLLM sends only if token ids or
    /// log-probabilities are requested.
    Superfluous,
}

/// Walks a document, and writes it from the first change on.
struct FieldClearer<'a, 'o> {
    bytes: &'a [u8],
    fields: AddedAnswerFields,
    /// What goes before `bytes`.
    lead: &'a [u8],
    out: &'o mut Vec<u8>,
    /// All before it is written.
    written: usize,
    is_changed: bool,
    /// A field beside the choices was cleared.
    is_root_changed: bool,
    choices: usize,
    superfluous_choices: usize,
}

/// The fields of one choice that make it superfluous, or not.
#[derive(Default)]
struct ChoiceFacts {
    has_empty_delta: bool,
    has_cleared_field: bool,
    has_other_value: bool,
}

/// Clears the fields of the document that stands at `start` in `bytes`, with white space behind it at most.
/// Where there are any, `lead` is written, and all of `bytes`. Of an event that begins as the one before,
/// `head` skips what they share.
pub(super) fn clear_fields(
    bytes: &[u8],
    start: usize,
    fields: AddedAnswerFields,
    head: Option<&mut RepeatedHead>,
    lead: &[u8],
    out: &mut Vec<u8>,
) -> ClearedDocument {
    count_work(bytes.len());
    let before = out.len();
    let mut clearer = FieldClearer {
        bytes,
        fields,
        lead,
        out,
        written: 0,
        is_changed: false,
        is_root_changed: false,
        choices: 0,
        superfluous_choices: 0,
    };
    let comma = head.as_ref().and_then(|head| head.comma_in(&bytes[start..]));
    let result = match comma {
        Some(comma) => clearer.rest(start + comma),
        None => clearer.document(start),
    };
    let is_superfluous = clearer.choices > 0 && clearer.choices == clearer.superfluous_choices;
    let (is_changed, written) = (clearer.is_changed, clearer.written);
    let repeats = result.is_ok() && comma.is_none() && !clearer.is_root_changed;
    if let Some(head) = head.filter(|_| repeats) {
        head.remember(&bytes[start..]);
    }
    match result {
        Ok(()) if is_superfluous => {
            out.truncate(before);
            ClearedDocument::Superfluous
        }
        Ok(()) if is_changed => {
            out.extend_from_slice(&bytes[written..]);
            ClearedDocument::Written
        }
        Ok(()) => {
            out.truncate(before);
            ClearedDocument::Unchanged
        }
        Err(_) => {
            out.truncate(before);
            ClearedDocument::Unreadable
        }
    }
}

impl FieldClearer<'_, '_> {
    fn document(&mut self, start: usize) -> JsonResult<()> {
        let end = json::walk_raw(self.bytes, start, |key, _, at| self.member(key, at))?;
        self.end(end)
    }

    /// Reads a document from the comma before its choices on.
    fn rest(&mut self, comma: usize) -> JsonResult<()> {
        let end = json::walk_rest(self.bytes, comma, |key, _, at| self.member(key, at))?;
        self.end(end)
    }

    fn member(&mut self, key: &[u8], at: usize) -> JsonResult<usize> {
        match key {
            b"choices" if self.bytes.get(at) == Some(&b'[') => self.choices(at),
            b"prompt_token_ids" if self.fields.token_ids => {
                let (end, has_value) = self.clear(at)?;
                self.is_root_changed |= has_value;
                Ok(end)
            }
            _ => json::read_value(self.bytes, at),
        }
    }

    fn end(&self, end: usize) -> JsonResult<()> {
        let is_end = json::skip_space(self.bytes, end) == self.bytes.len();
        if is_end { Ok(()) } else { Err(ReadFault::Syntax) }
    }

    fn choices(&mut self, start: usize) -> JsonResult<usize> {
        let bytes = self.bytes;
        json::each(bytes, start, |at| {
            if bytes.get(at) == Some(&b'{') { self.choice(at) } else { json::read_value(bytes, at) }
        })
    }

    fn choice(&mut self, start: usize) -> JsonResult<usize> {
        let bytes = self.bytes;
        let mut facts = ChoiceFacts::default();
        let end = json::walk_raw(bytes, start, |key, _, at| {
            let is_requested = match key {
                b"logprobs" => self.fields.logprobs,
                b"token_ids" | b"prompt_token_ids" => self.fields.token_ids,
                b"delta" => {
                    let end = json::read_value(bytes, at)?;
                    facts.has_empty_delta = json::is_empty_object(&bytes[at..end]);
                    return Ok(end);
                }
                b"finish_reason" => false,
                _ => return json::read_value(bytes, at),
            };
            let (end, has_value) = if is_requested { self.clear(at)? } else { value_with_end(bytes, at)? };
            facts.has_cleared_field |= is_requested && has_value;
            facts.has_other_value |= !is_requested && has_value;
            Ok(end)
        })?;
        self.choices += 1;
        let is_superfluous = facts.has_empty_delta && facts.has_cleared_field && !facts.has_other_value;
        self.superfluous_choices += usize::from(is_superfluous);
        Ok(end)
    }

    /// Writes null in place of the value at `at`. Returns its end, and whether it was another than null.
    fn clear(&mut self, at: usize) -> JsonResult<(usize, bool)> {
        let (end, has_value) = value_with_end(self.bytes, at)?;
        if has_value {
            if !self.is_changed {
                self.is_changed = true;
                self.out.extend_from_slice(self.lead);
            }
            self.out.extend_from_slice(&self.bytes[self.written..at]);
            self.out.extend_from_slice(NULL);
            self.written = end;
        }
        Ok((end, has_value))
    }
}

/// The end of a value, and whether it is another than null.
fn value_with_end(bytes: &[u8], at: usize) -> JsonResult<(usize, bool)> {
    let end = json::read_value(bytes, at)?;
    Ok((end, &bytes[at..end] != NULL))
}
