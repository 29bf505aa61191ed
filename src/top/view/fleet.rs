//! The table of upstreams, and the panels of models and siblings.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, Borders, Cell, Paragraph, Row, Table};

use super::paint::{BOLD, DIM, state_style, whole};
use crate::top::document::{TopModel, TopSibling, TopUpstream};
use crate::top::numbers::{UNKNOWN, count, cut, millis, percent, rate, sparkline};
use crate::top::state::TopState;

/// The columns of the terminal from which on the table has trends.
const TREND_WIDTH: u16 = 96;

/// The largest number of bars of a trend.
const MAX_TREND_BARS: u16 = 30;

/// The columns of everything but the trend, with a name of a usual length.
const OTHER_COLUMNS: u16 = 86;

/// The rows of the table's title and of the names of its columns.
pub(super) const TABLE_FRAME_ROWS: u16 = 2;

/// The rows of a panel at the most.
const MAX_PANEL_ROWS: usize = 5;

/// The titles and widths of the columns behind the name, and the columns of the terminal from which on each
/// is shown.
const COLUMNS: [(&str, u16, u16); 10] = [
    ("STATE", 8, 0),
    ("SIGHT", 6, 80),
    ("ACT", 6, 0),
    ("WAIT", 4, 56),
    ("BACKLOG", 7, 80),
    ("KV", 4, 56),
    ("HIT", 4, 56),
    ("P50", 5, 56),
    ("P90", 5, 80),
    ("REQ/S", 5, 0),
];

/// Draws the table; the selected row stays visible.
pub(super) fn draw_table(frame: &mut Frame<'_>, area: Rect, state: &mut TopState) {
    let bars = match area.width {
        TREND_WIDTH.. => area.width.saturating_sub(OTHER_COLUMNS).min(MAX_TREND_BARS),
        _ => 0,
    };
    let rows = state.rows();
    let place = state.selected_place(&rows);
    let title = title(state, rows.len());
    let rows: Vec<Row<'static>> =
        rows.iter().map(|upstream| row(state, upstream, (area.width, bars))).collect();
    let mut widths = vec![Constraint::Fill(1)];
    let mut titles = vec![Cell::from("NAME")];
    for (title, width, _) in COLUMNS.iter().filter(|(_, _, from)| area.width >= *from) {
        widths.push(Constraint::Length(*width));
        titles.push(if matches!(*title, "STATE" | "SIGHT") { Cell::from(*title) } else { right(*title) });
    }
    if bars > 0 {
        widths.push(Constraint::Length(bars));
        titles.push(Cell::from("TREND"));
    }
    let table = Table::new(rows, widths)
        .header(Row::new(titles).style(DIM))
        .block(Block::new().borders(Borders::TOP).title(title))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    state.table.select(place);
    frame.render_stateful_widget(table, area, &mut state.table);
}

fn title(state: &TopState, shown: usize) -> Line<'static> {
    let all = state.document.as_ref().map_or(0, |document| document.upstreams.len());
    let ready = state.document.iter().flat_map(|document| &document.upstreams);
    let ready = ready.filter(|upstream| matches!(upstream.state.as_str(), "ready" | "suspect")).count();
    let mut spans = vec![
        Span::styled("UPSTREAMS ", BOLD),
        Span::raw(format!("{ready} of {all} ready ")),
        Span::styled(format!("by {} ", state.order.label()), DIM),
    ];
    if !state.filter.is_empty() {
        spans.push(Span::raw(format!("filter {:?}: {shown} ", state.filter)));
    }
    Line::from(spans)
}

/// A row in a table of so many columns, with a trend of so many bars.
fn row(state: &TopState, upstream: &TopUpstream, (columns, bars): (u16, u16)) -> Row<'static> {
    let history = state.upstreams.get(&upstream.name);
    let hits = history.and_then(|history| history.share(|sample| sample.reported, |sample| sample.prompt));
    let active = match upstream.active_elsewhere {
        0 => upstream.active.to_string(),
        others => format!("{}+{others}", upstream.active),
    };
    let times = upstream.first_byte_ms;
    let word = if upstream.drained { "drained" } else { upstream.state.as_str() };
    let shown = [
        Cell::from(Span::styled(word.to_string(), state_style(&upstream.state))),
        Cell::from(upstream.sight.clone().unwrap_or(UNKNOWN.into())),
        right(active),
        right(upstream.queued.map_or(UNKNOWN.into(), whole)),
        right(whole(upstream.backlog)),
        right(percent(upstream.kv_usage)),
        right(percent(hits)),
        right(millis(times.map(|times| times.p50))),
        right(millis(times.map(|times| times.p90))),
        right(rate(history.and_then(|history| history.rate(|sample| sample.requests)))),
    ];
    let shown = shown.into_iter().zip(COLUMNS).filter(|(_, (_, _, from))| columns >= *from);
    let mut cells = vec![Cell::from(upstream.name.clone())];
    cells.extend(shown.map(|(cell, _)| cell));
    if bars > 0 {
        cells.push(Cell::from(history.map_or(String::new(), |history| sparkline(history.bars(bars.into())))));
    }
    Row::new(cells)
}

/// A cell whose text ends at its right edge.
fn right(text: impl Into<Text<'static>>) -> Cell<'static> {
    Cell::from(text.into().alignment(Alignment::Right))
}

/// The rows that models and siblings need in panels.
pub(super) fn panel_rows(state: &TopState) -> u16 {
    let Some(document) = &state.document else { return 1 };
    let rows = document.models.len().max(document.siblings.balancers.len()).clamp(1, MAX_PANEL_ROWS);
    u16::try_from(rows).unwrap_or(1) + 1
}

/// Draws models and siblings: in one line, or in panels where there is room.
pub(super) fn draw_panels(frame: &mut Frame<'_>, area: Rect, state: &TopState) {
    let Some(document) = &state.document else { return };
    let siblings = &document.siblings;
    let exchange = match (siblings.enabled, siblings.redis_up) {
        (false, _) => "no Redis".to_string(),
        (true, false) => "Redis does not work".to_string(),
        (true, true) if siblings.balancers.len() == 1 => "1 other".to_string(),
        (true, true) => format!("{} others", siblings.balancers.len()),
    };
    if area.height < 2 {
        let names: Vec<String> = document
            .models
            .iter()
            .map(|model| format!("{} {}/{}", model.name, model.ready, model.upstreams))
            .collect();
        let line = Line::from(vec![
            Span::styled("MODELS ", BOLD),
            Span::raw(format!("{}  ", cut(&names.join(", "), usize::from(area.width / 2)))),
            Span::styled("SIBLINGS ", BOLD),
            Span::raw(exchange),
        ]);
        return frame.render_widget(Paragraph::new(line), area);
    }
    let [left, middle] = Layout::horizontal([Constraint::Fill(3), Constraint::Fill(2)]).areas(area);
    let top = |title: Vec<Span<'static>>| Block::new().borders(Borders::TOP).title(Line::from(title));
    let models: Vec<Line<'_>> = document.models.iter().map(model_line).collect();
    let title = vec![Span::styled("MODELS ", BOLD)];
    frame.render_widget(Paragraph::new(models).block(top(title)), left);
    let others: Vec<Line<'_>> = siblings.balancers.iter().map(sibling_line).collect();
    let title = vec![Span::styled("SIBLINGS ", BOLD), Span::raw(format!("{exchange} "))];
    frame.render_widget(Paragraph::new(others).block(top(title)), middle);
}

fn model_line(model: &TopModel) -> Line<'static> {
    let cached = (model.prompt_tokens > 0).then(|| model.cached_tokens as f64 / model.prompt_tokens as f64);
    Line::from(vec![
        Span::raw(format!("{:<28} ", cut(&model.name, 28))),
        Span::raw(format!("{}/{} ", model.ready, model.upstreams)),
        Span::styled("requests ", DIM),
        Span::raw(format!("{} ", whole(model.requests))),
        Span::styled("in ", DIM),
        Span::raw(format!("{} ", count(model.prompt_tokens as f64))),
        Span::styled("cached ", DIM),
        Span::raw(format!("{} ", percent(cached))),
        Span::styled("out ", DIM),
        Span::raw(count(model.output_tokens as f64)),
    ])
}

fn sibling_line(sibling: &TopSibling) -> Line<'static> {
    let name = sibling.name.as_deref().unwrap_or(&sibling.id);
    Line::from(vec![
        Span::raw(format!("{:<20} ", cut(name, 20))),
        Span::styled("in flight ", DIM),
        Span::raw(format!("{} ", whole(sibling.in_flight))),
        Span::styled("heard ", DIM),
        Span::raw(format!("{} ago", millis(Some(sibling.age_ms)))),
    ])
}
