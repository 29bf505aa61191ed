//! What `vllm-lb top` shows, and what keys do to it.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use ratatui::crossterm::event::KeyCode;
use ratatui::widgets::TableState;

use super::document::{TopDecision, TopDocument, TopTotals, TopUpstream};
use super::history::{CounterHistory, CounterSample};

/// The number of choices that are kept for display.
const MAX_KEPT_DECISIONS: usize = 100;

/// The rows by which a page key moves.
const PAGE_ROWS: usize = 10;

/// The longest text of a filter.
const MAX_FILTER_CHARS: usize = 60;

/// The connection to the balancer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LinkState {
    Connecting,
    Live,
    Lost {
        error: String,
        /// When it was lost, since the start of the program.
        since: Duration,
    },
}

/// What the next key means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum TopMode {
    #[default]
    Table,
    /// The user types a filter.
    Filter,
    /// The user is asked whether to change an upstream.
    Confirm {
        upstream: String,
        drain: bool,
    },
    Help,
}

/// The order of the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum TableOrder {
    #[default]
    Fleet,
    Name,
    State,
    Active,
    Backlog,
    FirstByte,
    Rate,
}

/// What the program has to do after a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TopCommand {
    Quit,
    Drain { upstream: String, drain: bool },
}

/// What is shown.
pub(crate) struct TopState {
    /// The address of the balancer.
    pub(super) target: String,
    pub(super) link: LinkState,
    pub(super) document: Option<TopDocument>,
    pub(super) totals: CounterHistory,
    pub(super) upstreams: HashMap<String, CounterHistory>,
    /// The latest choices, newest first.
    pub(super) decisions: VecDeque<TopDecision>,
    pub(super) order: TableOrder,
    pub(super) filter: String,
    pub(super) mode: TopMode,
    /// The result of the latest command.
    pub(super) notice: Option<String>,
    /// The selected upstream, which stays selected when the order changes.
    pub(super) selected: Option<String>,
    pub(super) table: TableState,
    /// The time since the start of the program.
    pub(super) now: Duration,
}

// === impl TableOrder ===

impl TableOrder {
    /// The name on the screen.
    pub(super) fn label(self) -> &'static str {
        match self {
            TableOrder::Fleet => "fleet",
            TableOrder::Name => "name",
            TableOrder::State => "state",
            TableOrder::Active => "active",
            TableOrder::Backlog => "backlog",
            TableOrder::FirstByte => "first byte",
            TableOrder::Rate => "req/s",
        }
    }

    fn next(self) -> Self {
        match self {
            TableOrder::Fleet => TableOrder::Name,
            TableOrder::Name => TableOrder::State,
            TableOrder::State => TableOrder::Active,
            TableOrder::Active => TableOrder::Backlog,
            TableOrder::Backlog => TableOrder::FirstByte,
            TableOrder::FirstByte => TableOrder::Rate,
            TableOrder::Rate => TableOrder::Fleet,
        }
    }
}

// === impl TopState ===

impl TopState {
    /// `target`: the address of the balancer, as it is shown.
    pub(crate) fn new(target: String) -> Self {
        TopState {
            target,
            link: LinkState::Connecting,
            document: None,
            totals: CounterHistory::default(),
            upstreams: HashMap::new(),
            decisions: VecDeque::new(),
            order: TableOrder::default(),
            filter: String::new(),
            mode: TopMode::default(),
            notice: None,
            selected: None,
            table: TableState::default(),
            now: Duration::ZERO,
        }
    }

    /// Sets the time since the start of the program.
    pub(crate) fn set_time(&mut self, now: Duration) {
        self.now = now;
    }

    /// Shows an overview.
    pub(crate) fn apply(&mut self, document: TopDocument) {
        self.link = LinkState::Live;
        self.totals.add(sample_of_totals(&document.totals, document.time));
        for upstream in &document.upstreams {
            let sample = sample_of_upstream(upstream, document.time);
            match self.upstreams.get_mut(&upstream.name) {
                Some(history) => history.add(sample),
                None => self.upstreams.entry(upstream.name.clone()).or_default().add(sample),
            }
        }
        let present = |name: &String| document.upstreams.iter().any(|upstream| upstream.name == *name);
        if self.upstreams.len() > document.upstreams.len() {
            self.upstreams.retain(|name, _| present(name));
        }
        let newest = self.decisions.front().cloned();
        let new = document.decisions.iter().take_while(|decision| Some(*decision) != newest.as_ref());
        let new: Vec<TopDecision> = new.cloned().collect();
        new.into_iter().rev().for_each(|decision| self.decisions.push_front(decision));
        self.decisions.truncate(MAX_KEPT_DECISIONS);
        self.document = Some(document);
    }

    /// Shows that the balancer cannot be reached; the last overview stays.
    pub(crate) fn lose(&mut self, error: String) {
        let since = match &self.link {
            LinkState::Lost { since, .. } => *since,
            _ => self.now,
        };
        self.link = LinkState::Lost { error, since };
    }

    /// Shows the result of a command.
    pub(crate) fn notify(&mut self, text: String) {
        self.notice = Some(text);
    }

    /// The upstreams that the filter admits, in the chosen order.
    pub(super) fn rows(&self) -> Vec<&TopUpstream> {
        let Some(document) = &self.document else { return Vec::new() };
        let filter = self.filter.to_lowercase();
        let matches = |text: &String| text.to_lowercase().contains(&filter);
        let admitted = |row: &&TopUpstream| {
            filter.is_empty() || matches(&row.name) || matches(&row.state) || row.models.iter().any(matches)
        };
        let mut rows: Vec<&TopUpstream> = document.upstreams.iter().filter(admitted).collect();
        // A stable sort: equal rows stay in the order of the fleet.
        rows.sort_by(|one, other| self.compare(one, other));
        rows
    }

    fn compare(&self, one: &TopUpstream, other: &TopUpstream) -> Ordering {
        let first = |row: &TopUpstream| row.first_byte_ms.map_or(-1.0, |times| times.p50);
        match self.order {
            TableOrder::Fleet => Ordering::Equal,
            TableOrder::Name => one.name.cmp(&other.name),
            // What needs attention comes first.
            TableOrder::State => {
                (one.state == "ready").cmp(&(other.state == "ready")).then(one.state.cmp(&other.state))
            }
            TableOrder::Active => other.active.cmp(&one.active),
            TableOrder::Backlog => other.backlog.cmp(&one.backlog),
            TableOrder::FirstByte => first(other).total_cmp(&first(one)),
            TableOrder::Rate => self.rate(&other.name).total_cmp(&self.rate(&one.name)),
        }
    }

    fn rate(&self, upstream: &str) -> f64 {
        let history = self.upstreams.get(upstream);
        history.and_then(|history| history.rate(|sample| sample.requests)).unwrap_or(-1.0)
    }

    /// The place of the selected upstream among the rows; the first one's if it is not among them.
    pub(super) fn selected_place(&self, rows: &[&TopUpstream]) -> Option<usize> {
        let place = rows.iter().position(|row| Some(&row.name) == self.selected.as_ref());
        place.or((!rows.is_empty()).then_some(0))
    }

    /// Reacts to a key; `control`: it was pressed with Control.
    pub(crate) fn press(&mut self, key: KeyCode, control: bool) -> Option<TopCommand> {
        if control {
            return matches!(key, KeyCode::Char('c' | 'd')).then_some(TopCommand::Quit);
        }
        match std::mem::take(&mut self.mode) {
            TopMode::Table => return self.press_in_table(key),
            // Any key closes the help.
            TopMode::Help => {}
            TopMode::Filter => self.press_in_filter(key),
            TopMode::Confirm { upstream, drain } => match key {
                KeyCode::Char('y' | 'Y') => {
                    self.notice = None;
                    return Some(TopCommand::Drain { upstream, drain });
                }
                KeyCode::Char('n' | 'N') | KeyCode::Esc | KeyCode::Enter => {}
                _ => self.mode = TopMode::Confirm { upstream, drain },
            },
        }
        None
    }

    fn press_in_table(&mut self, key: KeyCode) -> Option<TopCommand> {
        match key {
            KeyCode::Char('q') => return Some(TopCommand::Quit),
            KeyCode::Char('?' | 'h') => self.mode = TopMode::Help,
            KeyCode::Char('/') => self.mode = TopMode::Filter,
            KeyCode::Char('s') => self.order = self.order.next(),
            KeyCode::Char('d') => self.ask_to_drain(true),
            KeyCode::Char('u') => self.ask_to_drain(false),
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char('j') | KeyCode::Down => self.select(|place, last| (place + 1).min(last)),
            KeyCode::Char('k') | KeyCode::Up => self.select(|place, _| place.saturating_sub(1)),
            KeyCode::PageDown => self.select(|place, last| (place + PAGE_ROWS).min(last)),
            KeyCode::PageUp => self.select(|place, _| place.saturating_sub(PAGE_ROWS)),
            KeyCode::Char('g') | KeyCode::Home => self.select(|_, _| 0),
            KeyCode::Char('G') | KeyCode::End => self.select(|_, last| last),
            _ => {}
        }
        None
    }

    fn press_in_filter(&mut self, key: KeyCode) {
        match key {
            KeyCode::Enter => return,
            KeyCode::Esc => return self.filter.clear(),
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(char) if self.filter.chars().count() < MAX_FILTER_CHARS => self.filter.push(char),
            _ => {}
        }
        self.mode = TopMode::Filter;
    }

    /// Moves the selection to the place that `to` returns for the present and the last one.
    fn select(&mut self, to: impl Fn(usize, usize) -> usize) {
        let rows = self.rows();
        let Some(place) = self.selected_place(&rows) else { return };
        let name = rows.get(to(place, rows.len() - 1)).map(|row| row.name.clone());
        self.selected = name;
    }

    fn ask_to_drain(&mut self, drain: bool) {
        let rows = self.rows();
        let Some(row) = self.selected_place(&rows).and_then(|place| rows.get(place)) else { return };
        let (upstream, is_drained) = (row.name.clone(), row.drained);
        if is_drained == drain {
            let text = if drain { "is drained already" } else { "is not drained by an operator" };
            self.notice = Some(format!("{upstream} {text}"));
        } else {
            self.mode = TopMode::Confirm { upstream, drain };
        }
    }
}

fn sample_of_totals(totals: &TopTotals, time: f64) -> CounterSample {
    CounterSample {
        time,
        requests: totals.requests,
        failures: totals.errors,
        prompt: totals.prompt_tokens,
        output: totals.output_tokens,
        predicted: totals.predicted_tokens,
        reported: totals.reported_tokens,
        compared: totals.compared_tokens,
    }
}

fn sample_of_upstream(upstream: &TopUpstream, time: f64) -> CounterSample {
    CounterSample {
        time,
        requests: upstream.requests,
        failures: upstream.failures,
        prompt: upstream.prompt_tokens,
        output: 0,
        predicted: upstream.predicted_tokens,
        reported: upstream.reported_tokens,
        compared: upstream.compared_tokens,
    }
}

#[cfg(test)]
mod tests;
