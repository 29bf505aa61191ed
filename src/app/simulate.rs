//! Reads what is to be replayed, replays it with every policy, and prints a row of each.

use std::fs;
use std::io::Write;

use crate::cli::simulate::SimulateArgs;
use crate::sim::replay::load::Workload;
use crate::sim::replay::report::{ReportRow, table};
use crate::sim::replay::{self, trace};

/// A problem is one of the arguments, or of the file that they name.
pub fn run(args: &SimulateArgs, out: &mut impl Write) -> Result<(), String> {
    let load = load(args)?.faster(args.rate);
    let rows = rows(args, &load)?;
    let text = if args.json { json(&rows)? } else { table(&rows) };
    out.write_all(text.as_bytes()).map_err(|error| format!("cannot print: {error}"))
}

fn load(args: &SimulateArgs) -> Result<Workload, String> {
    match (args.shape, &args.trace) {
        (Some(shape), _) => Ok(shape.load(args.seed)),
        (None, Some(path)) => {
            let text = fs::read_to_string(path)
                .map_err(|error| format!("--trace: cannot read {}: {error}", path.display()))?;
            trace::parse(&text, args.seed).map_err(|problem| format!("{}: {problem}", path.display()))
        }
        (None, None) => Err("--trace or --shape must say what to replay".into()),
    }
}

/// One row a policy, each on a thread of its own.
fn rows(args: &SimulateArgs, load: &Workload) -> Result<Vec<ReportRow>, String> {
    let setup = args.setup();
    let rows: Option<Vec<ReportRow>> = std::thread::scope(|scope| {
        let replay = |policy| scope.spawn(move || replay::run(load, setup, policy));
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
