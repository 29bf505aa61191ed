//! Processor time by process and by threads of this process, from the scheduler's own clock.

use std::fs;

/// The beginnings of the names of this process's measured threads.
pub const OWN_THREADS: [&str; 4] = ["siblings", "readers", "engines", "clients"];

/// Seconds of processor time since each one's start.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuSeconds {
    pub balancer: f64,
    pub redis: f64,
    pub own: [f64; OWN_THREADS.len()],
}

impl CpuSeconds {
    pub fn read(balancer: u32, redis: u32) -> Self {
        let mut own = [0.0; OWN_THREADS.len()];
        for (name, seconds) in threads("self") {
            if let Some(at) = OWN_THREADS.iter().position(|own| name.starts_with(own)) {
                own[at] += seconds;
            }
        }
        let of = |process: u32| threads(&process.to_string()).iter().map(|(_, seconds)| seconds).sum();
        CpuSeconds { balancer: of(balancer), redis: of(redis), own }
    }

    /// Shares of a core since an earlier reading, in hundredths.
    pub fn since(&self, before: &Self, seconds: f64) -> Self {
        let share = |now: f64, before: f64| 100.0 * (now - before) / seconds;
        CpuSeconds {
            balancer: share(self.balancer, before.balancer),
            redis: share(self.redis, before.redis),
            own: std::array::from_fn(|at| share(self.own[at], before.own[at])),
        }
    }

    pub fn mean(all: &[Self]) -> Self {
        let mean = |of: &dyn Fn(&Self) -> f64| all.iter().map(of).sum::<f64>() / all.len() as f64;
        CpuSeconds {
            balancer: mean(&|each| each.balancer),
            redis: mean(&|each| each.redis),
            own: std::array::from_fn(|at| mean(&|each| each.own[at])),
        }
    }
}

/// Resident memory of a process.
pub fn resident_bytes(process: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kibibytes.expect("Linux reports it") * 1024.0
}

/// The name and the processor time of each thread. A thread that ends meanwhile is left out.
fn threads(process: &str) -> Vec<(String, f64)> {
    let all = fs::read_dir(format!("/proc/{process}/task")).expect("the process runs");
    let one = |path: std::path::PathBuf| {
        let name = fs::read_to_string(path.join("comm")).ok()?.trim().to_string();
        let times = fs::read_to_string(path.join("schedstat")).ok()?;
        Some((name, times.split(' ').next()?.parse::<f64>().ok()? / 1e9))
    };
    all.filter_map(|thread| one(thread.ok()?.path())).collect()
}
