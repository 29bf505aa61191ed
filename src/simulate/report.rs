//! The results of a replay, as a row of numbers.

use std::time::Duration;

use serde::Serialize;

use crate::engine::batch::GenerationSummary;

/// The counts and times of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Life {
    pub upstream: usize,
    pub prompt: usize,
    pub cached: usize,
    /// Seconds to the first token, between two tokens, and to the end.
    pub first: f64,
    /// The difference between the forecast and the time to the first token, as a share of the latter.
    pub forecast_error: f64,
    pub between: Option<f64>,
    pub end: f64,
}

/// One row of the table; times are in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ReportRow {
    pub policy: String,
    pub requests: usize,
    /// Rejected by the engine, since they would not fit into its cache.
    pub refused: usize,
    /// The share of all prompt tokens that engines found in their caches.
    pub hits: f64,
    pub ttft_mean: f64,
    pub ttft_p50: f64,
    pub ttft_p90: f64,
    pub ttft_p99: f64,
    /// The mean time between two tokens of an answer.
    pub inter_token: f64,
    pub end_to_end: f64,
    /// The largest number of requests on one engine, as a multiple of an even share; 1 is perfect.
    pub imbalance: f64,
    /// The number of engines without a request.
    pub idle: usize,
    /// The median difference between forecast and time to the first token, as a share of the latter.
    pub forecast_error: f64,
}

// === impl Life ===

impl Life {
    pub fn new(upstream: usize, summary: &GenerationSummary, now: f64, forecast: Duration) -> Self {
        let gaps = summary.output_tokens.saturating_sub(1);
        let first = summary.first_token - summary.arrived;
        Life {
            upstream,
            prompt: summary.prompt_tokens,
            cached: summary.cached_tokens,
            first,
            forecast_error: (forecast.as_secs_f64() - first).abs() / first.max(f64::MIN_POSITIVE),
            between: (gaps > 0).then(|| (now - summary.first_token) / gaps as f64),
            end: now - summary.arrived,
        }
    }
}

// === impl ReportRow ===

impl ReportRow {
    pub fn new(policy: &str, upstreams: usize, lives: &[Life], refused: usize) -> Self {
        let mut requests = vec![0usize; upstreams];
        lives.iter().for_each(|life| requests[life.upstream] += 1);
        let sum = |of: fn(&Life) -> usize| lives.iter().map(of).sum::<usize>() as f64;
        let mut first: Vec<f64> = lives.iter().map(|life| life.first).collect();
        first.sort_by(f64::total_cmp);
        let mut errors: Vec<f64> = lives.iter().map(|life| life.forecast_error).collect();
        errors.sort_by(f64::total_cmp);
        let between: Vec<f64> = lives.iter().filter_map(|life| life.between).collect();
        let end: Vec<f64> = lives.iter().map(|life| life.end).collect();
        let most = requests.iter().max().copied().unwrap_or(0);
        ReportRow {
            policy: policy.to_owned(),
            requests: lives.len(),
            refused,
            hits: sum(|life| life.cached) / sum(|life| life.prompt).max(1.0),
            ttft_mean: mean(&first),
            ttft_p50: percentile(&first, 50),
            ttft_p90: percentile(&first, 90),
            ttft_p99: percentile(&first, 99),
            inter_token: mean(&between),
            end_to_end: mean(&end),
            imbalance: (most * upstreams) as f64 / lives.len().max(1) as f64,
            idle: requests.iter().filter(|requests| **requests == 0).count(),
            forecast_error: percentile(&errors, 50),
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Returns the smallest of the sorted values that `hundredths` percent do not exceed; 0 without values.
fn percentile(sorted: &[f64], hundredths: usize) -> f64 {
    let rank = (sorted.len() * hundredths).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

/// Formats the heads of the columns, and one line for each row.
pub fn table(rows: &[ReportRow]) -> String {
    let heads = ["policy", "hits", "ttft", "p50", "p90", "p99", "between", "end", "most", "idle", "forecast"];
    let mut cells = vec![heads.map(str::to_owned)];
    let seconds = |value: f64| if value < 99.995 { format!("{value:.2}") } else { format!("{value:.0}") };
    cells.extend(rows.iter().map(|row| {
        [
            row.policy.clone(),
            format!("{:.1}%", 100.0 * row.hits),
            seconds(row.ttft_mean),
            seconds(row.ttft_p50),
            seconds(row.ttft_p90),
            seconds(row.ttft_p99),
            format!("{:.1}ms", 1000.0 * row.inter_token),
            seconds(row.end_to_end),
            format!("{:.2}", row.imbalance),
            row.idle.to_string(),
            format!("{:.0}%", 100.0 * row.forecast_error),
        ]
    }));
    let width = |column: usize| cells.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let line = |row: &[String; 11]| {
        let first = format!("{:<width$}", row[0], width = widths[0]);
        let rest = row.iter().zip(&widths).skip(1).map(|(cell, width)| format!("  {cell:>width$}"));
        first + &rest.collect::<String>() + "\n"
    };
    cells.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_observed_values() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        let three = [1.0, 2.0, 9.0];
        for (values, hundredths, expected) in [
            (&hundred[..], 50, 50.0),
            (&hundred, 90, 90.0),
            (&hundred, 99, 99.0),
            (&three, 50, 2.0),
            (&three, 90, 9.0),
            (&three[..1], 99, 1.0),
            (&[], 50, 0.0),
        ] {
            assert_eq!(percentile(values, hundredths), expected, "{hundredths} of {values:?}");
        }
    }

    fn lives() -> Vec<Life> {
        let life = |upstream, first| Life {
            upstream,
            prompt: 100,
            cached: 30,
            first,
            forecast_error: 0.1 * first,
            between: (upstream == 0).then_some(0.02),
            end: 2.0 * first,
        };
        vec![life(0, 1.0), life(0, 2.0), life(0, 150.0), life(2, 3.0)]
    }

    #[test]
    fn summarises_requests_in_a_row() {
        let row = ReportRow::new("work", 4, &lives(), 2);
        assert_eq!((row.requests, row.refused, row.idle), (4, 2, 2));
        assert_eq!((row.hits, row.ttft_mean, row.ttft_p50, row.ttft_p90), (0.3, 39.0, 2.0, 150.0));
        assert_eq!((row.inter_token, row.end_to_end, row.imbalance), (0.02, 78.0, 3.0));
        assert_eq!(row.forecast_error, 0.2);
        let nothing = ReportRow::new("work", 4, &[], 0);
        assert_eq!((nothing.requests, nothing.ttft_p99, nothing.imbalance), (0, 0.0, 0.0));
    }

    #[test]
    fn aligns_the_columns_of_the_table() {
        let table =
            table(&[ReportRow::new("work", 4, &lives(), 0), ReportRow::new("least-requests", 4, &[], 0)]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|line| line.len() == lines[0].len()), "{table}");
        assert!(lines[1].contains("30.0%") && lines[1].contains(" 150 ") && lines[1].contains("20.0ms"));
    }
}
