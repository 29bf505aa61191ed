//! Both ends of the traffic for benches/proxies.sh and benches/routes.sh: the server behind the proxies and
//! the clients before them, and the readings of what a proxy used in between.
//!
//! ```text
//! traffic upstream PORT                               serve until killed
//! traffic wait PORT                                   until a chat request is answered with 200
//! traffic requests PORT BYTES COUNT --proxy PID ...   prints one sample
//! traffic events   PORT STREAMS SECONDS --proxy PID ...  prints one sample, two gaps, KiB and failures
//! traffic rate     PORT BYTES RATE SECONDS --proxy PID ...  prints one sample, and two times
//! traffic idle     PORT BYTES STREAMS --proxy PID     prints KiB per stream
//! ```
//!
//! A sample is five numbers: CPU microseconds of the proxy for a unit (without a proxy: of the two ends),
//! CPU that others took (in cores), units a second, and how much of a core the proxy and the ends were busy.
//! The times are the median and the 99th percentile, in microseconds, from when a request was due
//! to the first event; the gaps are the median and the 99th percentile between two events of a stream.
//!
//! It never judges, repeats or averages: that is the script's. It speaks just the HTTP/1.1 that this
//! bench needs, by hand, so that both ends together fit on one core beside a fast proxy.

mod crowd;
mod fixed_rate;
mod load;
mod meter;
mod prompt;
mod upstream;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use crowd::{Crowd, CrowdSample, GapTimes};
use meter::Meter;
use prompt::Answer;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve JSON, streams of events and what a balancer asks, until killed
    Upstream {
        port: u16,
        /// Streams carry token ids and log-probabilities
        #[arg(long)]
        ids: bool,
        /// Milliseconds between two events of a stream
        #[arg(long, default_value_t = upstream::PACE_MILLIS)]
        pace: u64,
    },
    /// Wait until a chat request is answered with 200
    Wait { port: u16 },
    /// Closed loop of chat requests over kept connections
    Requests {
        port: u16,
        bytes: usize,
        count: usize,
        #[arg(long, default_value_t = 32)]
        connections: usize,
        /// The model that they ask for
        #[arg(long, default_value = "sim")]
        model: String,
        /// Ask for streams of so many events at once, and an end
        #[arg(long)]
        burst: Option<usize>,
        #[command(flatten)]
        watched: Watched,
    },
    /// Streams that get events at the pace of a model, watched for so many seconds
    Events {
        port: u16,
        streams: usize,
        seconds: f64,
        /// Measure a proxy that cannot keep the pace, too
        #[arg(long)]
        any_pace: bool,
        #[command(flatten)]
        watched: Watched,
    },
    /// Open loop of short streams: so many requests a second, whether or not the others are answered
    Rate {
        port: u16,
        bytes: usize,
        rate: f64,
        seconds: f64,
        #[command(flatten)]
        watched: Watched,
    },
    /// Streams that are silent after their first event
    Idle {
        port: u16,
        bytes: usize,
        streams: usize,
        #[arg(long)]
        proxy: u32,
        /// How often in a row the memory must not fall before it is read
        #[arg(long, default_value_t = load::SAME)]
        calm: usize,
    },
}

#[derive(Args)]
struct Watched {
    /// Process of the proxy; none for a measurement without one
    #[arg(long)]
    proxy: Option<u32>,
    /// Process of the upstream
    #[arg(long)]
    upstream: u32,
    /// The cores that all of them are pinned to
    #[arg(long, value_delimiter = ',', default_value = "0,1")]
    cores: Vec<u32>,
}

impl Watched {
    fn meter(&self) -> Meter {
        Meter::new(self.proxy, vec![self.upstream, std::process::id()], &self.cores)
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Upstream { port, ids, pace } => {
            let event = if ids { upstream::EVENT_WITH_IDS } else { upstream::EVENT };
            upstream::serve(port, event, Duration::from_millis(pace)).await.map_err(|error| error.to_string())
        }
        Command::Wait { port } => load::wait(port).await,
        Command::Requests { port, bytes, count, connections, model, burst, watched } => {
            let requests = prompt::requests(bytes, &model, burst.map_or(Answer::Whole, Answer::Burst));
            load::requests(port, requests, (count, connections), &watched.meter()).await.map(show)
        }
        Command::Events { port, streams, seconds, any_pace, watched } => {
            let crowd = Crowd { port, streams, seconds, any_pace };
            crowd::run(&crowd, watched.proxy, &watched.meter()).await.map(show_crowd)
        }
        Command::Rate { port, bytes, rate, seconds, watched } => {
            fixed_rate::run(port, bytes, (rate, seconds), &watched.meter()).await.map(show_times)
        }
        Command::Idle { port, bytes, streams, proxy, calm } => {
            load::idle(port, bytes, streams, (proxy, calm)).await.map(|kib| println!("{kib:.1}"))
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("traffic: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show(sample: meter::Sample) {
    println!("{}", numbers(&sample));
}

fn show_times((sample, times): (meter::Sample, fixed_rate::FirstEventTimes)) {
    println!("{} {:.0} {:.0}", numbers(&sample), times.median, times.p99);
}

fn show_crowd(CrowdSample { sample, gaps: GapTimes { median, p99 }, kib, failed }: CrowdSample) {
    println!("{} {median:.0} {p99:.0} {kib:.1} {failed}", numbers(&sample));
}

fn numbers(sample: &meter::Sample) -> String {
    let meter::Sample { cost, foreign, rate, busy, ends } = sample;
    format!("{cost:.2} {foreign:.3} {rate:.0} {busy:.2} {ends:.2}")
}
