//! Reads a load, replays it with every policy, and prints a row for each.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;

use crate::cli::simulate::SimulateArgs;
use crate::simulate::load::Workload;
use crate::simulate::report::{ReportRow, table};
use crate::simulate::trace::{TraceForm, TraceLoad, TraceReader};
use crate::simulate::{self, Setup};

/// The longest line of a trace, in bytes.
const MAX_LINE_BYTES: u64 = 256 << 20;

/// Runs the command. An error concerns the arguments or the file that they name; notes are printed apart
/// from the rows.
pub fn run(args: &SimulateArgs, out: &mut impl Write, notes: &mut impl Write) -> Result<(), String> {
    let mut setup = args.setup();
    let load = match (args.shape, &args.trace) {
        (Some(shape), _) => shape.load(args.seed),
        (None, Some(path)) => {
            let trace = read(path, args.seed)?;
            // Captured turns followed the answers before them.
            setup.open &= trace.form == TraceForm::Mooncake;
            if trace.left_out > 0 {
                let _ = writeln!(
                    notes,
                    "{}: {} calls without an answer are left out",
                    path.display(),
                    trace.left_out
                );
            }
            trace.load
        }
        (None, None) => return Err("--trace or --shape must say what to replay".into()),
    };
    let rows = rows(args, setup, &load.faster(args.rate))?;
    let text = if args.json { json(&rows)? } else { table(&rows) };
    out.write_all(text.as_bytes()).map_err(|error| format!("cannot print: {error}"))
}

fn read(path: &Path, seed: u64) -> Result<TraceLoad, String> {
    let cannot = |error: std::io::Error| format!("--trace: cannot read {}: {error}", path.display());
    let wrong = |problem: String| format!("{}: {problem}", path.display());
    let mut file = BufReader::new(File::open(path).map_err(cannot)?);
    let (mut reader, mut line) = (TraceReader::default(), String::new());
    loop {
        line.clear();
        match file.by_ref().take(MAX_LINE_BYTES).read_line(&mut line).map_err(cannot)? as u64 {
            0 => return reader.finish(seed).map_err(wrong),
            MAX_LINE_BYTES if !line.ends_with('\n') => {
                return Err(wrong(format!("a line is longer than {} MiB", MAX_LINE_BYTES >> 20)));
            }
            _ => reader.line(&line).map_err(wrong)?,
        }
    }
}

/// Returns one row for each policy, each computed on a thread of its own.
fn rows(args: &SimulateArgs, setup: Setup, load: &Workload) -> Result<Vec<ReportRow>, String> {
    let rows: Option<Vec<ReportRow>> = std::thread::scope(|scope| {
        let replay = |policy| scope.spawn(move || simulate::run(load, setup, policy));
        let threads: Vec<_> = args.policies().iter().map(|policy| replay(*policy)).collect();
        threads.into_iter().map(|thread| thread.join().ok().flatten()).collect()
    });
    rows.ok_or_else(|| format!("{} upstreams are too many", setup.upstreams))
}

fn json(rows: &[ReportRow]) -> Result<String, String> {
    let line = |row: &ReportRow| serde_json::to_string(row).map(|row| row + "\n");
    let lines: Result<String, serde_json::Error> = rows.iter().map(line).collect();
    lines.map_err(|error| format!("cannot print: {error}"))
}
