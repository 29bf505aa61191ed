//! A virtual model on its way through: what its route changes of a request, and of the answer.
//!
//! What is changed, and how, is `route`'s matter; here stands when. A body is edited once, before an
//! upstream is chosen, and is the same at every attempt. An answer is edited as it goes by; one that a
//! route answers in another way is held until it is whole, before anything of it has gone out.
//!
//! Never: an await, a rule of its own.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, header};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};

use super::headers;
use super::random::Random;
use super::{served, translation};
use crate::config::types::{HeaderEdits, Overflow};
use crate::fleet::Upstream;
use crate::prompt::scan::Scanner;
use crate::reject::Reject;
use crate::route::answer::{self, Answer, Asker, overflow};
use crate::route::dialect::Dialect;
use crate::route::paths::Api;
use crate::route::rewrite::{Asked, is_wide};
use crate::route::table::Plan;
use crate::route::translate::Exchange;

pub struct Face {
    pub plan: Arc<Plan>,
    pub dialect: Dialect,
    /// The name that the client gave.
    pub model: Option<String>,
    /// The type of a body that is a form.
    pub form: Option<String>,
    asked: Asked,
    /// Of the body, where it was edited.
    length: Option<usize>,
    answer: Option<Answer>,
    /// The upstreams are spoken to in another language.
    translation: Option<Exchange>,
    /// The beginning of an answer that may be answered in another way.
    held: Option<Vec<u8>>,
}

/// Header fields, of a request or of an answer.
trait Fields {
    fn set(&mut self, name: HeaderName, value: HeaderValue) -> Result<()>;
    fn remove(&mut self, name: &str);
}

impl Fields for RequestHeader {
    fn set(&mut self, name: HeaderName, value: HeaderValue) -> Result<()> {
        self.insert_header(name, value)
    }

    fn remove(&mut self, name: &str) {
        drop(self.remove_header(name));
    }
}

impl Fields for ResponseHeader {
    fn set(&mut self, name: HeaderName, value: HeaderValue) -> Result<()> {
        self.insert_header(name, value)
    }

    fn remove(&mut self, name: &str) {
        drop(self.remove_header(name));
    }
}

/// Names and values were checked when the configuration was read.
fn apply(edits: &HeaderEdits, head: &mut impl Fields) -> Result<()> {
    edits.remove.iter().for_each(|name| head.remove(name));
    for (name, value) in &edits.set {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            head.set(name, value)?;
        }
    }
    Ok(())
}

impl Face {
    /// `form`: the whole `content-type` of a form.
    pub fn new(plan: Arc<Plan>, dialect: Dialect, model: Option<String>, form: Option<String>) -> Self {
        let asked = Asked::default();
        Face { plan, dialect, model, form, asked, length: None, answer: None, translation: None, held: None }
    }

    /// Whether the body must be there as a whole, to be edited.
    pub fn wants_body(&self) -> bool {
        let edits = self.plan.edits(self.spoken());
        let model = self.model.as_deref();
        if self.translation.is_some() {
            true
        } else if self.form.is_some() {
            edits.renames(model)
        } else {
            edits.may_change(model)
        }
    }

    /// The name by which the upstreams know the model.
    pub fn served(&self) -> Option<&str> {
        self.plan.served(self.model.as_deref())
    }

    /// Whether that is another than the client's.
    pub fn renames(&self) -> bool {
        self.served() != self.model.as_deref()
    }

    /// A body of this interface is to come, which the route may want said in another language.
    pub fn expect(&mut self, api: Api) {
        self.translation = translation::of(&self.plan, api);
    }

    /// The language that the upstreams are spoken to in.
    fn spoken(&self) -> Dialect {
        if self.translates() { Dialect::Chat } else { self.dialect }
    }

    /// Whether it is another one than the client's.
    pub fn translates(&self) -> bool {
        self.translation.is_some()
    }

    /// The interface of a body that was edited.
    pub fn api(&self, api: Api) -> Api {
        if self.translates() { Api::Chat } else { api }
    }

    /// The body as it is sent. `scanner` has read the body.
    /// `Err`: what it says cannot be said to the upstreams.
    pub fn edit(&mut self, body: &[u8], scanner: Option<&Scanner>) -> Result<Option<Vec<u8>>, Reject> {
        // It would pass unedited, and vLLM reads it.
        if scanner.is_some() && is_wide(body) {
            let message = "The body must be JSON in UTF-8.".into();
            return Err(Reject::Field { param: "body".into(), message });
        }
        let tags = self.plan.route.think_tags;
        let chat = match &mut self.translation {
            Some(exchange) => exchange.request(body, tags)?,
            None => None,
        };
        // It has not read what the body was made into.
        let scanner = scanner.filter(|_| chat.is_none());
        let body = chat.as_deref().unwrap_or(body);
        let edits = self.plan.edits(self.spoken());
        let edited = match &self.form {
            Some(kind) => edits.edit_form(kind, body),
            None => {
                let edited = edits.edit_known(body, &|at| scanner?.end_of(at));
                self.asked = edited.asked;
                edited.body
            }
        };
        let body = edited.or(chat);
        if let (Some(exchange), Some(chat)) = (&mut self.translation, &body) {
            exchange.sent(chat);
        }
        self.length = body.as_ref().map(Vec::len);
        Ok(body)
    }

    /// Gives a head that is the client's yet the path that its upstreams are to be asked at.
    pub fn translate_path(&self, head: &mut RequestHeader) -> Result<()> {
        if self.translates() { translation::to_chat(head) } else { Ok(()) }
    }

    /// Makes a head one for an upstream of this route, or for another that alone has what is asked for.
    pub fn towards_upstream(&self, head: &mut RequestHeader, upstream: Option<&Upstream>) -> Result<()> {
        if let Some(length) = self.length {
            head.remove_header(&header::TRANSFER_ENCODING);
            head.insert_header(header::CONTENT_LENGTH, length)?;
        }
        // What is compressed on the way could not be edited.
        head.remove_header(&header::ACCEPT_ENCODING);
        let route = &self.plan.route;
        let is_ours = upstream.is_none_or(|upstream| served::leads_to(route, upstream));
        // The key of a route is for its own upstreams.
        let routed = if is_ours { self.authorization() } else { None };
        if let Some(key) = &routed {
            headers::replace_key(head, key)?;
        }
        apply(&route.headers, head)?;
        // What is taken out is the client's, and not what upstreams are shown in place of it.
        let is_key = |name: &str| name.eq_ignore_ascii_case("authorization");
        let is_set = route.headers.set.iter().any(|(name, _)| is_key(name));
        if is_set || !route.headers.remove.iter().any(|name| is_key(name)) {
            return Ok(());
        }
        let own = || HeaderValue::try_from(upstream?.authorization.as_ref()?).ok();
        routed.or_else(own).map_or(Ok(()), |key| head.insert_header(header::AUTHORIZATION, key))
    }

    /// What its upstreams are shown in place of the client's key.
    pub fn authorization(&self) -> Option<HeaderValue> {
        let key = self.plan.route.api_key.as_ref()?;
        HeaderValue::try_from(format!("Bearer {}", key.expose())).ok()
    }

    pub fn towards_client(&self, head: &mut ResponseHeader) -> Result<()> {
        apply(&self.plan.route.response_headers, head)
    }

    /// An answer begins. `random` makes the ids of one that is translated.
    pub fn begin(&mut self, head: &mut ResponseHeader, random: &Random) -> Result<()> {
        let status = head.status.as_u16();
        let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
        // What is compressed cannot be read; vLLM compresses nothing.
        let plain = text(header::CONTENT_ENCODING).is_none_or(|coding| coding == "identity");
        let asker = Asker { dialect: self.dialect, model: self.model.as_deref(), asked: self.asked };
        let kind = text(header::CONTENT_TYPE);
        let translated = match &mut self.translation {
            Some(exchange) => {
                translation::begin(exchange, (&self.plan, asker), (status, kind, plain), random)?
            }
            None => false,
        };
        let edits = plain && !translated;
        self.answer = if edits { Answer::new(&self.plan, asker, status, kind) } else { None };
        self.describe(head)?;
        let may_overflow = plain && status == 400 && self.plan.route.overflow == Overflow::Length;
        self.held = may_overflow.then(Vec::new);
        if self.answer.is_some() || translated { headers::of_unknown_length(head) } else { Ok(()) }
    }

    /// Names the model as the client does in the header that describes an answer of plain bytes.
    fn describe(&self, head: &mut ResponseHeader) -> Result<()> {
        let described = head.headers.get("metadata").map(HeaderValue::as_bytes);
        let renamed = described.and_then(|text| answer::metadata(&self.plan, self.model.as_deref(), text));
        match renamed.map(HeaderValue::try_from) {
            Some(Ok(renamed)) => head.insert_header("metadata", renamed),
            Some(Err(_)) | None => Ok(()),
        }
    }

    /// Whether the answer may yet be another one, so that nothing of it can go out.
    pub fn holds(&self) -> bool {
        self.held.is_some()
    }

    /// Looks at a piece of an answer that may be answered in another way; with the last one it is known.
    /// `sent`: the body that it answers, if that is still there.
    pub fn instead(
        &mut self,
        (piece, end): (&[u8], bool),
        sent: Option<&Bytes>,
        streams: bool,
        seed: u64,
    ) -> Option<Response<Bytes>> {
        let held = self.held.as_mut()?;
        let room = (overflow::MOST + 1).saturating_sub(held.len());
        held.extend_from_slice(&piece[..piece.len().min(room)]);
        if !end && held.len() <= overflow::MOST {
            return None;
        }
        let held = self.held.take().filter(|held| overflow::is_overflow(400, held))?;
        drop(held);
        let now = now();
        let model = self.model.as_deref().unwrap_or_default();
        let (dialect, stream) = (self.dialect, streams);
        let choices = sent.map_or(1, |sent| overflow::choices(dialect, sent));
        let instead = overflow::Request { dialect, stream, choices, model, now, seed }.instead()?;
        let mut answer = Response::new(Bytes::from(instead.body));
        answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(instead.content_type));
        Some(answer)
    }

    /// The stream that it was made of is no whole chat: its client has been told the last that there is.
    pub fn is_broken(&self) -> bool {
        self.translation.as_ref().is_some_and(Exchange::is_broken)
    }

    /// The next piece of the answer, edited. `None`: it goes on as it is.
    pub fn piece(&mut self, piece: &[u8], end: bool) -> Result<Option<Bytes>> {
        if let Some(exchange) = &mut self.translation
            && let Some(told) = translation::piece(exchange, piece, end)?
        {
            return Ok(Some(told));
        }
        Ok(self.answer.as_mut().map(|answer| Bytes::from(answer.feed(piece, end))))
    }
}

/// In seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
