//! The list of keys and of what the columns mean.

use ratatui::Frame;
use ratatui::layout::{Constraint, Rect};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph};

use super::paint::{BOLD, DIM};

const KEYS: &[(&str, &str)] = &[
    ("q", "quit"),
    ("↑ ↓ j k", "select an upstream; PageUp, PageDown, g, G move further"),
    ("s", "next order of the table"),
    ("/", "show only rows with a text in name, state or models; Esc ends it"),
    ("d, u", "drain the selected upstream, let requests go to it again"),
    ("", ""),
    ("ACT", "requests in flight, of siblings behind +"),
    ("WAIT", "requests that wait in the engine"),
    ("BACKLOG", "prompt tokens whose first byte is awaited"),
    ("KV, HIT", "used share of the cache; share of the prompts that its answers found there"),
    ("P50, P90", "time to the first byte, over the last minute"),
    ("SIGHT", "how well the cache is known: exact, learnt, blind"),
    ("hits a of b", "share of prompts found in caches, and the predicted one"),
    ("ttfb", "time to the first byte over the last minute: P50/P90/P99"),
];

/// Draws the help over the middle of the screen.
pub(super) fn draw(frame: &mut Frame<'_>, area: Rect) {
    let height = u16::try_from(KEYS.len()).unwrap_or(u16::MAX).saturating_add(2);
    let area = area.centered(Constraint::Length(76), Constraint::Length(height));
    let row = |(key, text): &(&'static str, &'static str)| {
        Line::from(vec![Span::styled(format!(" {key:<12}"), BOLD), Span::raw(*text)])
    };
    let lines: Vec<Line<'_>> = KEYS.iter().map(row).collect();
    let block = Block::bordered().title(" Help ").title_bottom(Span::styled(" any key closes it ", DIM));
    frame.render_widget(Clear, area);
    frame.render_widget(Paragraph::new(lines).block(block), area);
}
