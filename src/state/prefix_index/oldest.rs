//! The columns in the order of their least recent pairs.
//!
//! The least recent pair of a column only becomes more recent, so an order of earlier values is enough: the
//! first column is compared with its present value, and put back where that has changed. Every such step
//! follows a change of the column.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::holdings::{Holdings, Tick};

/// The columns that may have pairs, the least recent first.
#[derive(Debug, Default)]
pub(super) struct OldestColumns {
    /// Ticks that do not wrap, with their columns.
    order: BinaryHeap<Reverse<(u64, usize)>>,
    /// Whether a column is in `order`.
    listed: Vec<bool>,
    /// The present tick, without wrapping.
    now: u64,
}

impl OldestColumns {
    /// Adds a column that has got a pair at the present tick.
    pub(super) fn enter(&mut self, column: usize, tick: Tick) {
        self.advance(tick);
        if self.listed.len() <= column {
            self.listed.resize(column + 1, false);
        }
        if !std::mem::replace(&mut self.listed[column], true) {
            self.order.push(Reverse((self.now, column)));
        }
    }

    /// Returns the column with the least recent pair, and the tick of that pair.
    pub(super) fn first(&mut self, holdings: &mut Holdings, now: Tick) -> Option<(usize, Tick)> {
        self.advance(now);
        while let Some(Reverse((known, column))) = self.order.pop() {
            let Some((_, tick)) = holdings.oldest(column) else {
                self.listed[column] = false;
                continue;
            };
            let present = self.now - u64::from((self.now as Tick).wrapping_sub(tick));
            self.order.push(Reverse((present, column)));
            if present == known {
                return Some((column, tick));
            }
        }
        None
    }

    fn advance(&mut self, now: Tick) {
        self.now += u64::from(now.wrapping_sub(self.now as Tick));
    }
}
