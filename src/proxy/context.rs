//! What is known of one request, from its head to its end. Kept small: it lives as long as the stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::memory::Reservation;
use super::peek::Wanted;
use super::replay::{Home, Replay};
use super::settings::Settings;
use crate::fleet::{Lease, Outcome};
use crate::observe::metrics::METRICS;
use crate::reject::{Reject, Style};
use crate::reply::Reply;

pub struct Context {
    pub started: Instant,
    /// What it began with.
    pub settings: Arc<Settings>,
    /// Counts the request as in flight until the context is dropped, on whatever path.
    _in_flight: InFlight,
    pub id: String,
    pub style: Style,
    pub model: Wanted,
    /// Prompt tokens, estimated.
    pub tokens: u64,
    /// The one upstream that may have it, by its id.
    pub only: Option<usize>,
    pub attempts: u32,
    pub lease: Option<Lease>,
    pub home: Option<Home>,
    pub replay: Option<Arc<Replay>>,
    /// Set before an error is returned, for the one place that answers.
    pub reject: Option<Reject>,
    /// The label of a refusal that went out.
    pub refused: Option<&'static str>,
    pub outcome: Option<Outcome>,
    pub status: u16,
    pub first_byte: Option<Duration>,
    /// Watches the answer until its first event, or byte, has come.
    pub reply: Option<Reply>,
    /// Bytes of the request's body that went to the upstream.
    pub received: u64,
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
    pub fn new(settings: Arc<Settings>) -> Self {
        Context {
            started: Instant::now(),
            settings,
            _in_flight: InFlight::new(),
            id: String::new(),
            style: Style::OpenAi,
            model: Wanted::Any,
            tokens: 0,
            only: None,
            attempts: 0,
            lease: None,
            home: None,
            replay: None,
            reject: None,
            refused: None,
            outcome: None,
            status: 0,
            first_byte: None,
            reply: None,
            received: 0,
            samples: None,
        }
    }

    /// Holds what was peeked until no attempt can follow.
    pub fn hold(&mut self, body: bytes::Bytes, reservation: Reservation) -> Arc<Replay> {
        let replay = Replay::new(body, reservation);
        self.replay = Some(replay.clone());
        replay
    }

    /// Looks at a piece of the answer: with its first event, or byte, the prefill is over.
    pub fn watch(&mut self, piece: &[u8]) {
        let Some(reply) = &mut self.reply else { return };
        reply.feed(piece);
        if reply.first().is_some() {
            self.reply = None;
            self.first_byte = Some(self.started.elapsed());
            if let Some(lease) = &mut self.lease {
                lease.first_byte();
            }
        }
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
