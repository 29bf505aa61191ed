//! The beginning of a trace, played in real time through the running product over simulated engines, beside
//! the same on the virtual clock of `vllm-lb simulate`: do both give the same picture? `benches/replay.sh`
//! runs this.
//!
//! Engines and clients are this process, the balancer is one of its own. Time runs faster than it did: what
//! is measured is told in seconds of the trace. So whatever the product and this program take for themselves
//! counts as many times as time is faster, and the figures are worth something only while there are cores to
//! spare: the table tells how busy they were.
//!
//! A block of the trace is a text of 512 words of its own, each a token; what is left of a prompt is a text
//! that no other has. Prompts go out as completions, which add nothing to them.

#[path = "../tests/it/common/mod.rs"]
mod common;
#[path = "replay/play.rs"]
mod play;

use std::process::ExitCode;

use play::{Cast, Played, beginning, heads, line, mean, play, simulate};
use vllm_lb::simulate::report::ReportRow;
use vllm_lb::simulate::trace;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let number =
        |at: usize, usual: f64| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(usual);
    let (Some(path), minutes, speed) = (arguments.first(), number(1, 5.0), number(2, 5.0)) else {
        eprintln!("replay FILE [MINUTES] [SPEED]");
        return ExitCode::FAILURE;
    };
    let text = std::fs::read_to_string(path).expect("the trace can be read");
    let load = beginning(trace::parse(&text, 1).expect("it is a trace"), minutes);
    let virtual_rows = simulate(&load, 1, None);
    let Played { row: product, balancers, rest } =
        play(&load, &Cast { speed, balancers: 1, redis: None }).await;
    heads();
    for (seed, row) in (1..).zip(&virtual_rows) {
        line(&format!("virtual clock, seed {seed}"), row);
    }
    let expected = mean(&virtual_rows);
    line("virtual clock, mean", &expected);
    line(&format!("product, {speed} times faster"), &product);
    let off = |of: fn(&ReportRow) -> f64| 100.0 * (of(&product) / of(&expected) - 1.0);
    println!(
        "\nThe product against the virtual clock: mean {:+.1} %, median {:+.1} %, 90th percentile {:+.1} %.\n\
         {} requests; of one core, the balancer took {:.0} % and engines and clients {:.0} %.",
        off(|row| row.ttft_mean),
        off(|row| row.ttft_p50),
        off(|row| row.ttft_p90),
        product.requests,
        100.0 * balancers,
        100.0 * rest,
    );
    ExitCode::SUCCESS
}
