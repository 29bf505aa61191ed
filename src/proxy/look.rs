//! Reads what the peeked bytes of a body say, as they come.
//!
//! Never: a byte of the connection, a change to the body.

use super::peek::{Wanted, Wish};
use super::prompt;
use super::stored::Kept;
use crate::prompt::Model;
use crate::prompt::chain::Blocks;
use crate::prompt::multipart::FormScanner;
use crate::prompt::scan::{Facts, Field, Progress, Scanner};
use crate::route::paths::Api;

/// Where the body names its model.
pub enum Shape {
    /// Of this interface.
    Json(Api),
    /// With the whole value of `content-type`, which names the boundary.
    Multipart(String),
    /// Not looked into.
    Opaque,
}

/// Looks for the model as the bytes come.
#[allow(clippy::large_enum_variant, reason = "there is one while a body is peeked, and it is not moved")]
pub enum Looker {
    Json(Scanner, Api),
    Multipart(FormScanner),
    Opaque,
}

impl Looker {
    pub fn new(shape: Shape) -> Self {
        match shape {
            Shape::Json(api) => Looker::Json(Scanner::new(), api),
            Shape::Multipart(kind) => FormScanner::new(&kind).map_or(Looker::Opaque, Looker::Multipart),
            Shape::Opaque => Looker::Opaque,
        }
    }

    pub fn scanner(&self) -> Option<&Scanner> {
        match self {
            Looker::Json(scanner, _) => Some(scanner),
            Looker::Multipart(_) | Looker::Opaque => None,
        }
    }

    pub fn look(&mut self, body: &[u8]) {
        match self {
            Looker::Json(scanner, _) => scanner.scan(body),
            Looker::Multipart(scanner) => scanner.scan(body),
            Looker::Opaque => {}
        }
    }

    /// The model has not come, and may yet.
    pub fn wants_model(&self, body: &[u8]) -> bool {
        match self {
            Looker::Json(scanner, _) => {
                scanner.progress() == Progress::Cut && scanner.span(Field::Model).is_none()
            }
            Looker::Multipart(scanner) => {
                let facts = scanner.facts(body);
                facts.state == Progress::Cut && facts.model == Model::Absent
            }
            Looker::Opaque => false,
        }
    }

    /// What it goes on from has not come, and may yet: OpenAI's clients write it behind the input.
    pub fn wants_previous(&self) -> bool {
        let Looker::Json(scanner, Api::Responses) = self else { return false };
        scanner.progress() == Progress::Cut && scanner.span(Field::PreviousResponseId).is_none()
    }

    /// `model`: the one that the body is for, whatever it says itself.
    pub fn wish(
        &self,
        (body, whole): (&[u8], bool),
        declared: Option<u64>,
        blocks: Option<Blocks>,
        model: Option<&str>,
    ) -> Wish {
        match self {
            Looker::Json(scanner, api) => {
                let mut facts = scanner.facts(body);
                if let Some(model) = model {
                    facts.model = Model::Named(model.into());
                }
                let unread = declared.map_or(0, |length| length.saturating_sub(body.len() as u64));
                let dialect = prompt::dialect(*api, &facts);
                let (asked, rest) = prompt::read(dialect, blocks, &facts, (body, scanner), unread);
                // What is no document is refused by where it is none: nothing may be moved.
                let reads = facts.state == Progress::Complete || facts.state == Progress::Cut && !whole;
                let keeps = *api == Api::Responses && !facts.forgets && reads;
                let named = facts.has(Field::RequestId) || scanner.span(Field::RequestId).is_some();
                let kept = keeps.then_some(Kept { named, background: facts.background });
                Wish { asked, rest, kept, ..json_wish(&facts, *api, body, whole) }
            }
            Looker::Multipart(scanner) => {
                let mut facts = scanner.facts(body);
                if let Some(model) = model {
                    facts.model = Model::Named(model.into());
                }
                Wish { model: wanted(&facts.model, facts.state, whole), ..Wish::default() }
            }
            Looker::Opaque => Wish { model: Wanted::Unreadable, ..Wish::default() },
        }
    }
}

/// A body that is whole and not over is no document either.
fn wanted(model: &Model<'_>, state: Progress, whole: bool) -> Wanted {
    match (model, state) {
        (_, Progress::Cut) if whole => Wanted::Unreadable,
        (_, Progress::Malformed(_)) | (Model::NotAString, _) => Wanted::Unreadable,
        (Model::Named(name), _) => Wanted::Named(name.clone().into_owned()),
        (Model::Absent, _) => Wanted::Any,
    }
}

fn json_wish(facts: &Facts<'_>, api: Api, body: &[u8], whole: bool) -> Wish {
    let model = match body.trim_ascii_start().first() {
        Some(b'{' | b'\xef') => wanted(&facts.model, facts.state, whole),
        // A list, a number: an upstream will say what a request must be.
        _ => Wanted::Unreadable,
    };
    // The others do not know the field.
    let goes_on = matches!(api, Api::Responses | Api::Render);
    let previous = facts.previous_response_id.as_ref().filter(|id| goes_on && !id.is_empty());
    Wish {
        model,
        streams: facts.stream,
        previous_response_id: previous.map(|id| id.clone().into_owned()),
        pinned: facts.kv_transfer(),
        ..Wish::default()
    }
}
