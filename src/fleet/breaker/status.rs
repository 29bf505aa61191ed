//! The state of an upstream as its machine shows it: what it admits, and how warm it is. Pure.

use std::time::{Duration, Instant};

/// The time in which an upstream that came back grows to its full weight: its cache is cold and its kernels
/// are not compiled.
const WARM_UP: Duration = Duration::from_secs(10);

/// The share of its weight with which an upstream that came back begins.
const COLD_WEIGHT_SHARE: f64 = 0.1;

/// The number of requests in flight up to which an upstream that came back has its full weight; it grows by
/// one a second. Without it the upstream would get no requests beside idle upstreams, which cost a tenth.
const FULL_WEIGHT_REQUESTS: u64 = 1;

/// The state of one upstream, as the admin API and the metrics show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamState {
    /// Not reached since it was configured.
    Unknown,
    Ready,
    /// A failure was seen; the next probe runs at once.
    Suspect,
    /// Does not answer.
    Down,
    /// Finishes its requests and takes no new ones.
    Draining,
    /// Answers probes but fails too many requests.
    Tripped,
}

impl UpstreamState {
    /// All states, for metrics that have one series a state.
    pub const ALL: [UpstreamState; 6] = [
        UpstreamState::Unknown,
        UpstreamState::Ready,
        UpstreamState::Suspect,
        UpstreamState::Down,
        UpstreamState::Draining,
        UpstreamState::Tripped,
    ];

    /// Returns the name of the state in logs, metrics and the admin API.
    pub fn label(self) -> &'static str {
        match self {
            UpstreamState::Unknown => "unknown",
            UpstreamState::Ready => "ready",
            UpstreamState::Suspect => "suspect",
            UpstreamState::Down => "down",
            UpstreamState::Draining => "draining",
            UpstreamState::Tripped => "tripped",
        }
    }
}

/// Which requests an upstream admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Admits {
    None,
    /// One trial request at a time.
    One,
    /// Requests that no better upstream can take.
    Last,
    All,
}

/// The facts about an upstream that routing needs; valid until the next event of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpstreamStatus {
    pub state: UpstreamState,
    /// When `state` began.
    pub since: Instant,
    /// Probes show that its process no longer works; also set while an operator drains it.
    pub gone: bool,
    /// Connections are refused: its process and its memory are gone.
    pub lost: bool,
    /// Never reached although it was probed; when it will answer is unknown.
    pub missing: bool,
    /// An operator drains it.
    pub drained: bool,
    pub(super) admits: Admits,
    /// The end of a trip; the upstream admits nothing before it.
    pub(super) opens: Option<Instant>,
    pub(super) warm_since: Option<Instant>,
}

impl UpstreamStatus {
    /// Returns which requests the upstream admits at `now`.
    pub fn admits(&self, now: Instant) -> Admits {
        match self.opens {
            Some(opens) if now < opens => Admits::None,
            _ => self.admits,
        }
    }

    /// Whether the upstream admits all requests until the next event.
    pub fn is_steady(&self) -> bool {
        self.opens.is_none() && self.admits == Admits::All
    }

    /// Returns the time from which on the upstream has its full weight; `None`: it has it.
    pub fn warm_at(&self) -> Option<Instant> {
        self.warm_since.map(|since| since + WARM_UP)
    }

    /// Returns the end of the trip; `None` when the upstream is not tripped or is gone.
    pub fn trip_end(&self) -> Option<Instant> {
        self.opens.filter(|_| !self.gone)
    }

    /// Returns the share of its weight that the upstream has with `active` requests in flight: full for the
    /// first few, its warmth beyond them.
    pub fn weight_share(&self, active: u64, now: Instant) -> f64 {
        let Some(since) = self.warm_since else { return 1.0 };
        let full_weight = FULL_WEIGHT_REQUESTS + now.saturating_duration_since(since).as_secs();
        if active < full_weight { 1.0 } else { self.warmth(now) }
    }

    /// Returns the share of its weight that the upstream has recovered: below 1 for a while after it came
    /// back.
    pub fn warmth(&self, now: Instant) -> f64 {
        let Some(since) = self.warm_since else { return 1.0 };
        let share = now.saturating_duration_since(since).as_secs_f64() / WARM_UP.as_secs_f64();
        share.clamp(COLD_WEIGHT_SHARE, 1.0)
    }
}
