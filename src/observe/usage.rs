//! The token usage of all answers by model, by route and by session, for `GET /admin/usage`.
//!
//! The totals are in the memory of this process, since its start; siblings have totals of their own. A number
//! that no answer reported is absent, never 0. Models and routes are bounded by the fleet and the
//! configuration; of sessions, [`MAX_SESSION_TOTALS`] are kept, and the least recently used one is evicted.
//!
//! The lock is a plain mutex. It is taken once at a request's end, for a few look-ups, and never across an
//! await; a reader copies what it needs and releases it.
//!
//! Never: a name of unbounded length, a clock.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::reply::usage::Usage;

/// The number of sessions that are kept.
pub(crate) const MAX_SESSION_TOTALS: usize = 10_000;

/// The usage of several answers together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageTotal {
    pub requests: u64,
    /// The number of requests whose answer had no usage.
    pub unknown: u64,
    /// The sums of the numbers that the other answers reported.
    pub usage: Usage,
}

/// A total, and the time of its last change since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatedTotal {
    pub total: UsageTotal,
    pub last: Duration,
}

/// The labels of an answer's usage.
#[derive(Clone, Copy, Debug, Default)]
pub struct UsageLabels<'a> {
    pub model: &'a str,
    /// Empty when the request matched no route.
    pub route: &'a str,
    pub session: Option<&'a str>,
}

/// The totals of this process.
#[derive(Debug)]
pub struct UsageTotals(Mutex<UsageTables>);

#[derive(Debug)]
struct UsageTables {
    models: BTreeMap<String, UsageTotal>,
    routes: BTreeMap<String, UsageTotal>,
    sessions: HashMap<Arc<str>, SessionTotal>,
    /// Sessions by their last use; the first one is evicted first.
    order: BTreeMap<u64, Arc<str>>,
    /// The number of uses so far.
    uses: u64,
    most: usize,
}

#[derive(Debug)]
struct SessionTotal {
    dated: DatedTotal,
    use_number: u64,
}

// === impl UsageTotal ===

impl UsageTotal {
    fn add(&mut self, usage: &Usage) {
        self.requests += 1;
        self.unknown += u64::from(*usage == Usage::default());
        let sum = |sum: &mut Option<u64>, more: Option<u64>| {
            if let Some(more) = more {
                *sum = Some(sum.unwrap_or(0).saturating_add(more));
            }
        };
        sum(&mut self.usage.prompt_tokens, usage.prompt_tokens);
        sum(&mut self.usage.cached_tokens, usage.cached_tokens);
        sum(&mut self.usage.output_tokens, usage.output_tokens);
        sum(&mut self.usage.reasoning_tokens, usage.reasoning_tokens);
    }
}

// === impl UsageTotals ===

impl Default for UsageTotals {
    fn default() -> Self {
        UsageTotals::new(MAX_SESSION_TOTALS)
    }
}

impl UsageTotals {
    fn new(most: usize) -> Self {
        UsageTotals(Mutex::new(UsageTables {
            models: BTreeMap::new(),
            routes: BTreeMap::new(),
            sessions: HashMap::new(),
            order: BTreeMap::new(),
            uses: 0,
            most,
        }))
    }

    fn tables(&self) -> MutexGuard<'_, UsageTables> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the usage of an answer that ended `at` this time since 1970.
    pub fn add(&self, whose: UsageLabels<'_>, usage: &Usage, at: Duration) {
        let mut tables = self.tables();
        add(&mut tables.models, whose.model, usage);
        if !whose.route.is_empty() {
            add(&mut tables.routes, whose.route, usage);
        }
        if let Some(session) = whose.session {
            tables.session(session, usage, at);
        }
    }

    pub fn models(&self) -> Vec<(String, UsageTotal)> {
        self.tables().models.iter().map(|(name, total)| (name.clone(), *total)).collect()
    }

    pub fn routes(&self) -> Vec<(String, UsageTotal)> {
        self.tables().routes.iter().map(|(name, total)| (name.clone(), *total)).collect()
    }

    /// The most recently used sessions, the latest first.
    pub fn sessions(&self, limit: usize) -> Vec<(Arc<str>, DatedTotal)> {
        let tables = self.tables();
        let names = tables.order.values().rev().take(limit);
        names.filter_map(|name| Some((name.clone(), tables.sessions.get(name)?.dated))).collect()
    }

    pub fn session(&self, name: &str) -> Option<DatedTotal> {
        self.tables().sessions.get(name).map(|kept| kept.dated)
    }
}

fn add(totals: &mut BTreeMap<String, UsageTotal>, name: &str, usage: &Usage) {
    match totals.get_mut(name) {
        Some(total) => total.add(usage),
        None => totals.entry(name.to_string()).or_default().add(usage),
    }
}

// === impl UsageTables ===

impl UsageTables {
    fn session(&mut self, name: &str, usage: &Usage, at: Duration) {
        self.uses += 1;
        let number = self.uses;
        if let Some(kept) = self.sessions.get_mut(name) {
            kept.dated.total.add(usage);
            kept.dated.last = at;
            let before = std::mem::replace(&mut kept.use_number, number);
            if let Some(name) = self.order.remove(&before) {
                self.order.insert(number, name);
            }
            return;
        }
        if self.sessions.len() >= self.most
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.sessions.remove(&oldest);
        }
        let mut dated = DatedTotal { last: at, ..DatedTotal::default() };
        dated.total.add(usage);
        let name: Arc<str> = name.into();
        self.sessions.insert(name.clone(), SessionTotal { dated, use_number: number });
        self.order.insert(number, name);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(session: &str) -> UsageLabels<'_> {
        UsageLabels { model: "m", route: "", session: Some(session) }
    }

    fn usage(prompt: Option<u64>, output: Option<u64>) -> Usage {
        Usage { prompt_tokens: prompt, output_tokens: output, ..Usage::default() }
    }

    #[test]
    fn keeps_unreported_numbers_absent() {
        let totals = UsageTotals::new(10);
        let at = Duration::from_secs(7);
        totals.add(UsageLabels { model: "a", route: "fast", session: None }, &Usage::default(), at);
        assert_eq!(totals.models()[0].1, UsageTotal { requests: 1, unknown: 1, usage: Usage::default() });
        totals.add(UsageLabels { model: "a", route: "", session: None }, &usage(Some(0), None), at);
        totals.add(UsageLabels { model: "a", route: "", session: None }, &usage(Some(5), Some(2)), at);
        let wanted = UsageTotal { requests: 3, unknown: 1, usage: usage(Some(5), Some(2)) };
        assert_eq!(totals.models(), [("a".to_string(), wanted)]);
        assert_eq!(totals.routes().len(), 1, "no route is no name");
        assert_eq!(totals.sessions(10), []);
    }

    #[test]
    fn evicts_the_least_recently_used_session() {
        let totals = UsageTotals::new(2);
        for (session, second) in [("a", 1), ("b", 2), ("a", 3), ("c", 4)] {
            totals.add(of(session), &usage(Some(1), None), Duration::from_secs(second));
        }
        let names: Vec<(String, u64)> =
            totals.sessions(9).iter().map(|(name, dated)| (name.to_string(), dated.last.as_secs())).collect();
        assert_eq!(names, [("c".to_string(), 4), ("a".to_string(), 3)]);
        assert_eq!(totals.sessions(1).len(), 1);
        assert_eq!(totals.session("b"), None);
        assert_eq!(totals.session("a").map(|dated| dated.total.requests), Some(2));
    }

    proptest! {
        /// Compares with a simple model: a list of all uses, of which the last distinct names count.
        #[test]
        fn keeps_the_latest_sessions(uses in prop::collection::vec(0..9_u8, 0..60), most in 1..6_usize) {
            let totals = UsageTotals::new(most);
            let mut plain: Vec<(String, u64)> = Vec::new();
            for session in uses.iter().map(u8::to_string) {
                totals.add(of(&session), &usage(Some(3), None), Duration::ZERO);
                let before = plain.iter().position(|(name, _)| *name == session);
                let count = before.map_or(0, |at| plain.remove(at).1);
                plain.insert(0, (session, count + 1));
                plain.truncate(most);
            }
            let kept: Vec<(String, u64)> = totals
                .sessions(99)
                .iter()
                .map(|(name, dated)| (name.to_string(), dated.total.requests))
                .collect();
            prop_assert_eq!(kept, plain);
            let total: u64 = totals.models().iter().map(|(_, total)| total.requests).sum();
            prop_assert_eq!(total, uses.len() as u64);
        }
    }
}
