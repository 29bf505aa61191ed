//! An upstream's answer as it goes by: who looks at it, who holds it back, who edits it.
//!
//! In this order: an answer that a route answers in another way, whether it is one that another upstream
//! should give, what it says about itself, what was only asked for on our account, and then the route's
//! edits. What stands behind them, the log of bodies and the stream's end, sees what the client sees.
//!
//! Never: a byte that is held longer than one of these needs.

use bytes::Bytes;
use http::Response;
use pingora::http::ResponseHeader;
use pingora::{Error, ErrorType, Result};

use super::attempt::Cause;
use super::context::{Context, Samples};
use super::{Shared, another, attempt, headers, prompt, stored};
use crate::reply::ending::{Form, Tail};
use crate::reply::judge::Judge;
use crate::reply::usage::Meter;

/// Events of a Responses stream that say that there is a response, and nothing of it.
const ANNOUNCED: u64 = 2;

/// The head of an answer came that is not given up for its status.
pub fn begin(shared: &Shared, context: &mut Context, head: &mut ResponseHeader) -> Result<()> {
    let status = head.status.as_u16();
    let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
    let length = headers::length(&head.headers);
    let kind = text(http::header::CONTENT_TYPE);
    context.judge = Some(Judge::new(status, kind, length));
    context.stream = kind.is_some_and(|kind| kind.starts_with("text/event-stream")).then(Tail::default);
    // A chat, which is told as a response, announces nothing.
    let is_chat = context.face.as_ref().is_some_and(|face| face.translates());
    let form = if is_chat { Form::Data } else { context.form };
    let announced = status == 200 && form == Form::Responses && context.stream.is_some();
    context.events = announced.then(Box::default);
    let metered = status == 200 && context.counts && context.line.is_some();
    context.meter = if metered { Meter::of(kind).map(Box::new) } else { None };
    context.ask.as_mut().map_or(Ok(()), |ask| ask.begin(head))?;
    stored::begin(context, head)?;
    context.face.as_mut().map_or(Ok(()), |face| face.begin(head, &shared.random))
}

/// The next piece of it, and whether it is the last.
pub fn piece(shared: &Shared, context: &mut Context, body: &mut Option<Bytes>, end: bool) -> Result<()> {
    let piece = body.as_deref().unwrap_or_default();
    if let Some(face) = context.face.as_mut().filter(|face| face.holds()) {
        let sent = context.replay.as_ref().and_then(|replay| replay.body());
        let seed = shared.random.next();
        if let Some(answer) = face.instead((piece, end), sent.as_ref(), context.streams, seed) {
            instead(shared, context, answer);
            return Ok(());
        }
    }
    let holds = context.face.as_ref().is_some_and(|face| face.holds());
    let cause = if holds { None } else { attempt::judge(shared, context, piece, end) };
    if let Some(cause) = cause {
        return Err(another(context, cause));
    }
    // A head says nothing yet: vLLM sends it before the prompt is read.
    if let (Some(line), None) = (&context.line, &context.judge) {
        line.moved();
        context.go_out();
    }
    if let Some(meter) = &mut context.meter {
        meter.feed(piece);
        stored::learn(shared, context);
    }
    if let Some(events) = &mut context.events {
        events.feed(piece);
        if end || events.whole() > ANNOUNCED {
            context.events = None;
            context.prefilled();
        }
    }
    let edited = edit(context, piece, end)?;
    if context.face.as_ref().is_some_and(|face| face.is_broken()) {
        broken(shared, context, edited.as_ref(), end)?;
    }
    let piece = edited.as_deref().unwrap_or(piece);
    if let Some(tail) = &mut context.stream {
        tail.feed(piece);
    }
    if let Some(samples) = &mut context.samples {
        Samples::keep(&mut samples.answer, samples.most, piece);
    }
    if edited.is_some() {
        *body = edited.filter(|piece| !piece.is_empty());
    }
    Ok(())
}

/// The upstream's answer, all of which is held, goes out as another one.
fn instead(shared: &Shared, context: &mut Context, answer: Response<Bytes>) {
    // The engine refused the prompt, and holds nothing of it.
    if let Some(id) = context.lease.as_ref().map(|lease| lease.upstream().id) {
        prompt::forget(shared, context, id, false);
    }
    context.accept();
    context.status = answer.status().as_u16();
    if let Some(samples) = &mut context.samples {
        Samples::keep(&mut samples.answer, samples.most, answer.body());
    }
    if let Some(line) = &context.line {
        line.say_instead(answer);
    }
}

/// What was told is no whole answer. `told`: the last of it, which says so. An upstream that goes on with it
/// is left at once, so that nothing more is generated.
fn broken(shared: &Shared, context: &mut Context, told: Option<&Bytes>, end: bool) -> Result<()> {
    if context.outcome.is_some() {
        return Ok(());
    }
    if attempt::may_follow(shared, context, Cause::Reset) {
        return Err(another(context, Cause::Reset));
    }
    if end {
        attempt::broke(shared, context);
        return Ok(());
    }
    context.last_words = told.cloned();
    Err(Error::explain(ErrorType::InvalidHTTPHeader, "the stream is no chat's").into_up())
}

/// A piece as the client gets it. `None`: as it is.
fn edit(context: &mut Context, piece: &[u8], end: bool) -> Result<Option<Bytes>> {
    // A body has one or the other.
    let taken = context.ask.as_mut().and_then(|ask| ask.piece(piece, end));
    let taken = taken.or_else(|| stored::piece(context, piece, end));
    let piece = taken.as_deref().unwrap_or(piece);
    let edited = context.face.as_mut().map(|face| face.piece(piece, end)).transpose()?.flatten();
    Ok(edited.or(taken))
}
