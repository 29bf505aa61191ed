//! Reads traces for a replay: captured calls, and traces in the form of Mooncake's. A trace has one JSON
//! object a line, a request each; the first line decides the form.
//!
//! A line of Mooncake's form:
//!
//! ```text
//! {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}
//! ```
//!
//! Time is in milliseconds. `hash_ids` are the chained hashes of blocks of 512 tokens; the last block may
//! not be full. The trace does not identify conversations, so every line counts as one of its own and does
//! not wait for an earlier answer.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::captured::{CapturedCalls, without_place};
use super::load::{ConversationTurn, ReplayConversation, Workload};
use crate::engine::dice::{Dice, mix};

/// The tokens of a block.
pub const BLOCK_TOKENS: usize = 512;

/// The longest time over which arrivals with one timestamp are spread, in seconds.
const MAX_SPREAD_SECONDS: f64 = 3.0;

#[derive(Deserialize)]
struct TraceLine {
    timestamp: f64,
    input_length: usize,
    output_length: usize,
    hash_ids: Vec<u64>,
}

/// The form of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceForm {
    Mooncake,
    /// Calls that a balancer has captured.
    Captured,
}

/// A trace as a load.
#[derive(Debug)]
pub struct TraceLoad {
    pub load: Workload,
    pub form: TraceForm,
    /// The number of captured calls without an answer.
    pub left_out: usize,
}

/// Reads a trace line by line.
#[derive(Default)]
pub struct TraceReader {
    number: usize,
    form: Option<TraceForm>,
    lines: Vec<TraceLine>,
    captured: CapturedCalls,
}

/// The fields that distinguish the forms.
#[derive(Deserialize)]
struct FormFields {
    hash_ids: Option<IgnoredAny>,
    session_id: Option<IgnoredAny>,
}

// === impl TraceReader ===

impl TraceReader {
    /// Reads the next line; an error names the line.
    pub fn line(&mut self, text: &str) -> Result<(), String> {
        self.number += 1;
        if text.trim().is_empty() {
            return Ok(());
        }
        let form = *self.form.get_or_insert_with(|| form(text).unwrap_or(TraceForm::Mooncake));
        let added = match form {
            TraceForm::Mooncake => read(text).map(|line| self.lines.push(line)),
            TraceForm::Captured => self.captured.add(text),
        };
        added.map_err(|problem| match self::form(text) {
            Some(other) if other != form => {
                format!("line {}: its form is not that of the lines before it", self.number)
            }
            _ => format!("line {}: {problem}", self.number),
        })
    }

    /// The load of the whole trace, once all lines are read.
    pub fn finish(self, seed: u64) -> Result<TraceLoad, String> {
        let (form, left_out) = (self.form.unwrap_or(TraceForm::Mooncake), self.captured.left_out());
        let load = match form {
            TraceForm::Mooncake => spread(self.lines, seed),
            TraceForm::Captured => self.captured.load(),
        };
        match (load.sessions.is_empty(), left_out) {
            (false, _) => Ok(TraceLoad { load, form, left_out }),
            (true, 0) => Err("there is no request in it".into()),
            (true, calls) => Err(format!("none of its {calls} calls had an answer")),
        }
    }
}

/// Returns the form of a line, if its fields decide it.
fn form(text: &str) -> Option<TraceForm> {
    let fields: FormFields = serde_json::from_str(text).ok()?;
    match (fields.hash_ids, fields.session_id) {
        (Some(_), _) => Some(TraceForm::Mooncake),
        (None, Some(_)) => Some(TraceForm::Captured),
        (None, None) => None,
    }
}

/// Reads a whole trace; an error names the line.
pub fn parse(text: &str, seed: u64) -> Result<Workload, String> {
    let mut reader = TraceReader::default();
    text.lines().try_for_each(|line| reader.line(line))?;
    reader.finish(seed).map(|trace| trace.load)
}

/// Returns the requests of Mooncake's lines.
///
/// The clocks of traces are coarse: arrivals within three seconds have one timestamp. So each request is
/// moved by a random part of the time to the next timestamp, of three seconds at most.
fn spread(mut lines: Vec<TraceLine>, seed: u64) -> Workload {
    lines.sort_by(|one, other| one.timestamp.total_cmp(&other.timestamp));
    let first = lines.first().map_or(0.0, |line| line.timestamp);
    let mut dice = Dice::of(seed, 0);
    let mut sessions = Vec::with_capacity(lines.len());
    let mut next = 0;
    for at in 0..lines.len() {
        let line = &lines[at];
        while next < lines.len() && lines[next].timestamp <= line.timestamp {
            next += 1;
        }
        let gap =
            lines.get(next).map_or(MAX_SPREAD_SECONDS, |next| (next.timestamp - line.timestamp) / 1000.0);
        let start = (line.timestamp - first) / 1000.0 + dice.unit() * gap.min(MAX_SPREAD_SECONDS);
        let full = (line.input_length / BLOCK_TOKENS).min(line.hash_ids.len());
        let chain = line.hash_ids[..full].iter().map(|id| mix(id + 1)).collect();
        let turn = ConversationTurn { wait: 0.0, prompt: line.input_length, output: line.output_length };
        let (turns, rewrites) = (vec![turn], Vec::new());
        sessions.push(ReplayConversation { start, chain, opening: None, turns, rewrites });
    }
    Workload { block: BLOCK_TOKENS, sessions }
}

fn read(text: &str) -> Result<TraceLine, String> {
    let line: TraceLine = serde_json::from_str(text).map_err(without_place)?;
    if !line.timestamp.is_finite() || line.timestamp < 0.0 {
        return Err(format!("timestamp {} is no time", line.timestamp));
    }
    if line.input_length == 0 || line.output_length == 0 {
        return Err("input_length and output_length must be above 0".into());
    }
    if line.hash_ids.len() < line.input_length / BLOCK_TOKENS {
        let ids = line.hash_ids.len();
        return Err(format!("{ids} hash_ids for {} tokens: one for every {BLOCK_TOKENS}", line.input_length));
    }
    if line.hash_ids.contains(&u64::MAX) {
        return Err("a hash id is out of range".into());
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(at: u64, input: usize, ids: &[u64]) -> String {
        format!(
            "{{\"timestamp\": {at}, \"input_length\": {input}, \"output_length\": 9, \
            \"hash_ids\": {ids:?}}}\n"
        )
    }

    #[test]
    fn reads_a_line_as_a_request_with_its_full_blocks() {
        let text = format!("{}\n{}", line(3000, 1100, &[0, 1, 2]), line(1000, 600, &[0, 5]));
        let load = parse(&text, 1).expect("a good trace");
        let of = |at: usize| (load.sessions[at].chain.len(), load.sessions[at].turns[0].prompt);
        assert_eq!((of(0), of(1)), ((1, 600), (2, 1100)), "in order of time");
        assert_eq!(load.sessions[0].chain[0], load.sessions[1].chain[0]);
        assert_eq!((load.block, load.requests()), (512, 2));
    }

    #[test]
    fn spreads_equal_timestamps_by_the_seed() {
        let text: String = [0, 0, 0, 2000, 2000, 60_000].map(|at| line(at, 600, &[0, 1])).concat();
        let starts = |seed| -> Vec<f64> {
            parse(&text, seed).expect("a good trace").sessions.iter().map(|session| session.start).collect()
        };
        let bounds = [(0.0, 2.0), (0.0, 2.0), (0.0, 2.0), (2.0, 5.0), (2.0, 5.0), (60.0, 63.0)];
        for seed in 0..20 {
            let starts = starts(seed);
            assert!(starts.iter().zip(bounds).all(|(at, (from, to))| (from..to).contains(at)), "{starts:?}");
        }
        assert_eq!(starts(7), starts(7));
        assert_ne!(starts(7), starts(8));
    }

    #[test]
    fn names_an_invalid_line() {
        let good = line(0, 600, &[0, 1]);
        for (bad, problem) in [
            ("nonsense\n".to_owned(), "line 2: expected"),
            ("{}\n".to_owned(), "line 2: missing field `timestamp`"),
            ("{\"timestamp\": 0, \"input_length\": -4}\n".to_owned(), "line 2: invalid value"),
            (line(0, 0, &[0]), "line 2: input_length and output_length must be above 0"),
            (line(0, 2000, &[0]), "line 2: 1 hash_ids for 2000 tokens"),
            (line(0, 600, &[u64::MAX]), "line 2: a hash id is out of range"),
            (good.replacen("0,", "-1,", 1), "line 2: timestamp -1 is no time"),
            (good.trim_end().trim_end_matches('}').to_owned(), "line 2: EOF"),
        ] {
            let problem_seen = parse(&format!("{good}{bad}"), 1).expect_err("a bad line");
            assert!(problem_seen.starts_with(problem), "{problem_seen} for {bad}");
            assert!(!problem_seen.contains("column"), "{problem_seen}");
        }
        assert!(parse("\n\n", 1).is_err());
    }
}
