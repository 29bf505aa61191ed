//! What the parts of the screen share: styles, labels and their values.

use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};

use crate::top::numbers::{age, count};
use crate::top::state::{LinkState, TopState};

/// What is less important.
pub(super) const DIM: Style = Style::new().add_modifier(Modifier::DIM);
/// What is more important.
pub(super) const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);

/// Keys with what they do.
pub(super) fn keys(pairs: &[(&'static str, &'static str)]) -> Line<'static> {
    let spans = pairs
        .iter()
        .flat_map(|(key, does)| [Span::styled(*key, BOLD), Span::styled(format!(" {does}   "), DIM)]);
    Line::from(spans.collect::<Vec<_>>())
}

/// A label and its value.
pub(super) fn labelled(label: &'static str, value: String) -> [Span<'static>; 2] {
    [Span::styled(format!("{label} "), DIM), Span::raw(format!("{value}  "))]
}

/// The state of the connection.
pub(super) fn link(state: &TopState) -> Span<'static> {
    match &state.link {
        LinkState::Connecting => Span::styled("connecting", Style::new().fg(Color::Yellow)),
        LinkState::Live => Span::styled("live", Style::new().fg(Color::Green)),
        LinkState::Lost { error, since } => {
            let passed = age(state.now.saturating_sub(*since).as_secs_f64());
            Span::styled(format!("lost for {passed}: {error}"), Style::new().fg(Color::Red))
        }
    }
}

/// The colour of an upstream's state.
pub(super) fn state_style(state: &str) -> Style {
    match state {
        "ready" => Style::new().fg(Color::Green),
        "suspect" => Style::new().fg(Color::Yellow),
        "draining" => Style::new().fg(Color::Cyan),
        "down" | "tripped" => Style::new().fg(Color::Red).add_modifier(Modifier::BOLD),
        _ => DIM,
    }
}

/// A count that is 0 at most times: dim then, and coloured otherwise.
pub(super) fn concern(label: &'static str, value: f64, text: String) -> [Span<'static>; 2] {
    let style = if value > 0.0 { Style::new().fg(Color::Red) } else { Style::new() };
    [Span::styled(format!("{label} "), DIM), Span::styled(format!("{text}  "), style)]
}

/// A count in a few columns.
pub(super) fn whole(value: u64) -> String {
    count(value as f64)
}
