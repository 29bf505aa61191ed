//! The running totals of all siblings' requests in flight, by upstream.
//!
//! A report changes the totals by the difference to the sibling's report before, so that its cost is the
//! number of its rows, independent of the numbers of siblings and upstreams. The sums are exact in 128 bits:
//! also after rows of `u64::MAX` from a foreign writer, taking a sibling away restores the sum before.

use std::collections::HashMap;
use std::sync::Arc;

use super::SiblingLoad;

/// The largest number of upstreams: twice as many as the prefix index has columns. Rows of further upstreams
/// are ignored, so that foreign writers cannot exhaust the memory.
pub(super) const MAX_UPSTREAMS: usize = 8192;

/// An exact sum of loads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LoadSum {
    active: u128,
    backlog: u128,
    context: u128,
}

/// The totals of all upstreams. An upstream is numbered at its first load.
#[derive(Debug, Default)]
pub(super) struct UpstreamTotals {
    numbers: HashMap<Arc<str>, usize>,
    all: Vec<UpstreamTotal>,
    free: Vec<usize>,
    /// The upstreams whose totals have changed since the last call of `take_changes`.
    changed: Vec<usize>,
    /// Idle upstreams were searched for since that call.
    swept: bool,
}

#[derive(Debug)]
struct UpstreamTotal {
    name: Arc<str>,
    sum: LoadSum,
    /// The number of siblings with requests in flight here.
    siblings: usize,
    is_changed: bool,
}

// === impl LoadSum ===

impl LoadSum {
    /// Replaces one summand.
    pub(super) fn replace(&mut self, before: &SiblingLoad, after: &SiblingLoad) {
        let replaced = |sum: u128, before: u64, after: u64| sum + u128::from(after) - u128::from(before);
        self.active = replaced(self.active, before.active, after.active);
        self.backlog = replaced(self.backlog, before.backlog, after.backlog);
        self.context = replaced(self.context, before.context, after.context);
    }

    /// Returns the sum, at most `u64::MAX` each.
    pub(super) fn load(&self) -> SiblingLoad {
        let bounded = |sum: u128| u64::try_from(sum).unwrap_or(u64::MAX);
        SiblingLoad {
            active: bounded(self.active),
            backlog: bounded(self.backlog),
            context: bounded(self.context),
        }
    }
}

// === impl UpstreamTotals ===

impl UpstreamTotals {
    /// Returns the number of a known upstream.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.numbers.get(name).copied()
    }

    /// Returns the number of an upstream; a new one where it is unknown. `None`: there are too many upstreams
    /// with requests in flight.
    pub(super) fn number(&mut self, name: &str) -> Option<usize> {
        if let Some(number) = self.find(name) {
            return Some(number);
        }
        if self.numbers.len() >= MAX_UPSTREAMS && !std::mem::replace(&mut self.swept, true) {
            self.forget_idle();
        }
        let name: Arc<str> = name.into();
        let total =
            UpstreamTotal { name: name.clone(), sum: LoadSum::default(), siblings: 0, is_changed: false };
        let number = match self.free.pop() {
            Some(number) => {
                self.all[number] = total;
                number
            }
            None if self.all.len() < MAX_UPSTREAMS => {
                self.all.push(total);
                self.all.len() - 1
            }
            None => return None,
        };
        self.numbers.insert(name, number);
        Some(number)
    }

    /// Frees the numbers of upstreams without requests in flight, whose last totals were read.
    fn forget_idle(&mut self) {
        let UpstreamTotals { numbers, all, free, .. } = self;
        numbers.retain(|_, number| {
            let kept = all[*number].siblings > 0 || all[*number].is_changed;
            if !kept {
                free.push(*number);
            }
            kept
        });
    }

    /// Replaces the load of one sibling on an upstream.
    pub(super) fn replace(&mut self, number: usize, before: &SiblingLoad, after: &SiblingLoad) {
        let total = &mut self.all[number];
        total.sum.replace(before, after);
        total.siblings += usize::from(!after.is_idle());
        total.siblings -= usize::from(!before.is_idle());
        if !std::mem::replace(&mut total.is_changed, true) {
            self.changed.push(number);
        }
    }

    /// Returns the total of an upstream.
    pub(super) fn total(&self, name: &str) -> SiblingLoad {
        self.find(name).map(|number| self.all[number].sum.load()).unwrap_or_default()
    }

    /// Returns the totals that have changed since the last call.
    pub(super) fn take_changes(&mut self) -> Vec<(Arc<str>, SiblingLoad)> {
        let UpstreamTotals { all, changed, swept, .. } = self;
        *swept = false;
        let changes = changed.drain(..).map(|number| {
            let total = &mut all[number];
            total.is_changed = false;
            (total.name.clone(), total.sum.load())
        });
        changes.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgets_idle_upstreams_only_when_there_are_too_many() {
        let busy = SiblingLoad { active: 1, backlog: 2, context: u64::MAX };
        let idle = SiblingLoad::default();
        let mut totals = UpstreamTotals::default();
        let names: Vec<String> = (0..MAX_UPSTREAMS).map(|number| format!("gpu-{number}")).collect();
        for name in &names {
            let number = totals.number(name).expect("there is room");
            totals.replace(number, &idle, &busy);
        }
        assert_eq!((totals.number("more"), totals.total("gpu-7")), (None, busy));
        let seven = totals.find("gpu-7").expect("is known");
        totals.replace(seven, &busy, &idle);
        assert_eq!(totals.number("more"), None, "the change was not read yet");
        assert_eq!(totals.take_changes().len(), MAX_UPSTREAMS);
        assert_eq!((totals.number("more"), totals.find("gpu-7")), (Some(seven), None));
        assert_eq!(totals.number("yet more"), None);
        assert_eq!((totals.all.len(), totals.numbers.len()), (MAX_UPSTREAMS, MAX_UPSTREAMS));
        assert_eq!(totals.take_changes(), []);
    }
}
