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

/// The rows of the parts that are not always there.
#[derive(Clone, Copy)]
struct PartRows {
    panels: u16,
    decisions: u16,
    footer: u16,
}

/// Draws the state.
pub fn draw(frame: &mut Frame<'_>, state: &mut TopState) {
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

/// Draws the state as plain text of so many columns, with a row for each upstream.
pub fn text(state: &mut TopState, columns: u16) -> String {
    let upstreams = u16::try_from(state.rows().len()).unwrap_or(u16::MAX);
    let parts = PartRows { panels: fleet::panel_rows(state), decisions: 11, footer: 0 };
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
