//! The latest choices, each with the terms that won.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph};

use super::paint::{BOLD, DIM, whole};
use crate::top::document::TopDecision;
use crate::top::numbers::{clock, count, cut, millis};
use crate::top::state::TopState;

/// The columns of an upstream's name.
const NAME_COLUMNS: usize = 16;

/// Draws as many choices as there is room for.
pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, state: &TopState) {
    let block = Block::new().borders(Borders::TOP).title(Span::styled("DECISIONS ", BOLD));
    let rows = usize::from(area.height.saturating_sub(1));
    let line = |decision| line(decision, NAME_COLUMNS);
    let lines: Vec<Line<'_>> = state.decisions.iter().take(rows).map(line).collect();
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

/// The lines of so many choices, with whole names.
pub(super) fn whole_lines(state: &TopState, count: usize) -> Vec<Line<'static>> {
    let shown = || state.decisions.iter().take(count);
    let others = shown().filter_map(|decision| decision.runner_up()).map(|other| other.upstream.as_str());
    let names = shown().filter_map(|decision| decision.upstream.as_deref()).chain(others);
    let longest = names.map(|name| name.chars().count()).max().unwrap_or(0).max(NAME_COLUMNS);
    shown().map(|decision| line(decision, longest)).collect()
}

/// The line of a choice, with so many columns for a name.
fn line(decision: &TopDecision, columns: usize) -> Line<'static> {
    let upstream = decision.upstream.as_deref().unwrap_or("–");
    let mut spans = vec![
        Span::styled(format!("{} ", clock(decision.time)), DIM),
        Span::styled(format!("{:<columns$} ", cut(upstream, columns)), Style::new()),
        Span::styled(format!("{:<7} ", decision.reason), Style::new().fg(Color::Cyan)),
    ];
    let mut add = |label: &'static str, value: String| {
        spans.push(Span::styled(format!("{label} "), DIM));
        spans.push(Span::raw(format!("{value}  ")));
    };
    if let Some(chosen) = decision.chosen() {
        add("hit", format!("{}/{}", chosen.hit, decision.blocks));
        add("cost", count(chosen.cost));
        if let Some(other) = decision.runner_up() {
            add("before", format!("{} {}", cut(&other.upstream, columns), count(other.cost)));
        }
        if chosen.forecast_ms.is_some() {
            add("forecast", millis(chosen.forecast_ms));
        }
        let terms = [
            ("missing", chosen.missing),
            ("backlog", chosen.backlog),
            ("active", chosen.active),
            ("context", chosen.context),
            ("session", chosen.session_penalty),
        ];
        for (label, value) in terms.into_iter().filter(|(_, value)| *value > 0) {
            add(label, whole(value));
        }
    }
    if decision.attempt > 1 {
        add("attempt", decision.attempt.to_string());
    }
    add("of", decision.of.to_string());
    add("model", decision.model.clone().unwrap_or_else(|| "–".into()));
    if let Some(route) = &decision.route {
        add("route", route.clone());
    }
    add("id", decision.id.clone());
    Line::from(spans)
}
