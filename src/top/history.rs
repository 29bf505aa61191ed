//! The latest numbers of the counters, from which rates, shares and sparklines are made.

use std::collections::VecDeque;

/// The number of samples that are kept: as many as a sparkline has bars, and one before the first.
const KEPT_SAMPLES: usize = 31;

/// The seconds over which a rate is taken.
const RATE_SECONDS: f64 = 5.0;

/// The counters of an upstream, or of the whole balancer, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct CounterSample {
    /// Seconds since 1970.
    pub time: f64,
    pub requests: u64,
    /// Failed attempts, or requests that ended with an error.
    pub failures: u64,
    pub prompt: u64,
    pub output: u64,
    pub predicted: u64,
    pub reported: u64,
    /// Prompt tokens of the answers that reported cached ones.
    pub compared: u64,
}

/// The latest samples, the newest last.
#[derive(Clone, Debug, Default)]
pub(super) struct CounterHistory(VecDeque<CounterSample>);

// === impl CounterHistory ===

impl CounterHistory {
    /// Adds a sample. Counters that fell belong to another process: what was before is dropped.
    pub(super) fn add(&mut self, sample: CounterSample) {
        if self.0.back().is_some_and(|last| sample.requests < last.requests || sample.time < last.time) {
            self.0.clear();
        }
        if self.0.len() == KEPT_SAMPLES {
            self.0.pop_front();
        }
        self.0.push_back(sample);
    }

    /// The rate of a counter for each second; `None` until two samples are there.
    pub(super) fn rate(&self, counter: impl Fn(&CounterSample) -> u64) -> Option<f64> {
        let last = self.0.back()?;
        let mut earlier = self.0.iter().rev().skip(1);
        let first = earlier.clone().take_while(|first| last.time - first.time <= RATE_SECONDS * 1.01).last();
        let first = first.or_else(|| earlier.next())?;
        rate_between(first, last, &counter)
    }

    /// The share of one counter in another: over the samples, else since the start.
    pub(super) fn share(
        &self,
        part: impl Fn(&CounterSample) -> u64,
        whole: impl Fn(&CounterSample) -> u64,
    ) -> Option<f64> {
        let (first, last) = (self.0.front()?, self.0.back()?);
        let grown = |counter: &dyn Fn(&CounterSample) -> u64| counter(last).saturating_sub(counter(first));
        match (grown(&whole), whole(last)) {
            (0, 0) => None,
            (0, all) => Some(part(last) as f64 / all as f64),
            (all, _) => Some(grown(&part) as f64 / all as f64),
        }
    }

    /// The rates of requests between the samples, for a sparkline of so many bars.
    pub(super) fn bars(&self, count: usize) -> impl Iterator<Item = Option<f64>> + Clone {
        let rates = self.0.iter().zip(self.0.iter().skip(1));
        let skipped = self.0.len().saturating_sub(1).saturating_sub(count);
        let missing = (count + 1).saturating_sub(self.0.len().max(1));
        let known =
            rates.skip(skipped).map(|(first, last)| rate_between(first, last, &|sample| sample.requests));
        std::iter::repeat_n(None, missing).chain(known)
    }
}

fn rate_between(
    first: &CounterSample,
    last: &CounterSample,
    counter: &dyn Fn(&CounterSample) -> u64,
) -> Option<f64> {
    let seconds = last.time - first.time;
    (seconds > 0.0).then(|| counter(last).saturating_sub(counter(first)) as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(samples: &[(f64, u64)]) -> CounterHistory {
        let mut history = CounterHistory::default();
        for (time, requests) in samples {
            history.add(CounterSample { time: *time, requests: *requests, ..CounterSample::default() });
        }
        history
    }

    fn rate(samples: &[(f64, u64)]) -> Option<f64> {
        history(samples).rate(|sample| sample.requests)
    }

    #[test]
    fn a_rate_is_taken_over_some_seconds() {
        assert_eq!(rate(&[]), None);
        assert_eq!(rate(&[(0.0, 5)]), None);
        assert_eq!(rate(&[(0.0, 5), (2.0, 9)]), Some(2.0));
        assert_eq!(rate(&[(0.0, 0), (1.0, 100), (5.0, 100), (6.0, 100)]), Some(0.0));
        assert_eq!(rate(&[(0.0, 0), (60.0, 60)]), Some(1.0), "the pause between the samples was longer");
        assert_eq!(rate(&[(0.0, 900), (1.0, 3), (2.0, 5)]), Some(2.0), "another process counts from 0");
    }

    #[test]
    fn a_sparkline_ends_with_the_newest_rate() {
        let bars = |history: CounterHistory, count| history.bars(count).collect::<Vec<_>>();
        let three = history(&[(0.0, 0), (1.0, 4), (2.0, 4), (4.0, 8)]);
        assert_eq!(bars(three.clone(), 5), [None, None, Some(4.0), Some(0.0), Some(2.0)]);
        assert_eq!(bars(three, 2), [Some(0.0), Some(2.0)]);
        assert_eq!(bars(history(&[]), 2), [None, None]);
        assert_eq!(bars(history(&[(0.0, 0)]), 2), [None, None]);
        let long: Vec<(f64, u64)> = (0..100).map(|second| (f64::from(second), 1)).collect();
        assert_eq!(history(&long).0.len(), KEPT_SAMPLES);
    }

    #[test]
    fn a_share_is_that_of_the_latest_tokens() {
        let mut history = CounterHistory::default();
        let mut add = |time, compared, reported| {
            history.add(CounterSample { time, compared, reported, ..CounterSample::default() });
            history.share(|sample| sample.reported, |sample| sample.compared)
        };
        assert_eq!(add(0.0, 0, 0), None);
        assert_eq!(add(1.0, 100, 50), Some(0.5));
        assert_eq!(add(2.0, 200, 150), Some(0.75));
        let mut still = CounterHistory::default();
        still.add(CounterSample { compared: 100, reported: 25, ..CounterSample::default() });
        assert_eq!(still.share(|sample| sample.reported, |sample| sample.compared), Some(0.25));
    }
}
