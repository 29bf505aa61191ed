//! Whether the memory of this process, balancer, engines and clients together, stays what it was.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::common::EngineServer;

/// Between two samples.
const PACE: Duration = Duration::from_secs(1);

/// Requests that a simulated engine remembers. Until each has so many, memory grows by them.
const REMEMBERED: usize = 1000;

/// The share of the samples at the beginning, while caches and pools fill, that say nothing.
const WARM_UP: f64 = 1.0 / 3.0;

/// What the rest may grow by from its beginning to its end, in KiB and as a share of its mean: allocators and
/// troubles of the moment.
const MAX_GROWTH_KIB: f64 = 8.0 * 1024.0;
const MAX_GROWTH: f64 = 0.1;

/// Fewer samples tell nothing.
const MIN_SAMPLES: usize = 60;

/// Seconds since the beginning, and KiB.
pub type Sample = (f64, f64);

/// Samples from when the engines remember as much as they can until it is over.
pub async fn watch(engines: Vec<Arc<EngineServer>>, over: Arc<AtomicBool>) -> Vec<Sample> {
    let begun = Instant::now();
    let (mut samples, mut are_full) = (Vec::new(), false);
    while !over.load(Relaxed) {
        sleep(PACE).await;
        are_full = are_full || engines.iter().all(|engine| engine.requests().len() >= REMEMBERED);
        if are_full {
            samples.push((begun.elapsed().as_secs_f64(), resident()));
        }
    }
    samples
}

fn resident() -> f64 {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").expect("Linux tells it");
    let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:")).expect("it is there");
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("it is a number")
}

/// Fails when memory grew after the beginning, or was not watched for long; prints by how much.
pub fn has_stayed(samples: &[Sample]) {
    assert!(samples.len() >= MIN_SAMPLES, "{} samples of memory only", samples.len());
    let settled = &samples[(samples.len() as f64 * WARM_UP) as usize..];
    let (growth, mean) = growth(settled);
    println!("memory: {mean:.0} KiB in the mean, {growth:+.0} KiB from beginning to end");
    let most = mean * MAX_GROWTH + MAX_GROWTH_KIB;
    assert!(growth < most, "memory grew by {growth:.0} KiB: {samples:?}");
}

/// What the line of least squares rises by, and the mean.
fn growth(samples: &[Sample]) -> (f64, f64) {
    let count = samples.len() as f64;
    let mean = |of: fn(&Sample) -> f64| samples.iter().map(of).sum::<f64>() / count;
    let (time, memory) = (mean(|sample| sample.0), mean(|sample| sample.1));
    let both: f64 = samples.iter().map(|sample| (sample.0 - time) * (sample.1 - memory)).sum();
    let spread: f64 = samples.iter().map(|sample| (sample.0 - time).powi(2)).sum();
    let long = samples.last().map_or(0.0, |last| last.0 - samples[0].0);
    (if spread > 0.0 { both / spread * long } else { 0.0 }, memory)
}

#[test]
fn memory_that_grows_is_noticed() {
    let samples = |step: f64| (0..90).map(move |second| (f64::from(second), 1e5 + f64::from(second) * step));
    has_stayed(&samples(10.0).collect::<Vec<_>>());
    let grows: Vec<Sample> = samples(1000.0).collect();
    assert!(std::panic::catch_unwind(|| has_stayed(&grows)).is_err());
    assert!(std::panic::catch_unwind(|| has_stayed(&[])).is_err());
}
