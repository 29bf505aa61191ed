//! Tests of series: their labels, their removal, and the buckets of histograms.

use super::super::exposition::ExpositionFormat;
use super::super::spec::MetricKind;
use super::*;

fn spec(labels: &'static [&'static str]) -> MetricSpec {
    MetricSpec { name: "x", kind: MetricKind::Counter, labels, help: "", buckets: &[0.1, 1.0] }
}

fn samples(metric: &dyn RegisteredMetric) -> Vec<String> {
    let mut page = ExpositionWriter::new(ExpositionFormat::Text);
    metric.write(&mut page);
    let page = String::from_utf8(page.finish()).unwrap();
    page.lines().filter(|line| !line.starts_with('#')).map(str::to_string).collect()
}

/// Regression: values were hashed one after another without a border, and not compared.
#[test]
fn values_that_make_the_same_text_are_different_series() {
    let metric = MetricVec::<Counter>::new(spec(&["b", "a"]));
    for (values, count) in [(["x", "yz"], 1), (["xy", "z"], 2), (["xyz", ""], 3), (["x", "yz"], 4)] {
        metric.with_label_values(&values).inc_by(count);
    }
    let written = ["x{a=\"\",b=\"xyz\"} 3", "x{a=\"yz\",b=\"x\"} 5", "x{a=\"z\",b=\"xy\"} 2"];
    assert_eq!(samples(&metric), written);
}

#[test]
fn series_of_what_has_gone_are_removed() {
    let metric = MetricVec::<IntGauge>::new(spec(&["upstream", "cause"]));
    let value = metric.with_label_values(&["a", "b"]);
    value.set(-3);
    metric.with_label_values(&["b", "a"]).inc();
    metric.forget(&|label, value| label == "upstream" && value == "a");
    assert_eq!(samples(&metric), ["x{cause=\"a\",upstream=\"b\"} 1"]);
    value.inc();
    metric.with_label_values(&["a", "b"]).dec();
    assert_eq!(samples(&metric)[1], "x{cause=\"b\",upstream=\"a\"} -1", "it begins anew");
}

#[test]
fn a_histogram_counts_each_value_in_the_buckets_up_to_which_it_reaches() {
    let metric = MetricVec::<SecondsHistogram>::new(spec(&[]));
    assert_eq!(samples(&metric), Vec::<String>::new());
    for seconds in [0.1, 0.05, 0.5, 7.25] {
        metric.with_label_values(&[]).observe(seconds);
    }
    let written = ["x_bucket{le=\"0.1\"} 2", "x_bucket{le=\"1\"} 3", "x_bucket{le=\"+Inf\"} 4"];
    assert_eq!(samples(&metric)[..3], written);
    assert_eq!(samples(&metric)[3..], ["x_sum 7.9", "x_count 4"]);
}
