//! The table of upstreams, and the panels of models and siblings.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, Borders, Cell, Paragraph, Row, Table};

use super::paint::{BOLD, DIM, state_style, whole};
use crate::top::document::{TopDocument, TopModel, TopSibling, TopUpstream};
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

/// The columns of a model's numbers, with their names.
const MODEL_NUMBER_COLUMNS: u16 = 52;

/// The columns of a sibling's numbers, with their names.
const SIBLING_NUMBER_COLUMNS: u16 = 34;

/// The columns of the name of a model at least, and of short names at most.
const MODEL_NAME_COLUMNS: (usize, usize) = (12, 28);

/// The columns of the name of a sibling, unless there is room for a longer one.
const SIBLING_NAME_COLUMNS: usize = 20;

/// The shares of the two panels in the columns of the terminal.
const PANEL_SHARES: (u16, u16) = (3, 2);

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
    let hits = history.and_then(|history| history.share(|sample| sample.reported, |sample| sample.compared));
    let active = match upstream.active_elsewhere {
        0 => upstream.active.to_string(),
        others => format!("{}+{others}", upstream.active),
    };
    let times = upstream.first_byte_ms;
    let shown = [
        Cell::from(Span::styled(upstream.state.clone(), state_style(&upstream.state))),
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
    let shares = [PANEL_SHARES.0, PANEL_SHARES.1].map(Constraint::Fill);
    let [left, middle] = Layout::horizontal(shares).areas(area);
    let top = |title: Vec<Span<'static>>| Block::new().borders(Borders::TOP).title(Line::from(title));
    let room = |area: Rect, numbers| usize::from(area.width.saturating_sub(numbers));
    let (least, most) = MODEL_NAME_COLUMNS;
    let longest = longest_model(document).max(most);
    let columns = room(left, MODEL_NUMBER_COLUMNS).clamp(least, longest);
    let models: Vec<Line<'_>> = document.models.iter().map(|model| model_line(model, columns)).collect();
    let title = vec![Span::styled("MODELS ", BOLD)];
    frame.render_widget(Paragraph::new(models).block(top(title)), left);
    let longest = longest_sibling(document).max(SIBLING_NAME_COLUMNS);
    let columns = room(middle, SIBLING_NUMBER_COLUMNS).clamp(SIBLING_NAME_COLUMNS, longest);
    let others: Vec<Line<'_>> =
        siblings.balancers.iter().map(|sibling| sibling_line(sibling, columns)).collect();
    let title = vec![Span::styled("SIBLINGS ", BOLD), Span::raw(format!("{exchange} "))];
    frame.render_widget(Paragraph::new(others).block(top(title)), middle);
}

/// The columns in which neither the table nor a panel cuts a line.
pub(super) fn columns(state: &TopState) -> usize {
    let Some(document) = &state.document else { return 0 };
    let names = document.upstreams.iter().map(|upstream| upstream.name.chars().count());
    let name = names.max().unwrap_or(0);
    let numbers: usize = COLUMNS.iter().map(|(_, width, _)| usize::from(*width) + 1).sum();
    let table = name + numbers + usize::from(MAX_TREND_BARS) + 1;
    let (left, right) = (usize::from(PANEL_SHARES.0), usize::from(PANEL_SHARES.1));
    let panel = |columns: usize, share: usize| (columns * (left + right)).div_ceil(share) + 1;
    let model = longest_model(document).max(MODEL_NAME_COLUMNS.0) + usize::from(MODEL_NUMBER_COLUMNS);
    let sibling = longest_sibling(document) + usize::from(SIBLING_NUMBER_COLUMNS);
    let sibling = if document.siblings.balancers.is_empty() { 0 } else { sibling };
    table.max(panel(model, left)).max(panel(sibling, right))
}

/// The columns of the longest name of a model.
fn longest_model(document: &TopDocument) -> usize {
    document.models.iter().map(|model| model.name.chars().count()).max().unwrap_or(0)
}

/// The columns of the longest name of a sibling.
fn longest_sibling(document: &TopDocument) -> usize {
    document.siblings.balancers.iter().map(|sibling| name_of(sibling).chars().count()).max().unwrap_or(0)
}

fn name_of(sibling: &TopSibling) -> &str {
    sibling.name.as_deref().unwrap_or(&sibling.id)
}

/// The numbers of a model, behind its name of so many columns.
fn model_line(model: &TopModel, width: usize) -> Line<'static> {
    let cached = (model.prompt_tokens > 0).then(|| model.cached_tokens as f64 / model.prompt_tokens as f64);
    Line::from(vec![
        Span::raw(format!("{:<width$} ", cut(&model.name, width))),
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

/// The numbers of a sibling, behind its name of so many columns.
fn sibling_line(sibling: &TopSibling, width: usize) -> Line<'static> {
    Line::from(vec![
        Span::raw(format!("{:<width$} ", cut(name_of(sibling), width))),
        Span::styled("in flight ", DIM),
        Span::raw(format!("{} ", whole(sibling.in_flight))),
        Span::styled("heard ", DIM),
        Span::raw(format!("{} ago", millis(Some(sibling.age_ms)))),
    ])
}
