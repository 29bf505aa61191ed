//! Routes whose upstreams receive chats where their clients send Responses or Messages requests.
//!
//! `route::translate` has the rules; this module adds the path, the clock and random ids.
//!
//! Never: an await, a word of either language.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use pingora::http::RequestHeader;
use pingora::{Error, ErrorType, Result};

use super::memory::NO_ROOM;
use super::random::RandomSource;
use crate::config::types::UpstreamForm;
use crate::reject::Reject;
use crate::route::answer::AnswerContext;
use crate::route::api_paths::Api;
use crate::route::token_ids::MissingTokens;
use crate::route::translate::{self, AnswerFault, ChatTranslation, TranslatedApi};
use crate::route::virtual_models::RoutePlan;

/// The type of the error for an answer above a limit.
const TOO_LARGE: ErrorType = ErrorType::Custom("an answer that is too large to be translated");

/// The type of the error for an answer without the token ids that its route requested.
const NO_TOKENS: ErrorType = ErrorType::Custom("an answer without token ids");

/// The type of the error for a call of a tool that the client could not run.
const NO_INPUT: ErrorType = ErrorType::Custom("a call of a tool without an input that can be read");

/// The translation of a request to this interface, if its route has one.
pub(super) fn of(plan: &RoutePlan, api: Api) -> Option<ChatTranslation> {
    let (form, api) = match api {
        Api::Responses => (plan.route.responses, TranslatedApi::Responses),
        Api::Messages => (plan.route.messages, TranslatedApi::Messages),
        Api::CountTokens => (plan.route.messages, TranslatedApi::CountTokens),
        _ => return None,
    };
    (form == UpstreamForm::Chat).then(|| ChatTranslation::new(api))
}

/// The target that the upstreams are asked by, however the client wrote its own.
pub(super) fn target(api: TranslatedApi, head: &RequestHeader) -> String {
    let query = head.uri.query().map_or(String::new(), |query| format!("?{query}"));
    format!("{}{query}", api.sent_to())
}

/// An answer begins: whether it is translated, which errors need not be. `plain`: it can be read.
pub(super) fn begin(
    exchange: &mut ChatTranslation,
    (plan, asker): (&RoutePlan, AnswerContext<'_>),
    (status, kind, plain): (u16, Option<&str>, bool),
    random: &RandomSource,
) -> Result<bool> {
    if !(200..300).contains(&status) {
        let names = (asker.model, plan.route.to.as_deref());
        return Ok(exchange.begin_error(names, kind.filter(|_| plain)));
    }
    let asker = translate::TranslationContext {
        model: asker.model.map(str::to_string),
        to: plan.route.to.clone(),
        now: now(),
        seed: u128::from(random.next()) << 64 | u128::from(random.next()),
        token_ids: plan.route.token_ids,
        hides_logprobs: asker.added_fields.logprobs,
    };
    let begun = if plain { exchange.begin(asker, kind) } else { Err(AnswerFault::NoChat) };
    begun.map(|()| true).map_err(unreadable)
}

/// The next piece of the answer, translated. `None`: it goes on as it is.
pub(super) fn piece(exchange: &mut ChatTranslation, piece: &[u8], end: bool) -> Result<Option<Bytes>> {
    exchange.feed(piece, end).map(|told| told.map(Bytes::from)).map_err(unreadable)
}

/// Whether the client gets nothing of an answer with such a head before it is whole.
pub(super) fn holds(status: u16, kind: Option<&str>) -> bool {
    (200..300).contains(&status) && kind.is_some_and(|kind| kind.trim_start().starts_with("application/json"))
}

/// An answer that is no chat is the upstream's fault: while nothing has been sent to the client, another
/// upstream may answer.
fn unreadable(fault: AnswerFault) -> Box<Error> {
    match fault {
        AnswerFault::Tokens(missing) => return lacking(missing),
        AnswerFault::ToolInput => return Error::explain(NO_INPUT, "").into_up(),
        AnswerFault::NoChat | AnswerFault::ManyBytes | AnswerFault::ManyValues => {}
    }
    match fault.limit() {
        None => {
            let why = "the answer is no chat, as the route says it is";
            Error::explain(ErrorType::InvalidHTTPHeader, why).into_up()
        }
        Some(limit) => Error::explain(TOO_LARGE, limit).into_up(),
    }
}

/// The error of an answer without the token ids that its route requested.
pub(super) fn lacking(missing: MissingTokens) -> Box<Error> {
    Error::explain(NO_TOKENS, missing.message()).into_up()
}

/// The refusal that the client gets for an answer which no other upstream would give otherwise.
pub(super) fn refusal_of(error: &Error) -> Option<Reject> {
    let context = error.context.as_ref()?.as_str().to_string();
    match &error.etype {
        etype if *etype == TOO_LARGE => Some(Reject::LargeAnswer { limit: context }),
        etype if *etype == NO_ROOM => Some(Reject::Memory),
        etype if *etype == NO_INPUT => Some(Reject::ToolInput),
        etype if *etype == NO_TOKENS => Some(Reject::TokenIds { message: context }),
        _ => None,
    }
}

/// In seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
