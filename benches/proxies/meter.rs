//! What processes used, from /proc: CPU by the scheduler's own clock, memory by smaps_rollup.
//!
//! It must never be read inside the measured stretch: each reading costs some hundred microseconds.

use std::fs;
use std::time::Instant;

/// /proc/stat counts in hundredths of a second on every Linux.
const TICKS: f64 = 100.0;

pub struct Meter {
    proxy: Option<u32>,
    ends: Vec<u32>,
    cores: Vec<String>,
}

/// CPU seconds since each one's own beginning.
pub struct Reading {
    at: Instant,
    proxy: f64,
    ends: f64,
    busy: f64,
}

pub struct Sample {
    /// CPU microseconds a unit.
    pub cost: f64,
    /// What other processes took of the cores in use, in cores.
    pub foreign: f64,
    /// Units a second.
    pub rate: f64,
    /// How much of its core the proxy was busy, and clients and upstream of theirs.
    pub busy: f64,
    pub ends: f64,
}

impl Meter {
    pub fn new(proxy: Option<u32>, ends: Vec<u32>, cores: &[u32]) -> Self {
        Meter { proxy, ends, cores: cores.iter().map(|core| format!("cpu{core}")).collect() }
    }

    pub fn read(&self) -> Result<Reading, String> {
        let ends = self.ends.iter().map(|pid| cpu_seconds(*pid)).sum::<Result<f64, String>>()?;
        let proxy = self.proxy.map_or(Ok(0.0), cpu_seconds)?;
        Ok(Reading { at: Instant::now(), proxy, ends, busy: busy_seconds(&self.cores)? })
    }

    /// What `units` cost since `before`.
    pub fn sample(&self, before: &Reading, units: usize) -> Result<Sample, String> {
        let now = self.read()?;
        let seconds = (now.at - before.at).as_secs_f64();
        let (proxy, ends) = (now.proxy - before.proxy, now.ends - before.ends);
        let watched = if self.proxy.is_some() { proxy } else { ends };
        Ok(Sample {
            cost: watched * 1e6 / units as f64,
            foreign: ((now.busy - before.busy - proxy - ends) / seconds).max(0.0),
            rate: units as f64 / seconds,
            busy: proxy / seconds,
            ends: ends / seconds,
        })
    }
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}

/// CPU time of all threads of a process. /proc/PID/stat says the same in steps of 10 ms.
fn cpu_seconds(pid: u32) -> Result<f64, String> {
    let path = format!("/proc/{pid}/task");
    let mut nanoseconds = 0.0;
    for thread in fs::read_dir(&path).map_err(|error| format!("{path}: {error}"))? {
        let thread = thread.map_err(|error| format!("{path}: {error}"))?;
        let schedstat = read(&format!("{}/schedstat", thread.path().display()))?;
        nanoseconds += first_number(&schedstat).ok_or_else(|| format!("{path}: no schedstat"))?;
    }
    Ok(nanoseconds / 1e9)
}

/// Time in which the cores were not idle, or were taken away by a hypervisor.
fn busy_seconds(cores: &[String]) -> Result<f64, String> {
    let stat = read("/proc/stat")?;
    let mut ticks = 0.0;
    for line in stat.lines() {
        let mut fields = line.split_whitespace();
        if fields.next().is_some_and(|name| cores.iter().any(|core| core == name)) {
            let numbers: Vec<f64> = fields.filter_map(|field| field.parse().ok()).collect();
            // user, nice, system, then idle and iowait left out, then irq, softirq, steal.
            ticks += numbers.iter().take(3).chain(numbers.iter().skip(5).take(3)).sum::<f64>();
        }
    }
    Ok(ticks / TICKS)
}

/// Resident memory of a process in KiB.
pub fn resident(pid: u32) -> Result<f64, String> {
    let rollup = read(&format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:"));
    line.and_then(first_number).ok_or_else(|| format!("no Rss in smaps_rollup of {pid}"))
}

fn first_number(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}
