//! The lines above the table: the balancer, its traffic, its tokens.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::paint::{BOLD, DIM, concern, labelled, link, whole};
use crate::top::document::TopDocument;
use crate::top::numbers::{age, bytes, clock, millis, percent, rate};
use crate::top::state::TopState;

/// The number of lines.
pub(super) const HEADER_ROWS: u16 = 3;

/// Draws the lines.
pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, state: &TopState) {
    frame.render_widget(Paragraph::new(lines(state)), area);
}

/// The columns of the longest line.
pub(super) fn columns(state: &TopState) -> usize {
    lines(state).iter().map(Line::width).max().unwrap_or(0)
}

fn lines(state: &TopState) -> Vec<Line<'static>> {
    match &state.document {
        Some(document) => vec![balancer(state, document), traffic(state, document), tokens(state, document)],
        None => vec![Line::from(vec![
            Span::styled("vllm-lb  ", BOLD),
            Span::styled(format!("{}  ", state.target), DIM),
            link(state),
        ])],
    }
}

fn balancer(state: &TopState, document: &TopDocument) -> Line<'static> {
    let balancer = &document.balancer;
    let (word, colour) = match (balancer.leaving, balancer.ready) {
        (true, _) => ("shutting down", Color::Yellow),
        (false, true) => ("ready", Color::Green),
        (false, false) => ("not ready", Color::Red),
    };
    let name = balancer.name.as_deref().unwrap_or(&state.target);
    Line::from(vec![
        Span::styled(format!("vllm-lb {}  ", balancer.version), BOLD),
        Span::raw(format!("{name}  ")),
        Span::styled(format!("{word}  "), Style::new().fg(colour)),
        Span::styled(
            format!("up {}  {} UTC  ", age(document.time - balancer.started), clock(document.time)),
            DIM,
        ),
        link(state),
    ])
}

fn traffic(state: &TopState, document: &TopDocument) -> Line<'static> {
    let totals = &document.totals;
    let errors = state.totals.rate(|sample| sample.failures);
    let spans = [
        labelled("req/s", rate(state.totals.rate(|sample| sample.requests))),
        labelled("in flight", whole(totals.in_flight)),
        concern("queued", totals.queued as f64, whole(totals.queued)),
        concern("errors/s", errors.unwrap_or(0.0), rate(errors)),
        labelled("rejects", whole(totals.rejects)),
        labelled("retries", whole(totals.retries)),
        labelled("conns", whole(totals.connections)),
    ];
    Line::from(spans.into_iter().flatten().collect::<Vec<_>>())
}

fn tokens(state: &TopState, document: &TopDocument) -> Line<'static> {
    let (totals, history) = (&document.totals, &state.totals);
    let predicted = percent(history.share(|sample| sample.predicted, |sample| sample.compared));
    let reported = percent(history.share(|sample| sample.reported, |sample| sample.compared));
    let times = totals.first_byte_ms;
    let first =
        [times.map(|times| times.p50), times.map(|times| times.p90), times.and_then(|times| times.p99)];
    let spans = [
        labelled("tok/s in", rate(history.rate(|sample| sample.prompt))),
        labelled("out", rate(history.rate(|sample| sample.output))),
        labelled("hits", format!("{reported} of {predicted}")),
        labelled("ttfb", first.map(millis).join("/")),
        labelled("mem", bytes(totals.memory_bytes)),
    ];
    Line::from(spans.into_iter().flatten().collect::<Vec<_>>())
}
