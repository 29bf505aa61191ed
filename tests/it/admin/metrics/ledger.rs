//! Pages of metrics, what has moved between two of them, and which metrics a test has held.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::common::wire::get;
use crate::common::{Balancer, eventually};

/// Metrics that move with time, with a state that a failure changes for a moment, or with a forecast that is
/// too low. Tests hold them apart.
const MOVES_BY_ITSELF: [&str; 7] = [
    "vllm_lb_forecast_late_total",
    "vllm_lb_upstream_changes_total",
    "vllm_lb_probes_total",
    "vllm_lb_probe_reports_total",
    "vllm_lb_exchange_messages_total",
    "vllm_lb_exchange_bytes_total",
    "vllm_lb_exchange_lag_seconds_count",
];

/// The samples of a page, by their names with their labels.
pub struct MetricsPage(BTreeMap<String, f64>);

/// The metrics that tests have held.
#[derive(Default)]
pub struct Ledger {
    held: BTreeSet<String>,
}

/// The name of a sample without its labels.
fn name(sample: &str) -> &str {
    sample.split('{').next().unwrap_or(sample)
}

/// The metric that a sample is of.
fn metric_of(sample: &str) -> &str {
    let name = name(sample);
    let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
    histogram.unwrap_or(name)
}

// === impl MetricsPage ===

impl MetricsPage {
    pub async fn of(balancer: &Balancer) -> Self {
        let page = balancer.admin(get("/metrics")).await.expect(200);
        let samples = page.text().lines().filter(|line| !line.starts_with('#'));
        MetricsPage(samples.map(|line| sample(line).unwrap_or_else(|| panic!("{line}"))).collect())
    }

    /// The value of a sample; 0 before its first event.
    pub fn value(&self, sample: &str) -> f64 {
        self.0.get(sample).copied().unwrap_or(0.0)
    }

    pub fn has(&self, sample: &str) -> bool {
        self.0.contains_key(sample)
    }

    /// The counters, and the counts of histograms, that have moved since `before`, and by how much.
    fn moved_since(&self, before: &MetricsPage) -> BTreeMap<&str, f64> {
        let counts = |sample: &str| name(sample).ends_with("_total") || name(sample).ends_with("_count");
        let more = self.0.iter().map(|(sample, value)| (sample.as_str(), value - before.value(sample)));
        let more = more.filter(|(sample, more)| counts(sample) && *more != 0.0);
        more.filter(|(sample, _)| !MOVES_BY_ITSELF.contains(&name(sample))).collect()
    }
}

fn sample(line: &str) -> Option<(String, f64)> {
    let (sample, value) = line.rsplit_once(' ')?;
    Some((sample.to_string(), value.parse().ok()?))
}

// === impl Ledger ===

impl Ledger {
    /// Waits until counters and counts of histograms have moved by exactly this since `before`, and no other
    /// has. Returns the page.
    pub async fn moved(
        &mut self,
        balancer: &Balancer,
        before: MetricsPage,
        expected: &[(String, f64)],
    ) -> MetricsPage {
        let expected: BTreeMap<&str, f64> =
            expected.iter().map(|(sample, more)| (sample.as_str(), *more)).collect();
        self.held.extend(expected.keys().map(|sample| metric_of(sample).to_string()));
        let mut page = MetricsPage::of(balancer).await;
        let what = format!("the metrics move by {expected:#?}");
        let mut last = String::new();
        for _ in 0..1000 {
            let is_so = {
                let moved = page.moved_since(&before);
                last = format!("{moved:#?}");
                moved == expected
            };
            if is_so {
                return page;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            page = MetricsPage::of(balancer).await;
        }
        panic!("waited in vain until {what}; they moved by {last}");
    }

    /// Waits until a sample has this value.
    pub async fn shows(&mut self, balancer: &Balancer, sample: &str, wanted: f64) {
        self.holds(balancer, sample, |value| value == wanted).await;
    }

    /// Waits until a sample is there with a value for which `so` is true.
    pub async fn holds(&mut self, balancer: &Balancer, sample: &str, so: impl Fn(f64) -> bool) {
        self.held.insert(metric_of(sample).to_string());
        eventually(&format!("{sample} is as it should be"), async || {
            let page = MetricsPage::of(balancer).await;
            (page.has(sample) && so(page.value(sample))).then_some(())
        })
        .await;
    }

    /// Documented metrics that no test has held and that are not excepted, and exceptions without need.
    pub fn problems(&self, exceptions: &[(&str, &str)]) -> Vec<String> {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
        let page = fs::read_to_string(page).expect("the page is in the tree");
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        let documented: BTreeSet<&str> = rows.collect();
        assert!(documented.len() > 50, "the table is read");
        let excepted: BTreeSet<&str> = exceptions.iter().map(|(name, _)| *name).collect();
        let is_held = |name: &str| self.held.contains(name);
        let missed = documented.iter().filter(|name| !is_held(name) && !excepted.contains(**name));
        let stale = excepted.iter().filter(|name| is_held(name) || !documented.contains(**name));
        let unknown = self.held.iter().filter(|name| !documented.contains(name.as_str()));
        missed
            .map(|name| format!("{name} is documented and held by no test"))
            .chain(stale.map(|name| format!("{name} needs no exception")))
            .chain(unknown.map(|name| format!("{name} is not documented")))
            .collect()
    }
}
