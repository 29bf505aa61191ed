//! What is known of one request, from its head to its end. Kept small: it lives as long as the stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::ask::Ask;
use super::attempt::{self, Cause};
use super::face::Face;
use super::leave::{self, Leave};
use super::line::Line;
use super::peek::Wanted;
use super::prompt::Rest;
use super::replay::Replay;
use super::served;
use super::session::Home;
use super::settings::Settings;
use super::stored::Making;
use crate::config::types::{Retry, Timeouts};
use crate::fleet::{Lease, Outcome, Snapshot, Upstream};
use crate::observe::metrics::METRICS;
use crate::reject::{Reject, Style};
use crate::reply::ending::{Form, Tail};
use crate::reply::judge::Judge;
use crate::reply::sse::Events;
use crate::reply::usage::{Meter, Usage};
use crate::state::{Asked, Learnt};

pub struct Context {
    pub started: Instant,
    /// What it began with.
    pub settings: Arc<Settings>,
    /// Counts the request as in flight until the context is dropped, on whatever path.
    _in_flight: (InFlight, leave::InFlight),
    pub id: String,
    /// A call to the admin room, which is no client's request.
    pub admin: bool,
    pub style: Style,
    pub model: Wanted,
    /// What its route makes of it.
    pub face: Option<Box<Face>>,
    /// Its stream is asked for its usage on our own account.
    pub ask: Option<Box<Ask>>,
    /// Prompt tokens, estimated.
    pub tokens: u64,
    /// What is known of its prompt, and what follows it behind the peek.
    pub asked: Asked,
    pub rest: Option<Box<Rest>>,
    /// The answer is to come as a stream.
    pub streams: bool,
    /// What the present upstream was believed to hold, in blocks of so many, and in tokens.
    pub hit: u64,
    pub blocks: usize,
    pub predicted: u64,
    /// To take it back, as long as nothing was `sent`.
    pub learnt: Option<Learnt>,
    pub sent: bool,
    /// Decoded, and without the session.
    pub path: String,
    /// The session that the path names.
    pub session: Option<String>,
    /// The session, wherever it is named, in the form in which it is told.
    pub told_session: Option<String>,
    /// The interface has answers that count tokens.
    pub counts: bool,
    /// Reads what the answer says that it took.
    pub meter: Option<Box<Meter>>,
    /// Events of a Responses stream, whose first two come before the prompt is read.
    pub events: Option<Box<Events>>,
    /// A response that its upstream keeps is being made.
    pub making: Option<Box<Making>>,
    /// The one upstream that may have it, by its id.
    pub only: Option<usize>,
    /// The response that it should have, where nobody says so but the response's id.
    pub unproven: Option<Box<str>>,
    /// It names where its keys and values lie: no other upstream has them.
    pub pinned: bool,
    pub attempts: u32,
    /// Until when it waits for room.
    pub wait_until: Option<Instant>,
    /// Upstreams that have had it, by their ids.
    pub tried: Vec<usize>,
    /// Of those, the ones that would not have it.
    pub away: Vec<usize>,
    pub lease: Option<Lease>,
    /// Why the lease's upstream was chosen.
    pub reason: &'static str,
    /// The upstream of the last attempt that failed.
    pub last: Option<Arc<Upstream>>,
    /// The present attempt has an answer's head.
    pub head_came: bool,
    /// An attempt met a pooled connection that had ended.
    pub was_stale: bool,
    /// Why the present attempt is given up, and that another may follow.
    pub cause: Option<Cause>,
    pub allowed: bool,
    /// What the client is told when nobody is left to ask.
    pub failed: Option<Reject>,
    pub home: Option<Home>,
    pub line: Option<Arc<Line>>,
    pub replay: Option<Arc<Replay>>,
    /// Set before an error is returned, for the one place that answers.
    pub reject: Option<Reject>,
    /// The label of a refusal that went out.
    pub refused: Option<&'static str>,
    pub outcome: Option<Outcome>,
    /// What the client still sends is read before the connection ends, so that it gets to read a refusal.
    pub drain: bool,
    pub status: u16,
    /// The code of an error that the answer begins with, whatever its status.
    pub failed_at_once: Option<u16>,
    pub first_byte: Option<Duration>,
    /// Looks at the beginning of the answer until it is known to be the client's.
    pub judge: Option<Judge>,
    /// How the interface's events look, and where the stream stands.
    pub form: Form,
    pub stream: Option<Tail>,
    /// The last events of a stream that cannot go on, where it says them itself.
    pub last_words: Option<Bytes>,
    /// Bytes of the request's body that went to the upstream.
    pub received: u64,
    /// The most that may come. A body that was read whole has been measured as its client sent it: what a
    /// route puts into it does not count.
    pub most: u64,
    /// Beginnings of the bodies, where they are logged.
    pub samples: Option<Box<Samples>>,
}

/// The beginnings of a request's and its answer's body.
pub struct Samples {
    pub request: Vec<u8>,
    pub answer: Vec<u8>,
    pub most: usize,
}

impl Samples {
    pub fn keep(sample: &mut Vec<u8>, most: usize, piece: &[u8]) {
        let room = most.saturating_sub(sample.len());
        sample.extend_from_slice(&piece[..piece.len().min(room)]);
    }
}

impl Context {
    pub fn new(settings: Arc<Settings>, leave: Arc<Leave>) -> Self {
        Context {
            started: Instant::now(),
            settings,
            _in_flight: (InFlight::new(), leave::InFlight::new(leave)),
            id: String::new(),
            admin: false,
            style: Style::OpenAi,
            model: Wanted::Any,
            face: None,
            ask: None,
            tokens: 0,
            asked: Asked::default(),
            rest: None,
            streams: false,
            hit: 0,
            blocks: 0,
            predicted: 0,
            learnt: None,
            path: String::new(),
            session: None,
            told_session: None,
            counts: false,
            meter: None,
            sent: false,
            events: None,
            making: None,
            only: None,
            unproven: None,
            pinned: false,
            attempts: 0,
            wait_until: None,
            tried: Vec::new(),
            away: Vec::new(),
            lease: None,
            reason: "",
            last: None,
            head_came: false,
            was_stale: false,
            cause: None,
            allowed: false,
            failed: None,
            home: None,
            line: None,
            replay: None,
            reject: None,
            refused: None,
            outcome: None,
            drain: false,
            status: 0,
            failed_at_once: None,
            first_byte: None,
            judge: None,
            form: Form::Data,
            stream: None,
            last_words: None,
            received: 0,
            most: u64::MAX,
            samples: None,
        }
    }

    /// Whether a pooled connection that failed had just ended by itself: an upstream closes idle ones
    /// alone, so that it shows at once, before any of an answer. Said of two in a row it is no explanation.
    pub fn may_be_stale(&self) -> bool {
        let at_once = self.line.as_ref().is_some_and(|line| line.since_sent() < Duration::from_secs(1));
        at_once && !self.head_came && !self.was_stale
    }

    /// The answer is the client's: with its first event, or byte, the prefill is over, and its head may go
    /// out. Once it has, no attempt can follow.
    pub fn accept(&mut self) {
        self.judge = None;
        self.failed = None;
        if self.events.is_none() {
            self.prefilled();
        }
        if let Some(line) = &self.line {
            line.let_go();
        }
    }

    /// Once some of the answer has gone out no attempt can follow: what another would be chosen by, which may
    /// be long, goes. Before that an engine may still die right behind its first event.
    pub fn go_out(&mut self) {
        let held = || self.replay.as_ref().is_some_and(|replay| replay.is_whole());
        if !self.asked.chain.is_empty() && self.has_read() && !held() {
            self.learnt = None;
            self.asked.chain = Vec::new();
        }
    }

    /// Whether the engine may have read the prompt.
    pub fn has_read(&self) -> bool {
        self.sent && !attempt::is_refusal(self.failed_at_once.unwrap_or(self.status))
    }

    /// The prompt has been read: the first event, or byte, of what the model says is there.
    pub fn prefilled(&mut self) {
        let now = Instant::now();
        self.first_byte.get_or_insert_with(|| now.saturating_duration_since(self.started));
        // What was refused was never read, and teaches nothing.
        let teaches = self.status == 200 && self.failed_at_once.is_none();
        match &mut self.lease {
            Some(lease) if teaches => drop(lease.first_byte(now)),
            Some(lease) => drop(lease.end_prefill()),
            None => {}
        }
    }

    pub fn retry(&self) -> &Retry {
        self.face.as_ref().map_or(&self.settings.retry, |face| &face.plan.route.retry)
    }

    pub fn timeouts(&self) -> Timeouts {
        self.face.as_ref().map_or(self.settings.timeouts, |face| face.plan.route.timeouts)
    }

    /// The name that the client gave the model.
    pub fn client_model(&self) -> Option<&str> {
        self.face.as_ref().map_or(self.model.name(), |face| face.model.as_deref())
    }

    /// What the answer has said that it took, as far as it came.
    pub fn usage(&self) -> Option<Usage> {
        self.meter.as_ref().map(|meter| meter.usage())
    }

    /// The upstreams that its route leads to; `None`: all. A request that can go to one alone goes there.
    pub fn among(&self, snapshot: &Snapshot) -> Option<Vec<usize>> {
        if self.only.is_some() {
            return None;
        }
        served::among(&self.face.as_ref()?.plan.route, snapshot)
    }

    /// The names of the upstreams that its route leads to; `None` as for `among`.
    pub fn names(&self) -> Option<&[String]> {
        let face = self.face.as_ref().filter(|_| self.only.is_none())?;
        face.plan.route.upstreams.as_deref()
    }

    /// No attempt can follow: what is held for one goes.
    pub fn settle(&mut self) {
        if let Some(replay) = self.replay.take() {
            replay.release();
        }
    }
}

struct InFlight;

impl InFlight {
    fn new() -> Self {
        METRICS.in_flight.inc();
        InFlight
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        METRICS.in_flight.dec();
    }
}
