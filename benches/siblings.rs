//! Several balancers with one Redis: do four choose as well as one, and does any trouble of Redis reach a
//! request? `benches/siblings.sh` runs this.
//!
//! First a trace and a load that is made up, each through one balancer, through four that share a Redis, and
//! through four that do not. Then a steady load while things happen to Redis. Engines and clients are this
//! process, balancers and Redis are processes of their own.

#[path = "../tests/it/common/mod.rs"]
mod common;
#[allow(dead_code, reason = "benches/replay.rs uses the rest")]
#[path = "replay/play.rs"]
mod play;
#[path = "siblings/trouble.rs"]
mod trouble;

use std::process::ExitCode;

use common::redis::Redis;
use play::{Cast, INTERVAL, Played, beginning, heads, line, mean, play, simulate};
use vllm_lb::simulate::load::Workload;
use vllm_lb::simulate::report::ReportRow;
use vllm_lb::simulate::shapes::Shape;
use vllm_lb::simulate::trace;

const BALANCERS: usize = 4;

/// One balancer, four with a Redis, four without.
#[derive(Clone, Copy)]
enum Way {
    One,
    Shared,
    Alone,
}

// === impl Way ===

impl Way {
    const ALL: [Way; 3] = [Way::One, Way::Shared, Way::Alone];

    fn name(self) -> &'static str {
        match self {
            Way::One => "one balancer",
            Way::Shared => "four with Redis",
            Way::Alone => "four without",
        }
    }

    fn balancers(self) -> usize {
        if matches!(self, Way::One) { 1 } else { BALANCERS }
    }

    fn simulated(self, load: &Workload) -> ReportRow {
        let interval = (!matches!(self, Way::Alone)).then_some(INTERVAL);
        mean(&simulate(load, self.balancers(), interval))
    }

    async fn played(self, load: &Workload, speed: f64) -> Played {
        let redis = match self {
            Way::Shared => Some(Redis::start(&[]).await),
            Way::One | Way::Alone => None,
        };
        let url = redis.as_ref().map(Redis::url);
        play(load, &Cast { speed, balancers: self.balancers(), redis: url.as_deref() }).await
    }
}

/// Plays all ways so often, in turn, so that what else the machine does falls on all alike.
async fn compare(name: &str, load: &Workload, speed: f64, rounds: usize) {
    println!("{name}: {} requests, {speed} times faster, {rounds} rounds.\n", load.requests());
    heads();
    for way in Way::ALL {
        line(&format!("{}, virtual clock", way.name()), &way.simulated(load));
    }
    let mut rows: [Vec<ReportRow>; Way::ALL.len()] = Default::default();
    let mut busy = [(0.0, 0.0); Way::ALL.len()];
    for round in 1..=rounds {
        for (at, way) in Way::ALL.into_iter().enumerate() {
            let Played { row, balancers, rest } = way.played(load, speed).await;
            line(&format!("{}, round {round}", way.name()), &row);
            rows[at].push(row);
            busy[at].0 += 100.0 * balancers / rounds as f64;
            busy[at].1 += 100.0 * rest / rounds as f64;
        }
    }
    let means = rows.map(|rows| mean(&rows));
    for (way, row) in Way::ALL.into_iter().zip(&means) {
        line(&format!("**{}, mean**", way.name()), row);
    }
    let off = |at: usize| 100.0 * (means[at].ttft_mean / means[0].ttft_mean - 1.0);
    println!(
        "\nMean time to the first token against one balancer: four with Redis {:+.1} %, without {:+.1} %.\n\
         Of one core, the balancers took {:.0}, {:.0} and {:.0} %, \
         engines and clients {:.0}, {:.0} and {:.0} %.\n",
        off(1),
        off(2),
        busy[0].0,
        busy[1].0,
        busy[2].0,
        busy[0].1,
        busy[1].1,
        busy[2].1,
    );
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let number =
        |at: usize, usual: f64| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(usual);
    match arguments.first().map(String::as_str) {
        Some("trouble") => trouble::table(number(1, 10.0)).await,
        Some("rag") => {
            let load = beginning(Shape::Rag.load(1), number(1, 4.0));
            compare("Questions to documents", &load, number(2, 4.0), number(3, 1.0) as usize).await;
        }
        Some(path) => {
            let text = std::fs::read_to_string(path).expect("the trace can be read");
            let load = beginning(trace::parse(&text, 1).expect("it is a trace"), number(1, 10.0));
            compare("Conversations", &load, number(2, 10.0), number(3, 2.0) as usize).await;
        }
        None => {
            eprintln!("siblings trouble [SECONDS] | rag [MINUTES] [SPEED] [ROUNDS] | TRACE [...]");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
