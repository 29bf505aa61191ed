//! The table of `docs/metrics.md`, generated from the descriptions.
//!
//! After a change of a metric, run `VLLM_LB_BLESS=1 cargo nextest run --lib metrics::table` to write it anew.

use std::collections::HashSet;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use super::spec::{MetricKind, MetricSpec};
use super::{Metrics, balancer, upstreams};

const PAGE: &str = "docs/metrics.md";

const HEAD: &str = "| name | type | labels | what it counts or shows |\n| --- | --- | --- | --- |\n";

/// All metrics, in the order of the table.
fn specs() -> Vec<MetricSpec> {
    let registered = Metrics::default().registered;
    let registered = registered.iter().map(|metric| *metric.spec());
    registered.chain(upstreams::specs()).chain(balancer::specs()).collect()
}

fn table() -> String {
    let mut table = HEAD.to_owned();
    for MetricSpec { name, kind, labels, help, .. } in specs() {
        let kind = match kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
            MetricKind::Info => "info",
        };
        let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
        let labels = if labels.is_empty() { String::new() } else { format!(" {}", labels.join(", ")) };
        let _ = writeln!(table, "| `{name}` | {kind} |{labels} | {help} |");
    }
    table
}

#[test]
fn the_table_of_the_page_is_the_one_that_the_descriptions_generate() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
    let committed = fs::read_to_string(&file).expect("the page is in the tree");
    let start = committed.find("| name |").expect("the page has a table");
    let length = committed[start..].find("\n\n").map_or(committed.len() - start, |end| end + 1);
    let page = [&committed[..start], &table(), &committed[start + length..]].concat();
    if std::env::var_os("VLLM_LB_BLESS").is_some() {
        fs::write(&file, &page).expect("the tree can be written");
    }
    let committed = fs::read_to_string(&file).expect("the page is in the tree");
    let differing = page.lines().zip(committed.lines()).find(|(generated, committed)| generated != committed);
    assert!(page == committed, "{PAGE}: run the test with VLLM_LB_BLESS=1: {differing:#?}");
}

#[test]
fn names_follow_the_rules_of_openmetrics() {
    let (mut names, mut families) = (HashSet::new(), HashSet::new());
    for MetricSpec { name, kind, labels, help, buckets } in specs() {
        assert!(names.insert(name), "{name} is there twice");
        assert_eq!(kind == MetricKind::Counter, name.ends_with("_total"), "{name}");
        assert_eq!(kind == MetricKind::Info, name.ends_with("_info"), "{name}");
        let family = name.trim_end_matches("_total").trim_end_matches("_info");
        assert!(families.insert(family), "{family} is there twice");
        for reserved in ["_count", "_sum", "_bucket", "_created"] {
            assert!(!name.ends_with(reserved), "{name}");
        }
        assert_eq!(kind == MetricKind::Histogram, !buckets.is_empty(), "{name}");
        assert!(buckets.is_sorted() && !labels.contains(&"le"), "{name}");
        assert!(!help.is_empty() && !help.contains(['|', '\n']) && !help.ends_with('.'), "{name}: {help}");
    }
}
