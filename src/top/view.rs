//! Draws what `vllm-lb top` shows. Small terminals show less: first the trends go, then the panels.

mod decisions;
mod fleet;
mod header;
mod help;
mod paint;

use ratatui::Frame;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::state::{TopMode, TopState};
use paint::{BOLD, keys};

/// The rows of the terminal from which on models and siblings have a panel.
const PANEL_HEIGHT: u16 = 32;

/// The rows of the terminal from which on choices are shown.
const DECISIONS_HEIGHT: u16 = 18;

/// The largest number of rows of a text.
const MAX_TEXT_ROWS: u16 = 2000;

/// The rows of a text for the choices, with their title.
const TEXT_DECISION_ROWS: u16 = 11;

/// The columns of a text whose lines are not cut: at least so many, and at most so many for all but the
/// choices.
const WHOLE_COLUMNS: std::ops::RangeInclusive<u16> = 120..=400;

/// The rows of the parts that are not always there.
#[derive(Clone, Copy)]
struct PartRows {
    panels: u16,
    decisions: u16,
    footer: u16,
}

/// Draws the state.
pub(crate) fn draw(frame: &mut Frame<'_>, state: &mut TopState) {
    let height = frame.area().height;
    let panels = if height >= PANEL_HEIGHT { fleet::panel_rows(state) } else { 1 };
    let decisions = match height {
        0..DECISIONS_HEIGHT => 0,
        DECISIONS_HEIGHT..PANEL_HEIGHT => 6,
        _ => 11,
    };
    draw_parts(frame, state, PartRows { panels, decisions, footer: 1 });
}

fn draw_parts(frame: &mut Frame<'_>, state: &mut TopState, parts: PartRows) {
    let area = frame.area();
    let rows = [
        Constraint::Length(header::HEADER_ROWS),
        Constraint::Min(3),
        Constraint::Length(parts.panels),
        Constraint::Length(parts.decisions),
        Constraint::Length(parts.footer),
    ];
    let [top, table, panels, choices, footer] = Layout::vertical(rows).areas(area);
    header::draw(frame, top, state);
    fleet::draw_table(frame, table, state);
    fleet::draw_panels(frame, panels, state);
    decisions::draw(frame, choices, state);
    draw_footer(frame, footer, state);
    if state.mode == TopMode::Help {
        help::draw(frame, area);
    }
}

/// Draws the state as plain text with a row for each upstream: of so many columns, or with whole lines.
pub(crate) fn text(state: &mut TopState, columns: Option<u16>) -> String {
    match columns {
        Some(columns) => drawn_text(state, columns, TEXT_DECISION_ROWS),
        None => whole_text(state),
    }
}

/// The text whose lines are not cut. The choices are no part of the drawing, whose width follows its longest
/// line: their lines are much longer than the others.
fn whole_text(state: &mut TopState) -> String {
    let columns = header::columns(state).max(fleet::columns(state));
    let columns = u16::try_from(columns).unwrap_or(u16::MAX);
    let mut text = drawn_text(state, columns.clamp(*WHOLE_COLUMNS.start(), *WHOLE_COLUMNS.end()), 1);
    for line in decisions::whole_lines(state, usize::from(TEXT_DECISION_ROWS) - 1) {
        text.push_str(safe(&line.to_string()).trim_end());
        text.push('\n');
    }
    text
}

/// A line without what would control a terminal or turn the order of letters around: a client may have sent
/// it as the name of a model. A drawing leaves that out by itself.
fn safe(line: &str) -> String {
    let is_shown = |c: &char| {
        let turns = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        !c.is_control() && !turns && *c != '\u{feff}'
    };
    line.chars().filter(is_shown).collect()
}

/// The text of so many columns, of which so many rows are for the choices.
fn drawn_text(state: &mut TopState, columns: u16, decisions: u16) -> String {
    let upstreams = u16::try_from(state.rows().len()).unwrap_or(u16::MAX);
    let parts = PartRows { panels: fleet::panel_rows(state), decisions, footer: 0 };
    let others = header::HEADER_ROWS + fleet::TABLE_FRAME_ROWS + parts.panels + parts.decisions;
    let rows = upstreams.saturating_add(others).min(MAX_TEXT_ROWS);
    let Ok(mut terminal) = Terminal::new(TestBackend::new(columns, rows));
    let Ok(completed) = terminal.draw(|frame| draw_parts(frame, state, parts));
    lines(completed.buffer)
}

/// The rows of a buffer as lines, without what is blank at their ends and without blank rows at the end.
fn lines(buffer: &Buffer) -> String {
    let width = usize::from(buffer.area.width).max(1);
    let rows = buffer.content.chunks(width).map(|row| {
        let text: String = row.iter().map(|cell| cell.symbol()).collect();
        text.trim_end().to_string()
    });
    let mut lines: Vec<String> = rows.collect();
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines.join("\n") + "\n"
}

fn draw_footer(frame: &mut Frame<'_>, area: Rect, state: &TopState) {
    let line = match &state.mode {
        TopMode::Filter => Line::from(vec![Span::raw("/"), Span::raw(state.filter.clone()), "█".into()]),
        TopMode::Confirm { upstream, drain } => {
            let question = if *drain {
                format!("Drain {upstream}: no new requests go to it. ")
            } else {
                format!("Let requests go to {upstream} again. ")
            };
            let question = Span::styled(question, BOLD.fg(Color::Yellow));
            let [yes, no] = ["y", "n"].map(|key| Span::styled(key, BOLD));
            Line::from(vec![question, yes, " yes  ".into(), no, " no".into()])
        }
        TopMode::Table | TopMode::Help => match &state.notice {
            Some(notice) => Line::from(Span::styled(notice.clone(), Style::new().fg(Color::Yellow))),
            None => keys(&[
                ("q", "quit"),
                ("↑↓", "select"),
                ("s", "sort"),
                ("/", "filter"),
                ("d", "drain"),
                ("u", "undrain"),
                ("?", "help"),
            ]),
        },
    };
    frame.render_widget(Paragraph::new(line), area);
}

#[cfg(test)]
mod tests;
