//! What runs of one entry of `routes:`: a virtual model, with its defaults.

use serde_json::{Map, Value};

use super::{Retry, Timeouts};
use crate::config::secret::Secret;

/// Which requests it is for, where they go, and what is changed on the way there and back.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteConfig {
    /// The name that the client sends, exactly or with `*`; `None` is any, and none.
    pub model: Option<String>,
    pub path: Option<String>,
    /// All of them must be there and equal; names are in lower case.
    pub header: Vec<(String, String)>,
    /// The served name, in place of the client's.
    pub to: Option<String>,
    /// Names of upstreams; `None` is all of them.
    pub upstreams: Option<Vec<String>>,
    pub headers: HeaderEdits,
    pub response_headers: HeaderEdits,
    pub body: BodyEdits,
    /// Token ids and log-probabilities are asked for, and put on the message.
    pub token_ids: bool,
    /// Reasoning stands in the content, between `<think>` and `</think>`.
    pub think_tags: bool,
    pub overflow: Overflow,
    /// What the upstreams get of a request to `/v1/responses`.
    pub responses: UpstreamForm,
    /// What the upstreams get of a request to `/v1/messages`, or for the count of its tokens.
    pub messages: UpstreamForm,
    /// JSON in `metadata.chat_template_kwargs` and `metadata.extra_body` goes before `body.defaults`.
    pub metadata_overrides: bool,
    /// Sent as `Authorization: Bearer` in place of the client's and of the upstream's.
    pub api_key: Option<Secret>,
    /// Whole: what the route does not say is as in `timeouts`.
    pub timeouts: Timeouts,
    /// Whole: what the route does not say is as in `retry`.
    pub retry: Retry,
}

impl RouteConfig {
    /// A route for every request that changes nothing.
    pub fn new(timeouts: Timeouts, retry: Retry) -> Self {
        RouteConfig {
            model: None,
            path: None,
            header: Vec::new(),
            to: None,
            upstreams: None,
            headers: HeaderEdits::default(),
            response_headers: HeaderEdits::default(),
            body: BodyEdits::default(),
            token_ids: false,
            think_tags: false,
            overflow: Overflow::Error,
            responses: UpstreamForm::Native,
            messages: UpstreamForm::Native,
            metadata_overrides: false,
            api_key: None,
            timeouts,
            retry,
        }
    }
}

/// Headers to set, which replaces all of that name, and names to remove; names are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    pub set: Vec<(String, String)>,
    pub remove: Vec<String>,
}

/// What is changed in the JSON of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BodyEdits {
    /// Where the client says nothing.
    pub defaults: Map<String, Value>,
    /// A merge patch: goes before what the client says, and null removes.
    pub overrides: Map<String, Value>,
    /// Fields that never reach the upstream.
    pub remove: Vec<String>,
    /// Roles of messages, from and to.
    pub roles: Vec<(String, String)>,
}

/// What becomes of a prompt that is longer than the model's context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// The upstream's 400.
    Error,
    /// An empty answer that was ended by its length.
    Length,
}

/// How the upstreams of a route are asked for what is no chat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamForm {
    /// As the client asks.
    Native,
    /// As for a chat, whose answer is told in the client's form.
    Chat,
}

impl UpstreamForm {
    /// The names that a configuration may use, for messages.
    pub const NAMES: [&'static str; 2] = ["native", "chat"];

    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "native" => Some(UpstreamForm::Native),
            "chat" => Some(UpstreamForm::Chat),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            UpstreamForm::Native => "native",
            UpstreamForm::Chat => "chat",
        }
    }
}

impl Overflow {
    /// The names that a configuration may use, for messages.
    pub const NAMES: [&'static str; 2] = ["error", "length"];

    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "error" => Some(Overflow::Error),
            "length" => Some(Overflow::Length),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Overflow::Error => "error",
            Overflow::Length => "length",
        }
    }
}
