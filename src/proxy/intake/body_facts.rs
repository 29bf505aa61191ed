//! Reads the facts in the peeked bytes of a body as they arrive.
//!
//! Never: a byte of the connection, a change to the body.

use std::ops::Range;

use crate::prompt::ModelField;
use crate::prompt::chain::BlockLayout;
use crate::prompt::multipart::FormScanner;
use crate::prompt::scan::{BodyField, ScanFacts, ScanProgress, Scanner};
use crate::proxy::body_tail::BodyTail;
use crate::proxy::peeked_prompt::{self, PromptTail};
use crate::proxy::pending_response::KeptResponse;
use crate::proxy::request::RequestedModel;
use crate::reject::Reject;
use crate::route::api_paths::Api;
use crate::state::PromptLookup;

/// The form of a body, which decides the location of its model.
pub(crate) enum BodyShape {
    /// JSON of this interface.
    Json(Api),
    /// A form, with the whole value of `content-type`, which names the boundary.
    Multipart(String),
    /// Not read.
    Opaque,
}

/// Reads the facts of a body as its bytes come.
#[allow(clippy::large_enum_variant, reason = "there is one while a body is peeked, and it is not moved")]
pub(crate) enum FactsReader {
    Json(Scanner, Api),
    Multipart(FormScanner),
    /// A form of which nothing can be read.
    LostForm,
    Opaque,
}

/// The facts of the body, as far as it was read.
#[derive(Default)]
pub(crate) struct BodyFacts {
    pub model: RequestedModel,
    pub prompt: PromptLookup,
    /// The session, in the form in which it is reported.
    pub session_label: Option<String>,
    pub prompt_tail: Option<Box<PromptTail>>,
    pub streams: bool,
    pub previous_response_id: Option<String>,
    /// The client has chosen the upstream that holds its KV cache.
    pub pinned: bool,
    /// The upstream is to keep the response.
    pub kept: Option<KeptResponse>,
}

/// The peeked bytes.
#[derive(Clone, Copy)]
pub(crate) struct PeekedBytes<'a> {
    pub bytes: &'a [u8],
    /// The body has no more bytes than these.
    pub complete: bool,
    /// The length that the head declares.
    pub declared: Option<u64>,
}

// === impl FactsReader ===

impl FactsReader {
    pub(crate) fn new(shape: BodyShape) -> Self {
        match shape {
            BodyShape::Json(api) => FactsReader::Json(Scanner::new(), api),
            BodyShape::Multipart(kind) => {
                let is_form = kind.trim_start().to_ascii_lowercase().starts_with("multipart/");
                let lost = if is_form { FactsReader::LostForm } else { FactsReader::Opaque };
                FormScanner::new(&kind).map_or(lost, FactsReader::Multipart)
            }
            BodyShape::Opaque => FactsReader::Opaque,
        }
    }

    /// The scanner of a JSON body, for the spans of its fields.
    pub(crate) fn scanner(&self) -> Option<&Scanner> {
        match self {
            FactsReader::Json(scanner, _) => Some(scanner),
            FactsReader::Multipart(_) | FactsReader::LostForm | FactsReader::Opaque => None,
        }
    }

    /// Reads what the body has gained; `body` is the same buffer at each call, grown at its end.
    pub(crate) fn read(&mut self, body: &[u8]) {
        match self {
            FactsReader::Json(scanner, _) => scanner.scan(body),
            FactsReader::Multipart(scanner) => scanner.scan(body),
            FactsReader::LostForm | FactsReader::Opaque => {}
        }
    }

    /// Whether the body is a form that cannot be followed, or not to its end.
    pub(crate) fn is_lost_form(&self) -> bool {
        match self {
            FactsReader::Multipart(scanner) => scanner.is_lost(),
            FactsReader::LostForm => true,
            FactsReader::Json(..) | FactsReader::Opaque => false,
        }
    }

    /// Where the model stands that the body names.
    pub(crate) fn model_span(&self) -> Option<Range<usize>> {
        match self {
            FactsReader::Json(scanner, _) => scanner.span(BodyField::Model),
            FactsReader::Multipart(scanner) => scanner.model_span(),
            FactsReader::LostForm | FactsReader::Opaque => None,
        }
    }

    /// What reads the body behind `body`, which has been read. Fails where a second model has begun in it.
    pub(crate) fn tail(&self, body: &[u8]) -> Result<Option<BodyTail>, Reject> {
        let tail = match self {
            FactsReader::Json(scanner, _) => BodyTail::Json(scanner.tail(body)),
            FactsReader::Multipart(scanner) => BodyTail::Multipart(Box::new(scanner.tail(body))),
            FactsReader::LostForm | FactsReader::Opaque => return Ok(None),
        };
        tail.check()?;
        Ok(Some(tail))
    }

    /// Whether the model has not arrived yet and still may.
    pub(crate) fn needs_model(&self, body: &[u8]) -> bool {
        match self {
            FactsReader::Json(scanner, _) => {
                scanner.progress() == ScanProgress::Cut && scanner.span(BodyField::Model).is_none()
            }
            FactsReader::Multipart(scanner) => {
                let facts = scanner.facts(body);
                facts.state == ScanProgress::Cut && facts.model == ModelField::Absent
            }
            FactsReader::LostForm | FactsReader::Opaque => false,
        }
    }

    /// Whether the id of the previous response has not arrived yet and still may: OpenAI's clients write it
    /// after the input.
    pub(crate) fn needs_previous(&self) -> bool {
        let FactsReader::Json(scanner, Api::Responses) = self else { return false };
        scanner.progress() == ScanProgress::Cut && scanner.span(BodyField::PreviousResponseId).is_none()
    }

    /// `model`: the one that the body is for, whatever it says itself.
    pub(crate) fn facts(
        &self,
        peeked: PeekedBytes<'_>,
        blocks: Option<BlockLayout>,
        model: Option<&str>,
    ) -> BodyFacts {
        match self {
            FactsReader::Json(scanner, api) => json_facts(scanner, *api, peeked, blocks, model),
            FactsReader::Multipart(scanner) => {
                let mut facts = scanner.facts(peeked.bytes);
                if let Some(model) = model {
                    facts.model = ModelField::Named(model.into());
                }
                let model = requested(&facts.model, facts.state, peeked.complete);
                BodyFacts { model, ..BodyFacts::default() }
            }
            FactsReader::LostForm | FactsReader::Opaque => {
                BodyFacts { model: RequestedModel::Unreadable, ..BodyFacts::default() }
            }
        }
    }
}

/// The requested model. A complete body with an incomplete document counts as invalid.
fn requested(model: &ModelField<'_>, state: ScanProgress, complete: bool) -> RequestedModel {
    match (model, state) {
        (_, ScanProgress::Cut) if complete => RequestedModel::Unreadable,
        (_, ScanProgress::Malformed(_)) | (ModelField::NotAString, _) => RequestedModel::Unreadable,
        (ModelField::Named(name), _) => RequestedModel::Named(name.clone().into_owned()),
        (ModelField::Absent, _) => RequestedModel::Any,
    }
}

fn json_facts(
    scanner: &Scanner,
    api: Api,
    peeked: PeekedBytes<'_>,
    blocks: Option<BlockLayout>,
    model: Option<&str>,
) -> BodyFacts {
    let mut facts = scanner.facts(peeked.bytes);
    if let Some(model) = model {
        facts.model = ModelField::Named(model.into());
    }
    let unread = peeked.declared.map_or(0, |length| length.saturating_sub(peeked.bytes.len() as u64));
    let dialect = peeked_prompt::dialect(api, &facts);
    let (prompt, prompt_tail) = peeked_prompt::read(dialect, blocks, &facts, (peeked.bytes, scanner), unread);
    // The refusal of an invalid document reports an offset, so nothing may be moved.
    let reads = facts.state == ScanProgress::Complete || facts.state == ScanProgress::Cut && !peeked.complete;
    let keeps = api == Api::Responses && !facts.without_store && reads;
    let named = facts.has(BodyField::RequestId) || scanner.span(BodyField::RequestId).is_some();
    let kept = keeps.then_some(KeptResponse { named, background: facts.background });
    BodyFacts { prompt, prompt_tail, kept, ..plain_facts(&facts, api, peeked) }
}

fn plain_facts(facts: &ScanFacts<'_>, api: Api, peeked: PeekedBytes<'_>) -> BodyFacts {
    let model = match peeked.bytes.trim_ascii_start().first() {
        Some(b'{' | b'\xef') => requested(&facts.model, facts.state, peeked.complete),
        // A list, a number: an upstream tells what a request must be.
        _ => RequestedModel::Unreadable,
    };
    // The other interfaces do not know the field.
    let goes_on = matches!(api, Api::Responses | Api::Render);
    let previous = facts.previous_response_id.as_ref().filter(|id| goes_on && !id.is_empty());
    BodyFacts {
        model,
        streams: facts.stream,
        previous_response_id: previous.map(|id| id.clone().into_owned()),
        pinned: facts.kv_transfer(),
        ..BodyFacts::default()
    }
}
