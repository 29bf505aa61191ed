//! Writes numbers in a few columns of a terminal.

/// An unknown value.
pub(super) const UNKNOWN: &str = "–";

/// The bars of a sparkline, the lowest first.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A count in at most five columns: `999`, `12.3k`, `123k`, `1.2M`.
pub(super) fn count(value: f64) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    // What would be rounded up to the next unit belongs to it.
    let unit = units.iter().find(|(size, _)| value >= size * 0.9995);
    match unit {
        Some((size, unit)) if value / size < 99.95 => format!("{:.1}{unit}", value / size),
        Some((size, unit)) => format!("{:.0}{unit}", value / size),
        None => format!("{value:.0}"),
    }
}

/// A rate for each second: small ones with a decimal.
pub(super) fn rate(value: Option<f64>) -> String {
    match value {
        Some(value) if value < 99.95 => format!("{value:.1}"),
        Some(value) => count(value),
        None => UNKNOWN.into(),
    }
}

/// A share of 1 in percent.
pub(super) fn percent(value: Option<f64>) -> String {
    value.map_or(UNKNOWN.into(), |value| format!("{:.0}%", value * 100.0))
}

/// Milliseconds in at most five columns: `0.4ms`, `12ms`, `999ms`, `1.2s`, `340s`.
pub(super) fn millis(value: Option<f64>) -> String {
    match value {
        None => UNKNOWN.into(),
        Some(value) if value < 9.95 => format!("{value:.1}ms"),
        Some(value) if value < 999.5 => format!("{value:.0}ms"),
        Some(value) if value < 99_950.0 => format!("{:.1}s", value / 1e3),
        Some(value) => format!("{:.0}s", value / 1e3),
    }
}

/// Bytes by powers of 1024.
pub(super) fn bytes(value: Option<u64>) -> String {
    let Some(value) = value else { return UNKNOWN.into() };
    let value = value as f64;
    match value {
        value if value >= 1073741824.0 => format!("{:.1}GiB", value / 1073741824.0),
        value if value >= 1048576.0 => format!("{:.0}MiB", value / 1048576.0),
        value => format!("{:.0}KiB", value / 1024.0),
    }
}

/// A time in seconds with its two largest units: `3d 4h`, `12m 30s`.
pub(super) fn age(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// The time of day of a time since 1970, in UTC.
pub(super) fn clock(time: f64) -> String {
    let seconds = time.max(0.0) as u64 % 86_400;
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// The bars of values, the highest as high as the row; a value that is not known is a gap.
pub(super) fn sparkline(values: impl Iterator<Item = Option<f64>> + Clone) -> String {
    let top = values.clone().flatten().fold(0.0, f64::max);
    let bar = |value: Option<f64>| match value {
        None => ' ',
        Some(value) if top <= 0.0 || value <= 0.0 => BARS[0],
        Some(value) => BARS[((value / top * 7.0).round() as usize).min(7)],
    };
    values.map(bar).collect()
}

/// A text in at most so many columns; a longer one loses its end.
pub(super) fn cut(text: &str, columns: usize) -> String {
    if text.chars().count() <= columns {
        return text.into();
    }
    let mut short: String = text.chars().take(columns.saturating_sub(1)).collect();
    short.push('…');
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_fit_their_columns() {
        for (value, expected) in [
            (0.0, "0"),
            (999.0, "999"),
            (999.6, "1.0k"),
            (12_345.0, "12.3k"),
            (99_949.0, "99.9k"),
            (123_456.0, "123k"),
            (999_700.0, "1.0M"),
            (5e9, "5.0G"),
        ] {
            assert_eq!(count(value), expected);
        }
        assert_eq!(
            [rate(None), rate(Some(0.04)), rate(Some(12.34)), rate(Some(1234.0))],
            ["–", "0.0", "12.3", "1.2k"]
        );
        let times = [0.42, 12.4, 999.0, 999.6, 12_345.0, 340_000.0].map(|time| millis(Some(time)));
        assert_eq!(times, ["0.4ms", "12ms", "999ms", "1.0s", "12.3s", "340s"]);
        assert_eq!([percent(Some(0.614)), percent(None), millis(None)], ["61%", "–", "–"]);
        assert_eq!(
            [bytes(Some(2048)), bytes(Some(3 << 20)), bytes(Some(5 << 30))],
            ["2KiB", "3MiB", "5.0GiB"]
        );
        assert_eq!([age(7.9), age(90.0), age(7260.0), age(100_000.0)], ["7s", "1m 30s", "2h 1m", "1d 3h"]);
        assert_eq!(clock(1_790_000_000.5), "14:13:20");
    }

    #[test]
    fn the_highest_bar_is_the_greatest_value() {
        assert_eq!(sparkline([Some(0.0), Some(5.0), None, Some(10.0)].into_iter()), "▁▅ █");
        assert_eq!(sparkline([Some(0.0), Some(0.0)].into_iter()), "▁▁");
    }

    #[test]
    fn a_long_text_loses_its_end() {
        assert_eq!([cut("gpu-0", 5), cut("gpu-10", 5), cut("äöü", 2)], ["gpu-0", "gpu-…", "ä…"]);
    }
}
