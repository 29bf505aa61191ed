//! The top-level fields that the scanner knows by name.
//!
//! One list, so that a field has one place: its name, and whether what it holds becomes prompt.

use crate::json::unescape;

/// A top-level field of a request that the balancer reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BodyField {
    Model,
    Stream,
    StreamOptions,
    N,
    RequestId,
    PreviousResponseId,
    KvTransferParams,
    EcTransferParams,
    CacheSalt,
    ChatTemplate,
    PromptEmbeds,
    Features,
    SessionId,
    PromptCacheKey,
    User,
    Metadata,
    Rllm,
    SessionParams,
    Store,
    Background,
    // What follows holds prompt.
    Messages,
    Prompt,
    Input,
    Instructions,
    System,
    Tools,
    Documents,
    TokenIds,
    Tokens,
    Query,
    Queries,
    Items,
    Text,
    Texts,
    Text1,
    Text2,
    Inputs,
    Data,
    Data1,
    Data2,
    State,
    Questions,
}

/// Every field with its name, in the order of the enum.
pub(super) const FIELDS: [(BodyField, &str); 42] = [
    (BodyField::Model, "model"),
    (BodyField::Stream, "stream"),
    (BodyField::StreamOptions, "stream_options"),
    (BodyField::N, "n"),
    (BodyField::RequestId, "request_id"),
    (BodyField::PreviousResponseId, "previous_response_id"),
    (BodyField::KvTransferParams, "kv_transfer_params"),
    (BodyField::EcTransferParams, "ec_transfer_params"),
    (BodyField::CacheSalt, "cache_salt"),
    (BodyField::ChatTemplate, "chat_template"),
    (BodyField::PromptEmbeds, "prompt_embeds"),
    (BodyField::Features, "features"),
    (BodyField::SessionId, "session_id"),
    (BodyField::PromptCacheKey, "prompt_cache_key"),
    (BodyField::User, "user"),
    (BodyField::Metadata, "metadata"),
    (BodyField::Rllm, "rllm"),
    (BodyField::SessionParams, "session_params"),
    (BodyField::Store, "store"),
    (BodyField::Background, "background"),
    (BodyField::Messages, "messages"),
    (BodyField::Prompt, "prompt"),
    (BodyField::Input, "input"),
    (BodyField::Instructions, "instructions"),
    (BodyField::System, "system"),
    (BodyField::Tools, "tools"),
    (BodyField::Documents, "documents"),
    (BodyField::TokenIds, "token_ids"),
    (BodyField::Tokens, "tokens"),
    (BodyField::Query, "query"),
    (BodyField::Queries, "queries"),
    (BodyField::Items, "items"),
    (BodyField::Text, "text"),
    (BodyField::Texts, "texts"),
    (BodyField::Text1, "text_1"),
    (BodyField::Text2, "text_2"),
    (BodyField::Inputs, "inputs"),
    (BodyField::Data, "data"),
    (BodyField::Data1, "data_1"),
    (BodyField::Data2, "data_2"),
    (BodyField::State, "state"),
    (BodyField::Questions, "questions"),
];

/// The longest name, every character of it written as `\uXXXX`.
const MAX_KEY_BYTES: usize = 6 * "previous_response_id".len();

impl BodyField {
    pub fn name(self) -> &'static str {
        FIELDS[self.index()].1
    }

    /// Whether the text in it becomes tokens that the model reads.
    pub fn is_prompt(self) -> bool {
        self.index() >= BodyField::Messages.index()
    }

    pub(super) fn index(self) -> usize {
        usize::from(self as u8)
    }

    /// The field that a key names, given the bytes between its quotes; escapes are allowed in it.
    pub(in super::super) fn of_key(raw: &[u8]) -> Option<Self> {
        if raw.len() > MAX_KEY_BYTES {
            return None;
        }
        if memchr::memchr(b'\\', raw).is_none() {
            return BodyField::named(raw);
        }
        BodyField::named(unescape(raw).as_bytes())
    }

    fn named(name: &[u8]) -> Option<Self> {
        FIELDS.iter().find(|(_, known)| known.as_bytes() == name).map(|(field, _)| *field)
    }
}

/// Which fields a request has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FieldSet(u64);

impl FieldSet {
    pub fn contains(self, field: BodyField) -> bool {
        self.0 >> field.index() & 1 == 1
    }

    pub(super) fn insert(&mut self, field: BodyField) {
        self.0 |= 1 << field.index();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_in_the_order_of_the_enum() {
        for (index, (field, name)) in FIELDS.iter().enumerate() {
            assert_eq!(field.index(), index, "{name}");
            assert_eq!(BodyField::of_key(name.as_bytes()), Some(*field));
            let escaped: String = name.bytes().map(|byte| format!("\\u{byte:04x}")).collect();
            assert_eq!(BodyField::of_key(escaped.as_bytes()), Some(*field), "{escaped}");
            assert_eq!(field.name(), *name);
        }
        assert_eq!(BodyField::of_key(b"Model"), None);
        assert_eq!(BodyField::of_key(b"modelx"), None);
        assert_eq!(BodyField::of_key(b""), None);
    }

    #[test]
    fn prompt_is_what_the_model_reads() {
        assert!(BodyField::Messages.is_prompt() && BodyField::Questions.is_prompt());
        assert!(!BodyField::Model.is_prompt() && !BodyField::EcTransferParams.is_prompt());
    }
}
