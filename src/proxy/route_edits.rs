//! Applies the edits of a request's route to the request and to its answer.
//!
//! `route` has the rules; this module applies them at their time. A body is edited once, before an upstream
//! is chosen, and is the same at every attempt. An answer is edited as it goes by; one that a route answers
//! in another way is held until it is whole, before anything of it has gone out.
//!
//! Never: an await, a rule of its own.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, header};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};

use super::client::Client;
use super::fleet_routes::{self, FleetRoutes};
use super::random::RandomSource;
use super::upstream_head::UpstreamHead;
use super::{headers, translation};
use crate::config::types::{HeaderEdits, OverflowPolicy};
use crate::fleet::Upstream;
use crate::prompt::scan::Scanner;
use crate::route::answer::overflow::{self, OverflowAnswer};
use crate::route::answer::{self, AnswerContext, AnswerEditor};
use crate::route::api_paths::Api;
use crate::route::dialect::BodyDialect;
use crate::route::edit::{BodyEdit, EditedBody};
use crate::route::rewrite::AddedAnswerFields;
use crate::route::translate::ChatTranslation;
use crate::route::virtual_models::{RoutePlan, UnnamedModelRoute};

/// The edits that a route makes to one request and its answer.
pub(super) struct RouteEdits {
    pub plan: Arc<RoutePlan>,
    pub dialect: BodyDialect,
    /// The name that the client gave.
    pub model: Option<String>,
    /// The type of a body that is a form.
    pub form: Option<String>,
    added_fields: AddedAnswerFields,
    answer: Option<AnswerEditor>,
    /// Set where the upstreams use another dialect than the client.
    translation: Option<ChatTranslation>,
}

/// Header fields, of a request or of an answer.
trait HeaderFields {
    fn set(&mut self, name: HeaderName, value: HeaderValue) -> Result<()>;
    fn remove(&mut self, name: &str);
}

impl HeaderFields for UpstreamHead {
    fn set(&mut self, name: HeaderName, value: HeaderValue) -> Result<()> {
        self.insert(name, value);
        Ok(())
    }

    fn remove(&mut self, name: &str) {
        self.remove(name);
    }
}

impl HeaderFields for ResponseHeader {
    fn set(&mut self, name: HeaderName, value: HeaderValue) -> Result<()> {
        self.insert_header(name, value)
    }

    fn remove(&mut self, name: &str) {
        drop(self.remove_header(name));
    }
}

/// Names and values were checked when the configuration was read.
fn apply(edits: &HeaderEdits, head: &mut impl HeaderFields) -> Result<()> {
    edits.remove.iter().for_each(|name| head.remove(name));
    for (name, value) in &edits.set {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            head.set(name, value)?;
        }
    }
    Ok(())
}

impl RouteEdits {
    /// `form`: the whole `content-type` of a form.
    pub(super) fn new(
        plan: Arc<RoutePlan>,
        dialect: BodyDialect,
        model: Option<String>,
        form: Option<String>,
    ) -> Self {
        let added_fields = AddedAnswerFields::default();
        RouteEdits { plan, dialect, model, form, added_fields, answer: None, translation: None }
    }

    /// The edits of the route of a request for this model. `form`: the type of a body that is one.
    pub(super) fn for_model(
        routes: &FleetRoutes,
        client: &Client<'_>,
        path: &str,
        model: Option<&str>,
        (dialect, form): (BodyDialect, Option<&str>),
    ) -> Option<Self> {
        let plan = routes.plan(model, path, client.headers())?;
        Some(RouteEdits::new(plan, dialect, model.map(str::to_string), form.map(str::to_string)))
    }

    /// As `for_model`, of a request that names no model; with the model that it is for.
    pub(super) fn without_model(
        routes: &FleetRoutes,
        client: &Client<'_>,
        path: &str,
        (dialect, form): (BodyDialect, Option<&str>),
    ) -> (Option<String>, Option<Self>) {
        let UnnamedModelRoute { model, plan } = routes.plan_unnamed(path, client.headers());
        let edits = |plan| RouteEdits::new(plan, dialect, model.clone(), form.map(str::to_string));
        (model.clone(), plan.map(edits))
    }

    /// Whether the body must be there as a whole, to be edited.
    pub(super) fn needs_body(&self) -> bool {
        let edits = self.plan.edits(self.upstream_dialect());
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
    pub(super) fn served(&self) -> Option<&str> {
        self.plan.served(self.model.as_deref())
    }

    /// Whether that is another than the client's.
    pub(super) fn renames(&self) -> bool {
        self.served() != self.model.as_deref()
    }

    /// Prepares for a body of this interface, which the route may translate.
    pub(super) fn expect_body(&mut self, api: Api) {
        self.translation = translation::of(&self.plan, api);
    }

    /// The dialect that the upstreams receive.
    fn upstream_dialect(&self) -> BodyDialect {
        self.sent_as().map_or(self.dialect, BodyDialect::of)
    }

    /// Whether the upstreams use another dialect than the client.
    pub(super) fn translates(&self) -> bool {
        self.translation.is_some()
    }

    /// The interface of requests to the upstreams, if it differs from the client's.
    fn sent_as(&self) -> Option<Api> {
        self.translation.as_ref().map(|exchange| exchange.api().sent_as())
    }

    /// The interface of a body that was edited.
    pub(super) fn api(&self, api: Api) -> Api {
        self.sent_as().unwrap_or(api)
    }

    /// The edit of the body. `scanner` has read it.
    pub(super) fn edit(&mut self, scanner: Option<&Scanner>) -> BodyEdit {
        BodyEdit {
            plan: self.plan.clone(),
            upstream_dialect: self.upstream_dialect(),
            form: self.form.clone(),
            translation: self.translation.take(),
            scanner: scanner.cloned(),
        }
    }

    /// Takes the result of the edit. Returns the edited body, if it changed.
    pub(super) fn edited(&mut self, edited: EditedBody) -> Option<Vec<u8>> {
        self.added_fields = edited.added_fields;
        self.translation = edited.translation;
        edited.body
    }

    /// The target for its upstreams, where it is not the client's.
    pub(super) fn translated_target(&self, head: &RequestHeader) -> Option<String> {
        self.translation.as_ref().map(|exchange| translation::target(exchange.api(), head))
    }

    /// Edits a head for an upstream of this route, or for another upstream that alone has the stored
    /// response.
    pub(super) fn towards_upstream(&self, head: &mut UpstreamHead, upstream: &Upstream) {
        let route = &self.plan.route;
        let is_ours = fleet_routes::leads_to(route, upstream);
        // The key of a route is for its own upstreams.
        let routed = if is_ours { self.authorization() } else { None };
        if let Some(key) = &routed {
            head.replace_key(key.clone());
        }
        // It cannot fail with these fields.
        let _ = apply(&route.headers, head);
        // The removal applies to the client's fields, not to those that replace them.
        let is_key = |name: &str| name.eq_ignore_ascii_case("authorization");
        let is_set = route.headers.set.iter().any(|(name, _)| is_key(name));
        if is_set || !route.headers.remove.iter().any(|name| is_key(name)) {
            return;
        }
        let own = || HeaderValue::try_from(upstream.authorization.as_ref()?).ok();
        if let Some(key) = routed.or_else(own) {
            head.insert(header::AUTHORIZATION, key);
        }
    }

    /// The route's key, which replaces the client's.
    pub(super) fn authorization(&self) -> Option<HeaderValue> {
        let key = self.plan.route.api_key.as_ref()?;
        HeaderValue::try_from(format!("Bearer {}", key.expose())).ok()
    }

    pub(super) fn towards_client(&self, head: &mut ResponseHeader) -> Result<()> {
        apply(&self.plan.route.response_headers, head)
    }

    /// An answer begins. `random` makes the ids of one that is translated.
    pub(super) fn begin(&mut self, head: &mut ResponseHeader, random: &RandomSource) -> Result<()> {
        let status = head.status.as_u16();
        let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
        let plain = headers::is_plain(head);
        let asker = AnswerContext {
            dialect: self.dialect,
            model: self.model.as_deref(),
            added_fields: self.added_fields,
        };
        let kind = text(header::CONTENT_TYPE);
        let translated = match &mut self.translation {
            Some(exchange) => {
                translation::begin(exchange, (&self.plan, asker), (status, kind, plain), random)?
            }
            None => false,
        };
        let edits = plain && !translated;
        self.answer = if edits { AnswerEditor::new(&self.plan, asker, status, kind) } else { None };
        self.rename_in_metadata(head)?;
        if self.answer.is_some() || translated { headers::of_unknown_length(head) } else { Ok(()) }
    }

    /// Names the model as the client does in the header that describes an answer of plain bytes.
    fn rename_in_metadata(&self, head: &mut ResponseHeader) -> Result<()> {
        let described = head.headers.get("metadata").map(HeaderValue::as_bytes);
        let renamed = described.and_then(|text| answer::metadata(&self.plan, self.model.as_deref(), text));
        match renamed.map(HeaderValue::try_from) {
            Some(Ok(renamed)) => head.insert_header("metadata", renamed),
            Some(Err(_)) | None => Ok(()),
        }
    }

    /// Whether an answer with this head must be held until it is whole.
    pub(super) fn holds(&self, head: &ResponseHeader) -> bool {
        let kind = head.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        // Without the token ids that the route requests, it is refused.
        let is_checked = self.plan.route.token_ids && self.dialect == BodyDialect::Chat;
        let is_held = self.translates() || is_checked;
        is_held && headers::is_plain(head) && translation::holds(head.status.as_u16(), kind)
    }

    /// Whether an answer with this head may be answered in another way, once its body is known.
    pub(super) fn may_overflow(&self, head: &ResponseHeader) -> bool {
        head.status == 400 && self.plan.route.overflow == OverflowPolicy::Length && headers::is_plain(head)
    }

    /// The answer in place of an upstream's whole error that says that the prompt does not fit. `sent`: the
    /// body that it answers.
    pub(super) fn overflow_answer(
        &self,
        error: &[u8],
        sent: &[u8],
        streams: bool,
        seed: u64,
    ) -> Option<OverflowAnswer> {
        let is_overflow = overflow::is_overflow(400, error);
        is_overflow.then(|| self.length_answer(self.dialect, sent, streams, seed))?
    }

    /// As `overflow_answer`, of the interface that the upstream was called by.
    pub(super) fn upstream_overflow_answer(
        &self,
        sent: &[u8],
        streams: bool,
        seed: u64,
    ) -> Option<OverflowAnswer> {
        self.length_answer(self.upstream_dialect(), sent, streams, seed)
    }

    fn length_answer(
        &self,
        dialect: BodyDialect,
        sent: &[u8],
        stream: bool,
        seed: u64,
    ) -> Option<OverflowAnswer> {
        let model = self.model.as_deref().unwrap_or_default();
        let choices = if sent.is_empty() { 1 } else { overflow::choices(dialect, sent) };
        let token_ids = self.plan.route.token_ids && self.upstream_dialect() == BodyDialect::Chat;
        let now = translation::now();
        overflow::OverflowRequest { dialect, stream, choices, model, now, seed, token_ids }.answer()
    }

    /// Whether the translated stream broke: the client has received its last event.
    pub(super) fn is_broken(&self) -> bool {
        self.translation.as_ref().is_some_and(ChatTranslation::is_broken)
    }

    /// The next piece of the answer, edited. `None`: it goes on as it is.
    pub(super) fn piece(&mut self, piece: &[u8], end: bool) -> Result<Option<Bytes>> {
        if let Some(exchange) = &mut self.translation
            && let Some(told) = translation::piece(exchange, piece, end)?
        {
            return Ok(Some(told));
        }
        let Some(answer) = &mut self.answer else { return Ok(None) };
        let edited = answer.feed(piece, end);
        match answer.refusal() {
            Some(missing) => Err(translation::lacking(missing)),
            None => Ok(Some(Bytes::from(edited))),
        }
    }
}

/// The `authorization` of a request to an upstream: the upstream's own or the route's, else the client's.
pub(super) fn authorization(
    client: &Client<'_>,
    edits: Option<&RouteEdits>,
    upstream: &Upstream,
) -> Option<HeaderValue> {
    let mut head = UpstreamHead::new(Method::GET, Vec::new(), 2);
    if let Some(key) = client.headers().get(header::AUTHORIZATION) {
        // Copied: it may be remembered, and a clone would keep the client's whole head.
        head.append(header::AUTHORIZATION, HeaderValue::from_bytes(key.as_bytes()).ok()?);
    }
    if let Some(key) = &upstream.authorization {
        head.replace_key(HeaderValue::try_from(key).ok()?);
    }
    if let Some(edits) = edits {
        edits.towards_upstream(&mut head, upstream);
    }
    head.get(&header::AUTHORIZATION).cloned()
}
