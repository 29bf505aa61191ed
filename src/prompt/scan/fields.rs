//! The top-level fields that the scanner knows by name.
//!
//! One list, so that a field has one place: its name, and whether what it holds becomes prompt.

use super::super::value::unescape;

/// A top-level field of a request that somebody here asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Field {
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
pub(super) const FIELDS: [(Field, &str); 40] = [
    (Field::Model, "model"),
    (Field::Stream, "stream"),
    (Field::StreamOptions, "stream_options"),
    (Field::N, "n"),
    (Field::RequestId, "request_id"),
    (Field::PreviousResponseId, "previous_response_id"),
    (Field::KvTransferParams, "kv_transfer_params"),
    (Field::EcTransferParams, "ec_transfer_params"),
    (Field::CacheSalt, "cache_salt"),
    (Field::ChatTemplate, "chat_template"),
    (Field::PromptEmbeds, "prompt_embeds"),
    (Field::Features, "features"),
    (Field::SessionId, "session_id"),
    (Field::PromptCacheKey, "prompt_cache_key"),
    (Field::User, "user"),
    (Field::Metadata, "metadata"),
    (Field::Store, "store"),
    (Field::Background, "background"),
    (Field::Messages, "messages"),
    (Field::Prompt, "prompt"),
    (Field::Input, "input"),
    (Field::Instructions, "instructions"),
    (Field::System, "system"),
    (Field::Tools, "tools"),
    (Field::Documents, "documents"),
    (Field::TokenIds, "token_ids"),
    (Field::Tokens, "tokens"),
    (Field::Query, "query"),
    (Field::Queries, "queries"),
    (Field::Items, "items"),
    (Field::Text, "text"),
    (Field::Texts, "texts"),
    (Field::Text1, "text_1"),
    (Field::Text2, "text_2"),
    (Field::Inputs, "inputs"),
    (Field::Data, "data"),
    (Field::Data1, "data_1"),
    (Field::Data2, "data_2"),
    (Field::State, "state"),
    (Field::Questions, "questions"),
];

/// The longest name, every character of it written as `\uXXXX`.
const LONGEST_KEY: usize = 6 * "previous_response_id".len();

impl Field {
    pub fn name(self) -> &'static str {
        FIELDS[self.index()].1
    }

    /// Whether the text in it becomes tokens that the model reads.
    pub fn is_prompt(self) -> bool {
        self.index() >= Field::Messages.index()
    }

    pub(super) fn index(self) -> usize {
        usize::from(self as u8)
    }

    /// The field that a key names, given the bytes between its quotes; escapes are allowed in it.
    pub(in super::super) fn of_key(raw: &[u8]) -> Option<Self> {
        if raw.len() > LONGEST_KEY {
            return None;
        }
        if memchr::memchr(b'\\', raw).is_none() {
            return Field::named(raw);
        }
        Field::named(unescape(raw).as_bytes())
    }

    fn named(name: &[u8]) -> Option<Self> {
        FIELDS.iter().find(|(_, known)| known.as_bytes() == name).map(|(field, _)| *field)
    }
}

/// Which fields a request has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FieldSet(u64);

impl FieldSet {
    pub fn contains(self, field: Field) -> bool {
        self.0 >> field.index() & 1 == 1
    }

    pub(super) fn insert(&mut self, field: Field) {
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
            assert_eq!(Field::of_key(name.as_bytes()), Some(*field));
            let escaped: String = name.bytes().map(|byte| format!("\\u{byte:04x}")).collect();
            assert_eq!(Field::of_key(escaped.as_bytes()), Some(*field), "{escaped}");
            assert_eq!(field.name(), *name);
        }
        assert_eq!(Field::of_key(b"Model"), None);
        assert_eq!(Field::of_key(b"modelx"), None);
        assert_eq!(Field::of_key(b""), None);
    }

    #[test]
    fn prompt_is_what_the_model_reads() {
        assert!(Field::Messages.is_prompt() && Field::Questions.is_prompt());
        assert!(!Field::Model.is_prompt() && !Field::EcTransferParams.is_prompt());
    }
}
