//! A route whose upstreams are asked for a chat where its client asks for a response.
//!
//! The translation itself is `route::translate`; here it gets its path, its time and its chance.
//!
//! Never: an await, a word of either language.

use bytes::Bytes;
use pingora::http::RequestHeader;
use pingora::{Error, ErrorType, Result};

use super::random::Random;
use super::route_edits::now;
use crate::config::types::Responses;
use crate::route::answer::Asker;
use crate::route::paths::Api;
use crate::route::table::Plan;
use crate::route::translate::{self, AnswerFault, Exchange};

/// What kind of error it is that an answer is above a limit.
const TOO_LARGE: ErrorType = ErrorType::Custom("an answer that is too large to be translated");

const CHAT: &str = "/v1/chat/completions";

/// The translation of a request to this interface, if its route wants one.
pub fn of(plan: &Plan, api: Api) -> Option<Exchange> {
    let wanted = plan.route.responses == Responses::Chat && api == Api::Responses;
    wanted.then(Exchange::default)
}

/// The target of a chat, however the client wrote that of a response.
pub fn chat_target(head: &RequestHeader) -> String {
    let query = head.uri.query().map_or(String::new(), |query| format!("?{query}"));
    format!("{CHAT}{query}")
}

/// An answer begins: whether it is translated, which errors need not be. `plain`: it can be read.
pub fn begin(
    exchange: &mut Exchange,
    (plan, asker): (&Plan, Asker<'_>),
    (status, kind, plain): (u16, Option<&str>, bool),
    random: &Random,
) -> Result<bool> {
    if !(200..300).contains(&status) {
        exchange.pass();
        return Ok(false);
    }
    let asker = translate::Asker {
        model: asker.model.map(str::to_string),
        to: plan.route.to.clone(),
        now: now(),
        seed: u128::from(random.next()) << 64 | u128::from(random.next()),
        token_ids: plan.route.token_ids,
        hides_logprobs: asker.asked.logprobs,
    };
    let begun = if plain { exchange.begin(asker, kind) } else { Err(AnswerFault::NoChat) };
    begun.map(|()| true).map_err(unreadable)
}

/// The next piece of the answer, translated. `None`: it goes on as it is.
pub fn piece(exchange: &mut Exchange, piece: &[u8], end: bool) -> Result<Option<Bytes>> {
    exchange.feed(piece, end).map(|told| told.map(Bytes::from)).map_err(unreadable)
}

/// Whether the client gets nothing of an answer with such a head before it is whole.
pub fn holds(status: u16, kind: Option<&str>) -> bool {
    (200..300).contains(&status) && kind.is_some_and(|kind| kind.trim_start().starts_with("application/json"))
}

/// No chat is the upstream's fault: another may answer in its place as long as nothing has gone out.
fn unreadable(fault: AnswerFault) -> Box<Error> {
    match fault.limit() {
        None => {
            let why = "the answer is no chat, as the route says it is";
            Error::explain(ErrorType::InvalidHTTPHeader, why).into_up()
        }
        Some(limit) => Error::explain(TOO_LARGE, limit).into_up(),
    }
}

/// The limit above which an answer was, if that is what an error says.
pub fn limit_of(error: &Error) -> Option<String> {
    error.context.as_ref().filter(|_| error.etype == TOO_LARGE).map(|limit| limit.as_str().to_string())
}
