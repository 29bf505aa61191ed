//! The conformance file of routes: what is made of a request, and of its answer.
//!
//! tests/data/routes/*.txt hold triples, in a form that people can read:
//!
//! ```text
//! === a name for the case
//! route: {model: fast, to: big}            one entry of `routes`, as in a configuration
//! path: /v1/chat/completions               chat unless it is given
//! usage: yes                               the usage of streams is wanted
//! asked: usage logprobs token_ids          what is asked for on our own account
//! model: fast                              the client's name; that of the route unless it is given
//! status: 404                              of the answer; 200 unless it is given
//! stream: yes                              the answer is asked for as a stream
//! --- client                               the request's body as the client wrote it
//! --- upstream                             as the upstream gets it; nothing: it goes on as it is
//! --- answer                               in place of `upstream`: the upstream's answer
//! --- told                                 and what the client gets
//! --- refused                              in place of `upstream`: the client gets this instead
//! ```
//!
//! Empty lines around a body are no part of it. Answers are given in pieces of all sizes.
//!
//! Of a response that was translated from a chat, which says again much of its request, only those fields
//! stand there that are not as a request without any would have them; with `whole: yes`, all.

use std::path::Path;
use std::sync::Arc;

use http::HeaderMap;
use serde_json::{Value, json};
use vllm_lb::config::check::check;
use vllm_lb::config::types::{OverflowPolicy, UpstreamForm};
use vllm_lb::prompt::scan::Scanner;
use vllm_lb::reject::{ErrorShape, Reject};
use vllm_lb::route::answer::{AnswerContext, AnswerEditor, overflow};
use vllm_lb::route::api_paths::{self, PathMatch};
use vllm_lb::route::dialect::BodyDialect;
use vllm_lb::route::rewrite::{AddedAnswerFields, RewrittenBody};
use vllm_lb::route::translate::{self, ChatTranslation, TranslatedApi};
use vllm_lb::route::usage::{UsageFilter, usage_request};
use vllm_lb::route::virtual_models::{RoutePlan, RouteTable};

#[derive(Debug, Default)]
struct Case {
    name: String,
    /// `key: value` lines.
    settings: Vec<(String, String)>,
    parts: Vec<(String, String)>,
}

impl Case {
    fn setting(&self, key: &str) -> Option<&str> {
        self.settings.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    fn part(&self, name: &str) -> Option<&str> {
        self.parts.iter().find(|(part, _)| part == name).map(|(_, text)| text.trim_matches('\n'))
    }

    fn path(&self) -> &str {
        self.setting("path").unwrap_or("/v1/chat/completions")
    }

    fn plan(&self) -> Arc<RoutePlan> {
        let route = self.setting("route").unwrap_or_else(|| panic!("{}: no route", self.name));
        let text = format!("upstreams: [http://a]\nroutes: [{route}]\n");
        let config = check(&text, &|_| None).unwrap_or_else(|problems| panic!("{}: {problems:?}", self.name));
        let table = RouteTable::new(&config.routes);
        let model = config.routes[0].model.clone();
        table.plan(model.as_deref(), self.path(), &HeaderMap::new()).expect("the only route matches")
    }

    /// The name that the client gave.
    fn model(&self) -> Option<String> {
        self.setting("model").map(str::to_owned).or_else(|| self.plan().route.model.clone())
    }

    fn asked(&self) -> AddedAnswerFields {
        let asked = |word| self.setting("asked").is_some_and(|words| words.split(' ').any(|w| w == word));
        AddedAnswerFields { logprobs: asked("logprobs"), token_ids: asked("token_ids") }
    }

    fn asked_for_usage(&self) -> bool {
        self.setting("asked").is_some_and(|words| words.split(' ').any(|word| word == "usage"))
    }

    fn status(&self) -> u16 {
        self.setting("status").map_or(200, |status| status.parse().expect("is a status"))
    }

    /// What the client gets of an answer that comes in pieces of this size.
    fn told(&self, answer: &str, size: usize) -> String {
        let (plan, model) = (self.plan(), self.model());
        let status = self.status();
        let is_too_long = overflow::is_overflow(status, answer.as_bytes());
        if plan.route.overflow == OverflowPolicy::Length && is_too_long {
            let request = overflow::OverflowRequest {
                dialect: self.dialect(),
                stream: self.setting("stream").is_some(),
                choices: self
                    .part("client")
                    .map_or(1, |body| overflow::choices(self.dialect(), body.as_bytes())),
                model: model.as_deref().unwrap_or_default(),
                now: 1,
                seed: 0x2a,
                token_ids: plan.route.token_ids,
            };
            return request.answer().expect("has such an answer").body;
        }
        let events = answer.starts_with("data") || answer.starts_with("event") || answer.starts_with(':');
        let kind = if events { "text/event-stream; charset=utf-8" } else { "application/json" };
        let mut exchange = self.exchange();
        let is_translated =
            |exchange: &ChatTranslation| status == 200 || exchange.api() != TranslatedApi::Responses;
        if let Some(exchange) = exchange.as_mut().filter(|exchange| is_translated(exchange)) {
            return self.translated(exchange, answer, kind, size);
        }
        let (dialect, added_fields) = (self.dialect(), self.asked());
        let asker = AnswerContext { dialect, model: model.as_deref(), added_fields };
        let mut edit = AnswerEditor::new(&plan, asker, status, Some(kind));
        let mut unasked = (events && self.asked_for_usage()).then(UsageFilter::default);
        let mut told = Vec::new();
        for (piece, end) in
            answer.as_bytes().chunks(size).map(|piece| (piece, false)).chain([(&b""[..], true)])
        {
            let taken = unasked.as_mut().and_then(|unasked| unasked.feed(piece, end));
            let piece = taken.as_deref().unwrap_or(piece);
            match &mut edit {
                Some(edit) => told.extend(edit.feed(piece, end)),
                None => told.extend_from_slice(piece),
            }
        }
        if let Some(missing) = edit.and_then(|edit| edit.refusal()) {
            return format!("{missing:?}");
        }
        String::from_utf8(told).expect("is text")
    }

    fn translates(&self) -> bool {
        self.exchange().is_some()
    }

    /// The translation of the case, where its route has one.
    fn exchange(&self) -> Option<ChatTranslation> {
        let route = &self.plan().route;
        let (form, api) = match self.path() {
            "/v1/responses" => (route.responses, TranslatedApi::Responses),
            "/v1/messages" => (route.messages, TranslatedApi::Messages),
            "/v1/messages/count_tokens" => (route.messages, TranslatedApi::CountTokens),
            _ => return None,
        };
        (form == UpstreamForm::Chat).then(|| ChatTranslation::new(api))
    }

    /// What the upstream gets, as the proxy has it made.
    fn sent(&self, exchange: Option<&mut ChatTranslation>, client: &str) -> Result<RewrittenBody, Reject> {
        let plan = self.plan();
        let Some(exchange) = exchange else {
            return plan.edits(self.dialect()).edit(client.as_bytes());
        };
        let chat = exchange.request(client.as_bytes(), plan.route.think_tags)?;
        let Some(chat) = chat else { return Ok(RewrittenBody::default()) };
        let edited = plan.edits(BodyDialect::of(exchange.api().sent_as())).edit(&chat)?;
        let body = edited.body.unwrap_or(chat);
        exchange.record_sent_chat(&body);
        Ok(RewrittenBody { body: Some(body), added_fields: edited.added_fields })
    }

    /// A chat's answer in the client's form. The request is the case's, or one without anything to say again.
    fn translated(&self, exchange: &mut ChatTranslation, answer: &str, kind: &str, size: usize) -> String {
        let client = match exchange.api() {
            TranslatedApi::Responses => r#"{"input":"hi"}"#,
            TranslatedApi::Messages | TranslatedApi::CountTokens => r#"{"messages":[],"max_tokens":9}"#,
        };
        let client = self.part("client").unwrap_or(client);
        let edited = self.sent(Some(&mut *exchange), client).expect("is no refusal");
        let plan = self.plan();
        let asker = translate::TranslationContext {
            model: self.model(),
            to: plan.route.to.clone(),
            now: 1,
            seed: 0x2a,
            token_ids: plan.route.token_ids,
            hides_logprobs: edited.added_fields.logprobs,
        };
        if self.status() == 200 {
            exchange.begin(asker, Some(kind)).expect("is JSON or events");
        } else if !exchange.begin_error((asker.model.as_deref(), asker.to.as_deref()), Some(kind)) {
            panic!("{}: goes on as it is", self.name);
        }
        let mut told = Vec::new();
        let ends = answer.as_bytes().chunks(size).map(|piece| (piece, false)).chain([(&b""[..], true)]);
        for (piece, end) in ends {
            match exchange.feed(piece, end) {
                Ok(piece) => told.extend(piece.expect("is translated")),
                Err(unreadable) => return format!("{unreadable:?}"),
            }
        }
        let told = String::from_utf8(told).expect("is text");
        if self.setting("whole").is_some() { told } else { brief(&told) }
    }

    fn dialect(&self) -> BodyDialect {
        match api_paths::PathTable::default().find("POST", self.path()) {
            PathMatch::Route(route) => BodyDialect::of(route.api),
            other => panic!("{}: {other:?}", self.name),
        }
    }
}

fn cases(file: &str) -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/routes").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut cases: Vec<Case> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("=== ") {
            assert!(cases.iter().all(|case| case.name != name), "{name} is there twice");
            cases.push(Case { name: name.into(), ..Case::default() });
            continue;
        }
        let Some(case) = cases.last_mut() else { continue };
        if let Some(part) = line.strip_prefix("--- ") {
            case.parts.push((part.into(), String::new()));
        } else if let Some((_, text)) = case.parts.last_mut() {
            text.push_str(line);
            text.push('\n');
        } else if let Some((key, value)) = line.split_once(": ") {
            case.settings.push((key.into(), value.into()));
        }
    }
    cases
}

/// Leaves out of responses what they say again of a request that says nothing.
fn brief(told: &str) -> String {
    let nothing = json!({
        "parallel_tool_calls": true, "tool_choice": "none", "tools": [], "background": false,
        "service_tier": "auto", "store": false, "truncation": "disabled", "output": [],
    });
    let shorten = |response: &mut Value| {
        let Some(fields) = response.as_object_mut() else { return };
        fields.retain(|key, value| !value.is_null() && nothing.get(key) != Some(value));
    };
    let line = |line: &str| {
        let (start, data) = line.split_at(line.find('{').unwrap_or(line.len()));
        let Ok(mut data) = serde_json::from_str::<Value>(data) else { return line.to_owned() };
        if data["object"] == "response" {
            shorten(&mut data);
        } else if let Some(response) = data.get_mut("response") {
            shorten(response);
        }
        format!("{start}{data}")
    };
    told.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// With what a scanner has read of the body, the same comes out, and is known in its turn.
fn knows_alike(case: &Case, client: &str, edited: &RewrittenBody) {
    let (plan, mut scanner) = (case.plan(), Scanner::new());
    scanner.scan(client.as_bytes());
    let known = plan
        .edits(case.dialect())
        .edit_known(client.as_bytes(), &|at| scanner.end_of(at))
        .expect("it can be edited");
    assert_eq!(&known, edited, "{}", case.name);
    if let Some(body) = &edited.body {
        let again = scanner.of_edited(client.as_bytes(), body);
        scanner = Scanner::new();
        scanner.scan(body);
        assert_eq!(again.facts(body), scanner.facts(body), "{}", case.name);
    }
}

/// The body that asks for its stream's usage, if it is one.
fn asking(client: &str, edited: &RewrittenBody, dialect: BodyDialect) -> Option<Vec<u8>> {
    let body = edited.body.as_deref().unwrap_or(client.as_bytes());
    let mut scanner = Scanner::new();
    scanner.scan(body);
    usage_request(body, &scanner, dialect).map(|asking| asking.apply(body))
}

#[test]
fn requests_reach_the_upstream_as_they_should() {
    let cases = cases("requests.txt");
    for case in &cases {
        let client = case.part("client").unwrap_or_else(|| panic!("{}: no request", case.name));
        let wanted = case.part("upstream").filter(|text| !text.is_empty());
        let plan = case.plan();
        let edits = plan.edits(case.dialect());
        let usage = case.setting("usage").is_some();
        let edited = match (case.sent(case.exchange().as_mut(), client), case.part("refused")) {
            (Ok(edited), None) => edited,
            (Err(reject), refused) => {
                assert_eq!(Some(&*reject.answer(ErrorShape::OpenAi).body), refused, "{}", case.name);
                continue;
            }
            (Ok(edited), Some(_)) => panic!("{}: sent as {edited:?}", case.name),
        };
        if !case.translates() {
            knows_alike(case, client, &edited);
        }
        assert!(
            edited.body.is_none() || case.translates() || edits.may_change(None),
            "{}: would not have been held",
            case.name
        );
        let sent_as = case.exchange().map(|exchange| BodyDialect::of(exchange.api().sent_as()));
        let dialect = sent_as.unwrap_or_else(|| case.dialect());
        let asks = if usage && edits.leaves_usage() { asking(client, &edited, dialect) } else { None };
        let is_asked = asks.is_some() && !case.translates();
        let sent = asks.or(edited.body).map(|body| String::from_utf8_lossy(&body).into_owned());
        assert_eq!(sent.as_deref(), wanted, "{}", case.name);
        let asked = edited.added_fields;
        let asked = [("usage", is_asked), ("logprobs", asked.logprobs), ("token_ids", asked.token_ids)];
        let asked: Vec<&str> = asked.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
        assert_eq!(asked.join(" "), case.setting("asked").unwrap_or_default(), "{}", case.name);
    }
    assert!(cases.len() >= 90, "{} cases", cases.len());
}

#[test]
fn answers_reach_the_client_as_they_should() {
    let cases = cases("answers.txt");
    for case in &cases {
        let answer = case.part("answer").unwrap_or_else(|| panic!("{}: no answer", case.name));
        let wanted = case.part("told").filter(|text| !text.is_empty()).unwrap_or(answer);
        for size in [usize::MAX, 1, 2, 3, 7, 64] {
            let told = case.told(&format!("{answer}\n\n"), size);
            assert_eq!(told.trim_end_matches('\n'), wanted, "{} in pieces of {size}", case.name);
        }
    }
    assert!(cases.len() >= 70, "{} cases", cases.len());
}
