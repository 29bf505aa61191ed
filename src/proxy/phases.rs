//! The phases of a request while it is in progress, in the little room that an open stream has for them.

use std::time::Duration;

use crate::observe::request::RequestTimes;

/// A time in seconds; NaN: none. Exact to a microsecond in the first quarter of a minute, and to a
/// ten-millionth of itself later.
#[derive(Clone, Copy)]
pub(super) struct CompactTime(f32);

/// The times of `RequestTimes`, in a quarter of the room. The watch has the last piece.
#[derive(Clone, Copy)]
pub(super) struct RequestPhases {
    queued: CompactTime,
    body_wait: CompactTime,
    pub chosen: CompactTime,
    pub connected: CompactTime,
    pub sent: CompactTime,
    pub first_byte: CompactTime,
    pub accepted: CompactTime,
    pub forwarded: CompactTime,
    max_gap: CompactTime,
}

// === impl CompactTime ===

impl CompactTime {
    const NONE: CompactTime = CompactTime(f32::NAN);

    /// The time, if there is one, in whole microseconds.
    pub(super) fn get(self) -> Option<Duration> {
        let micros = f64::from(self.0) * 1e6;
        (!self.0.is_nan()).then(|| Duration::from_micros(micros.round() as u64))
    }
}

impl From<Duration> for CompactTime {
    fn from(time: Duration) -> Self {
        CompactTime(time.as_secs_f32())
    }
}

// === impl RequestPhases ===

impl RequestPhases {
    /// The phases of a request that has just come.
    pub(super) const BEGIN: RequestPhases = RequestPhases {
        queued: CompactTime(0.0),
        body_wait: CompactTime(0.0),
        chosen: CompactTime::NONE,
        connected: CompactTime::NONE,
        sent: CompactTime::NONE,
        first_byte: CompactTime::NONE,
        accepted: CompactTime::NONE,
        forwarded: CompactTime::NONE,
        max_gap: CompactTime::NONE,
    };

    /// Adds a time in the queue for room.
    pub(super) fn add_queued(&mut self, time: Duration) {
        self.queued.0 += time.as_secs_f32();
    }

    /// Adds a time in which the client's body was awaited.
    pub(super) fn add_body_wait(&mut self, time: Duration) {
        self.body_wait.0 += time.as_secs_f32();
    }

    /// Another upstream was chosen at this time: the phases of the attempt before are dropped.
    pub(super) fn begin_attempt(&mut self, chosen: Duration) {
        let RequestPhases { queued, body_wait, .. } = *self;
        *self = RequestPhases { queued, body_wait, chosen: chosen.into(), ..RequestPhases::BEGIN };
    }

    /// A piece of a stream was awaited for this time.
    pub(super) fn add_gap(&mut self, gap: Duration) {
        // The greater of a number and NaN is the number.
        self.max_gap.0 = self.max_gap.0.max(gap.as_secs_f32());
    }

    /// The times for the record.
    pub(super) fn times(&self, last_piece: Option<Duration>) -> RequestTimes {
        RequestTimes {
            queued: self.queued.get().unwrap_or_default(),
            body_wait: self.body_wait.get().unwrap_or_default(),
            chosen: self.chosen.get(),
            connected: self.connected.get(),
            sent: self.sent.get(),
            first_byte: self.first_byte.get(),
            accepted: self.accepted.get(),
            forwarded: self.forwarded.get(),
            last_piece,
            max_gap: self.max_gap.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compact_time_keeps_its_microseconds() {
        assert_eq!(CompactTime::NONE.get(), None);
        for micros in [0, 1, 17, 999, 1_001, 232_000, 3_000_001, 15_999_999] {
            let time = Duration::from_micros(micros);
            assert_eq!(CompactTime::from(time).get(), Some(time));
        }
        let hours = Duration::from_secs(7 * 3600 + 11);
        let kept = CompactTime::from(hours).get().unwrap();
        assert!(kept.abs_diff(hours) < Duration::from_millis(3), "{kept:?}");
    }
}
