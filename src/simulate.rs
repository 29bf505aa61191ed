//! Replays a load on a virtual clock, through the product's own choice and prefix index, and simulated
//! engines.
//!
//! ```text
//! session's turn -> one of the balancers: Index::lookup, Hits::charge, Hits::weigh, pick::pick
//!   -> engine::batch -> first token: the backlog falls -> end: the lease ends, the next turn is due
//! ```
//!
//! The choice is the product's own code, so the results hold for the product. The bookkeeping follows the
//! product too: a chain is learned when it is sent, its uncached tokens are backlog until the first token,
//! and the index holds as many blocks of each upstream as its cache.
//!
//! Several balancers each get a random share of the requests, and publish what they know: see `exchange`. All
//! randomness comes from the seed; the same load, setup and policy give the same row.

mod balancer;
mod captured;
mod exchange;
pub mod load;
pub mod policy;
pub mod report;
mod scene;
pub mod shapes;
pub mod trace;

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;

use self::balancer::{EngineView, Placed, PlacementRequest, ReplayBalancer, ReplayLoad};
use self::exchange::{PublishedFlights, ReplayExchange};
use self::load::Workload;
use self::policy::ReplayPolicy;
use self::report::{Life, ReportRow};
use self::scene::{PendingPrefill, ScrapedMetrics};
use crate::engine::batch::{EngineEventKind, EngineLimits, EngineRequest, Finish, SimulatedEngine, Timing};
use crate::engine::dice::Dice;
use crate::pick::Candidate;
use crate::state::prefix_index::Hits;

/// The interval between two readings of the engines' metrics, in seconds.
const SCRAPE_SECONDS: f64 = 1.0;

/// The settings of a replay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setup {
    pub upstreams: usize,
    pub balancers: usize,
    /// Whether turns come by the clock; otherwise each waits for the answer before it.
    pub open: bool,
    /// Seconds between two messages of a balancer to its siblings; `None`: no messages.
    pub interval: Option<f64>,
    /// The tokens that an engine's cache holds.
    pub cache_tokens: usize,
    /// The factor by which engines are faster than about one H100.
    pub speed: f64,
    pub seed: u64,
}

/// A turn that is due.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Due {
    at: f64,
    session: usize,
    turn: usize,
}

/// A request that was sent. Its id on the engines is its index in the list.
#[derive(Clone, Copy)]
struct Flight {
    session: usize,
    turn: usize,
    balancer: usize,
    placed: Placed,
    sent: f64,
}

struct Replay<'a> {
    load: &'a Workload,
    setup: Setup,
    due: BinaryHeap<Reverse<Due>>,
    engines: Vec<SimulatedEngine>,
    balancers: Vec<ReplayBalancer>,
    flights: Vec<Flight>,
    lives: Vec<Life>,
    refused: usize,
    metrics: Vec<ScrapedMetrics>,
    scraped: f64,
    exchange: ReplayExchange,
    /// The sum of the gauges that the present balancer has read of its siblings.
    others: Vec<ReplayLoad>,
    dice: Dice,
}

/// Replays the load and returns the results; `None` when there are more upstreams than a balancer can have.
pub fn run(load: &Workload, setup: Setup, policy: ReplayPolicy) -> Option<ReportRow> {
    let mut replay = Replay::new(load, setup, policy)?;
    replay.run();
    Some(ReportRow::new(policy.name(), setup.upstreams, &replay.lives, replay.refused))
}

// === impl Replay ===

impl<'a> Replay<'a> {
    fn new(load: &'a Workload, setup: Setup, policy: ReplayPolicy) -> Option<Self> {
        let limits = EngineLimits {
            block_size: load.block,
            cache_tokens: setup.cache_tokens,
            report_tokens: false,
            ..EngineLimits::default()
        };
        let engine = || SimulatedEngine::new(limits.clone(), Timing::faster(setup.speed));
        let blocks = setup.cache_tokens / load.block * load::index_parts(load.block);
        let balancer = |number| {
            ReplayBalancer::new(policy, setup.upstreams, blocks, Dice::of(setup.seed, 1000 + number))
        };
        let first = |(session, of): (usize, &load::ReplayConversation)| {
            Reverse(Due { at: of.start, session, turn: 0 })
        };
        Some(Replay {
            load,
            setup,
            due: load.sessions.iter().enumerate().map(first).collect(),
            engines: (0..setup.upstreams).map(|_| engine()).collect(),
            balancers: (0..setup.balancers as u64).map(balancer).collect::<Option<_>>()?,
            flights: Vec::with_capacity(load.requests()),
            lives: Vec::with_capacity(load.requests()),
            refused: 0,
            metrics: vec![ScrapedMetrics::default(); setup.upstreams],
            scraped: 0.0,
            exchange: ReplayExchange::new(setup.balancers, setup.upstreams, setup.interval),
            others: vec![ReplayLoad::default(); setup.upstreams],
            dice: Dice::of(setup.seed, 2),
        })
    }

    /// Runs until no turn is due and all engines are idle.
    fn run(&mut self) {
        loop {
            let next = self
                .engines
                .iter()
                .filter_map(SimulatedEngine::next_event_time)
                .fold(f64::INFINITY, f64::min);
            let due = self.due.peek().map_or(f64::INFINITY, |due| due.0.at);
            if next.min(due) == f64::INFINITY {
                return;
            }
            if next <= due {
                self.exchange(next);
                self.advance(next);
            } else if let Some(Reverse(due)) = self.due.pop() {
                self.exchange(due.at);
                self.scrape(due.at);
                self.send(due);
            }
        }
    }

    fn advance(&mut self, now: f64) {
        for at in 0..self.engines.len() {
            if self.engines[at].next_event_time().is_none_or(|next| next > now) {
                continue;
            }
            for event in self.engines[at].advance(now) {
                let flight = self.flights[event.id as usize];
                let balancer = &mut self.balancers[flight.balancer];
                match event.kind {
                    EngineEventKind::FirstToken { .. } => {
                        let time = Duration::from_secs_f64(event.at - flight.sent);
                        balancer.first_byte(flight.placed, event.at, time);
                    }
                    EngineEventKind::Token => {}
                    EngineEventKind::Finished(summary) => {
                        balancer.ended(flight.placed, summary.prompt_tokens as u64);
                        self.lives.push(Life::new(at, &summary, event.at, flight.placed.forecast));
                        if !self.setup.open {
                            self.next_turn(flight, event.at);
                        }
                    }
                }
            }
        }
    }

    fn next_turn(&mut self, flight: Flight, now: f64) {
        let turn = flight.turn + 1;
        if let Some(next) = self.load.sessions[flight.session].turns.get(turn) {
            self.due.push(Reverse(Due { at: now + next.wait, session: flight.session, turn }));
        }
    }

    fn placement_request(&self, session: usize, turn: usize) -> PlacementRequest<'a> {
        let (block, of) = (self.load.block, &self.load.sessions[session]);
        let tokens = of.turns[turn].prompt as u64;
        PlacementRequest { prompt: of.prompt(turn, block), end: of.end(turn, block), tokens, block }
    }

    fn send(&mut self, due: Due) {
        let Due { at: now, session, turn } = due;
        let ask = self.placement_request(session, turn);
        let number = self.dice.between(0, self.setup.balancers - 1);
        let age = self.exchange.sum_others(number, now, &mut self.others);
        let Replay { load, engines, balancers, flights, metrics, others, .. } = self;
        let reveal = |at: usize, hits: &Hits, candidate: &mut Candidate| {
            let engine = &engines[at];
            let pending = |(id, left): (u64, Option<usize>)| {
                let Flight { session, turn, .. } = flights[id as usize];
                let of = &load.sessions[session];
                PendingPrefill { prompt: of.prompt(turn, load.block), tokens: of.turns[turn].prompt, left }
            };
            let pending: Vec<PendingPrefill<'_>> = engine.prefills().map(pending).collect();
            scene::reveal(engine, &pending, ask.prompt, hits, candidate);
        };
        let placed = balancers[number].place(ask, &EngineView { now, metrics, others, age, reveal: &reveal });
        self.launch(Flight { session, turn, balancer: number, placed, sent: now }, now);
    }

    fn launch(&mut self, flight: Flight, now: f64) {
        let Flight { session, turn, balancer, placed, .. } = flight;
        let (id, of) = (self.flights.len(), &self.load.sessions[session]);
        self.flights.push(flight);
        let request = EngineRequest {
            id: id as u64,
            prompt_tokens: of.turns[turn].prompt,
            output_tokens: of.turns[turn].output,
            chain: of.whole(turn, self.load.block).to_vec(),
            finish: Finish::Stop,
            use_cache: true,
        };
        let tokens = request.prompt_tokens as u64;
        let refused = self.engines[placed.upstream].submit(now, request).is_err();
        if refused {
            self.refused += 1;
            self.balancers[balancer].refused(placed, tokens);
        }
        self.exchange.take_flight(balancer, id, self.balancers[balancer].gauges(), now);
        if refused || self.setup.open {
            self.next_turn(flight, now);
        }
    }

    /// Lets every balancer that is due publish, and its siblings read what has arrived.
    fn exchange(&mut self, now: f64) {
        self.exchange.publish_due(&self.balancers, now);
        while let Some(PublishedFlights { balancer, flights }) = self.exchange.read_next(now) {
            for id in flights {
                let Flight { session, turn, placed, .. } = self.flights[id];
                let ask = self.placement_request(session, turn);
                let siblings =
                    self.balancers.iter_mut().enumerate().filter(|(sibling, _)| *sibling != balancer);
                siblings.for_each(|(_, sibling)| sibling.learn(ask, placed.upstream));
            }
        }
    }

    fn scrape(&mut self, now: f64) {
        if now < self.scraped {
            return;
        }
        self.scraped = now + SCRAPE_SECONDS;
        for (metrics, engine) in self.metrics.iter_mut().zip(&self.engines) {
            *metrics = ScrapedMetrics { waiting: engine.waiting(), usage: engine.kv_usage() };
        }
    }
}

// === impl Due ===

impl Eq for Due {}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at.total_cmp(&other.at).then(self.session.cmp(&other.session)).then(self.turn.cmp(&other.turn))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests;
