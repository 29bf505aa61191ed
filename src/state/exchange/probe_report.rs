//! The reports by which one balancer tells its siblings what it found about an upstream.
//!
//! ```text
//! reports   { length  report }*
//! report    name  server (8 bytes)  { field  length  bytes }*
//! ```
//!
//! A field that is unknown is skipped, a field whose content is damaged or implausible counts as absent, and
//! a report whose frame is damaged is skipped alone: no report makes a message unreadable. Times are ages or
//! remaining times, since the clocks of two machines differ.

use std::time::Duration;

use super::wire::{WireReader, put_bytes, put_hash, put_number};

/// The largest list of models in a report, in bytes. A sibling without the list reads it from the upstream.
pub const MAX_CARDS_BYTES: usize = 64 << 10;

/// The largest number of reports that are read from one message.
const MAX_REPORTS: usize = 4096;

/// The longest name of an upstream in a report, in bytes.
const MAX_NAME_BYTES: usize = 1024;

/// The longest version of an engine, in bytes.
const MAX_VERSION_BYTES: usize = 256;

/// The largest plausible count of requests, tokens or seconds.
const MAX_COUNT: u64 = 1_000_000_000_000_000;

/// The longest age or remaining time in a report.
const MAX_TIME: Duration = Duration::from_secs(3600);

/// The kinds of the fields of a report.
mod field {
    /// The outcome of the probe.
    pub(super) const PROBE: u64 = 1;
    /// The cards of the models.
    pub(super) const CARDS: u64 = 2;
    /// The version of the engine.
    pub(super) const VERSION: u64 = 3;
    /// What the metrics of the engine say.
    pub(super) const ENGINE: u64 = 4;
    /// Until when the engine is full.
    pub(super) const BUSY: u64 = 5;
    /// Until when the breaker is open.
    pub(super) const TRIPPED: u64 = 6;
}

/// The findings of one balancer about one upstream; each part may be absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UpstreamReport {
    /// The name of the upstream.
    pub upstream: Box<str>,
    /// Identifies the server behind the name: balancers may give one name to two servers.
    pub server: u64,
    pub probe: Option<ProbeFinding>,
    /// The list of models, as the upstream wrote the cards; only where it has changed.
    pub cards: Option<Box<str>>,
    pub version: Option<Box<str>>,
    pub engine: Option<EngineFinding>,
    /// How long the upstream is full, by its own report.
    pub busy: Option<Duration>,
    /// How long the sender's breaker keeps requests away from the upstream.
    pub tripped: Option<Duration>,
}

/// The result of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeFinding {
    pub age: Duration,
    pub good: bool,
    /// The hash of the list of models.
    pub models: u64,
}

/// The values of a page of an upstream's metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineFinding {
    pub age: Duration,
    pub running: Option<u64>,
    pub waiting: Option<u64>,
    pub kv_usage: Option<f64>,
    pub cache_tokens: Option<u64>,
    /// The start of the process, in seconds since 1970.
    pub started: Option<f64>,
    /// The requests that no balancer has sent, and their prompt tokens that wait.
    pub foreign: Option<(u64, u64)>,
    /// Whether the engine caches prompts.
    pub prefix_caching: Option<bool>,
}

// === impl UpstreamReport ===

impl UpstreamReport {
    /// Appends a report to the part of a message.
    pub(super) fn write(&self, part: &mut Vec<u8>) {
        let mut out = Vec::new();
        put_bytes(&mut out, self.upstream.as_bytes());
        put_hash(&mut out, self.server);
        let mut put = |kind: u64, bytes: &[u8]| {
            put_number(&mut out, kind);
            put_bytes(&mut out, bytes);
        };
        if let Some(ProbeFinding { age, good, models }) = self.probe {
            let mut bytes = time(age);
            bytes.push(u8::from(good));
            put_hash(&mut bytes, models);
            put(field::PROBE, &bytes);
        }
        if let Some(cards) = &self.cards {
            put(field::CARDS, cards.as_bytes());
        }
        if let Some(version) = &self.version {
            put(field::VERSION, version.as_bytes());
        }
        if let Some(engine) = &self.engine {
            put(field::ENGINE, &engine.write());
        }
        for (kind, left) in [(field::BUSY, self.busy), (field::TRIPPED, self.tripped)] {
            if let Some(left) = left {
                put(kind, &time(left));
            }
        }
        put_bytes(part, &out);
    }

    /// Reads all reports of a part. Returns `None` when the frame of the part is damaged.
    pub(super) fn read_all(part: &mut WireReader<'_>) -> Option<Vec<Self>> {
        let mut all = Vec::new();
        while !part.is_empty() {
            let report = part.bytes()?;
            if all.len() < MAX_REPORTS {
                all.extend(Self::read(WireReader::new(report)));
            }
        }
        Some(all)
    }

    fn read(mut reader: WireReader<'_>) -> Option<Self> {
        let upstream = reader.text().filter(|name| name.len() <= MAX_NAME_BYTES)?.into();
        let mut report = UpstreamReport { upstream, server: reader.hash()?, ..UpstreamReport::default() };
        while !reader.is_empty() {
            let (kind, bytes) = (reader.number()?, reader.bytes()?);
            let text = |most: usize| {
                let text = std::str::from_utf8(bytes).ok();
                text.filter(|text| text.len() <= most).map(Box::<str>::from)
            };
            let mut value = WireReader::new(bytes);
            match kind {
                field::PROBE => report.probe = ProbeFinding::read(&mut value),
                field::CARDS => report.cards = text(MAX_CARDS_BYTES),
                field::VERSION => report.version = text(MAX_VERSION_BYTES),
                field::ENGINE => report.engine = EngineFinding::read(&mut value),
                field::BUSY => report.busy = read_time(&mut value),
                field::TRIPPED => report.tripped = read_time(&mut value),
                _ => {}
            }
        }
        Some(report)
    }
}

fn time(time: Duration) -> Vec<u8> {
    let mut out = Vec::new();
    put_number(&mut out, u64::try_from(time.min(MAX_TIME).as_millis()).unwrap_or(u64::MAX));
    out
}

/// Reads an age or a remaining time; `None` for an implausible one.
fn read_time(reader: &mut WireReader<'_>) -> Option<Duration> {
    Some(Duration::from_millis(reader.number()?)).filter(|time| *time <= MAX_TIME)
}

// === impl ProbeFinding ===

impl ProbeFinding {
    fn read(reader: &mut WireReader<'_>) -> Option<Self> {
        let (age, good, models) = (read_time(reader)?, reader.byte()?, reader.hash()?);
        Some(ProbeFinding { age, good: good != 0, models })
    }
}

// === impl EngineFinding ===

/// The number of optional values of a finding.
const ENGINE_VALUES: usize = 8;

/// Returns the number that the bits encode, where it is between 0 and `most`. Numbers are encoded exactly:
/// a start that was rounded up would look like a restart.
fn plausible(bits: u64, most: f64) -> Option<f64> {
    Some(f64::from_bits(bits)).filter(|number| (0.0..=most).contains(number))
}

impl EngineFinding {
    /// Encodes the age, a mark for each value that is present, and these values.
    fn write(&self) -> Vec<u8> {
        let mut out = time(self.age);
        let values = [
            self.running,
            self.waiting,
            self.kv_usage.map(f64::to_bits),
            self.cache_tokens,
            self.started.map(f64::to_bits),
            self.foreign.map(|(requests, _)| requests),
            self.foreign.map(|(_, tokens)| tokens),
            self.prefix_caching.map(u64::from),
        ];
        let marks = values.iter().enumerate().map(|(at, value)| u8::from(value.is_some()) << at);
        out.push(marks.sum());
        values.iter().flatten().for_each(|value| put_number(&mut out, *value));
        out
    }

    fn read(reader: &mut WireReader<'_>) -> Option<Self> {
        let (age, marks) = (read_time(reader)?, reader.byte()?);
        let mut values = [None; ENGINE_VALUES];
        for (at, value) in values.iter_mut().enumerate() {
            if marks & (1 << at) != 0 {
                *value = Some(reader.number()?);
            }
        }
        let [running, waiting, kv_usage, cache_tokens, started, requests, tokens, caching] = values;
        let count = |value: Option<u64>| value.filter(|count| *count <= MAX_COUNT);
        Some(EngineFinding {
            age,
            running: count(running),
            waiting: count(waiting),
            kv_usage: kv_usage.and_then(|bits| plausible(bits, 1.0)),
            cache_tokens: count(cache_tokens),
            started: started.and_then(|bits| plausible(bits, MAX_COUNT as f64)),
            foreign: count(requests).zip(count(tokens)),
            prefix_caching: caching.map(|caching| caching != 0),
        })
    }
}

#[cfg(test)]
mod tests;
