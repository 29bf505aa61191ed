//! Many streams at the pace of a model: what an event costs, how long the gaps between the events of a stream
//! are when they reach the client, and what the streams take of the proxy's memory.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::sleep;

use super::load::{Stream, streams};
use super::meter::{self, Meter, Sample};

/// Between the opening of streams and the measurement of what goes through them.
const BREATHER: Duration = Duration::from_millis(300);

/// Streams that are opened at a time.
const OPENED_AT_ONCE: usize = 32;

/// Body bytes of the request for a stream.
const BODY_BYTES: usize = 1600;

/// What the streams of a measurement received.
#[derive(Default)]
struct Received {
    measuring: AtomicBool,
    events: AtomicUsize,
    reads: AtomicUsize,
    /// Microseconds between two reads of one stream.
    gaps: Mutex<Vec<u32>>,
}

/// Microseconds between two events of one stream, as they reach the client.
pub struct GapTimes {
    pub median: f64,
    pub p99: f64,
}

/// What streams cost, and how their events came.
pub struct CrowdSample {
    pub sample: Sample,
    pub gaps: GapTimes,
    /// KiB of the proxy's resident memory for each stream, measured while events arrive.
    pub kib: f64,
    /// Streams that ended although the client kept them open.
    pub failed: usize,
}

/// The streams to open, and what counts as a sample.
pub struct Crowd {
    pub port: u16,
    pub streams: usize,
    pub seconds: f64,
    /// Whether events that arrive in one piece, since a proxy cannot keep the pace, are measured as well.
    pub any_pace: bool,
}

impl Received {
    fn add(&self, events: usize, gap: Duration) {
        if self.measuring.load(Relaxed) {
            self.events.fetch_add(events, Relaxed);
            self.reads.fetch_add(1, Relaxed);
            if let Ok(mut gaps) = self.gaps.lock() {
                gaps.push(gap.as_micros() as u32);
            }
        }
    }

    fn gap_times(&self) -> Result<GapTimes, String> {
        let mut gaps = self.gaps.lock().map_err(|_| "a reader of a stream panicked")?;
        gaps.sort_unstable();
        let last = gaps.len().checked_sub(1).ok_or("no event arrived")?;
        let at = |share: f64| f64::from(gaps[(last as f64 * share) as usize]);
        Ok(GapTimes { median: at(0.5), p99: at(0.99) })
    }
}

/// Reads events until the stream fails.
async fn follow(mut stream: Stream, received: Arc<Received>) -> Result<(), String> {
    let mut last = Instant::now();
    loop {
        let before = stream.events;
        stream.read().await?;
        if stream.events > before {
            let now = Instant::now();
            received.add(stream.events - before, now - last);
            last = now;
        }
    }
}

/// Opens the streams, and measures them for so many seconds. A stream that fails is counted.
pub async fn run(crowd: &Crowd, proxy: Option<u32>, meter: &Meter) -> Result<CrowdSample, String> {
    let resident = || proxy.map_or(Ok(0.0), meter::resident);
    let received = Arc::new(Received::default());
    let mut following = JoinSet::new();
    drop(streams(crowd.port, BODY_BYTES, 4, 1).await?);
    let empty = resident()?;
    // Each is followed as soon as it is open, so that nothing has piled up when the measurement begins.
    let mut opened = 0;
    while opened < crowd.streams {
        let few = (crowd.streams - opened).min(OPENED_AT_ONCE);
        for stream in streams(crowd.port, BODY_BYTES, few, usize::MAX).await? {
            following.spawn(follow(stream, received.clone()));
        }
        opened += few;
    }
    sleep(BREATHER).await;
    let before = meter.read()?;
    received.measuring.store(true, Relaxed);
    sleep(Duration::from_secs_f64(crowd.seconds)).await;
    received.measuring.store(false, Relaxed);
    let events = received.events.load(Relaxed);
    let sample = meter.sample(&before, events.max(1))?;
    let kib = (resident()? - empty) / crowd.streams as f64;
    let mut failed = 0;
    while let Some(ended) = following.try_join_next() {
        ended.map_err(|error| error.to_string())?.err().inspect(|error| eprintln!("traffic: {error}"));
        failed += 1;
    }
    let reads = received.reads.load(Relaxed);
    if !crowd.any_pace && (reads * 20 < events * 19 || failed > 0) {
        return Err(format!("{events} events came in {reads} reads and {failed} streams failed"));
    }
    Ok(CrowdSample { sample, gaps: received.gap_times()?, kib, failed })
}
