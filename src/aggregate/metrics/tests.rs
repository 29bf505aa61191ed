//! Tests of `metrics`: pages of several upstreams made one, by table and by property.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use proptest::prelude::*;
use proptest::sample::select;

use super::*;

const SAMPLE: &str = include_str!("../../../tests/data/vllm-0.32/metrics.body");

fn samples(page: &str) -> Vec<&str> {
    page.lines().filter(|line| !line.starts_with('#')).collect()
}

/// What the format asks for: one HELP and TYPE a family, and its samples behind them.
fn assert_in_order(page: &str) {
    let mut heads = HashSet::new();
    for line in page.lines().filter(|line| line.starts_with('#')) {
        let head: Vec<&str> = line.splitn(4, ' ').take(3).collect();
        assert!(heads.insert(head), "{line} comes twice");
    }
    let names: Vec<&str> = samples(page).iter().map(|line| &line[..name_end(line)]).collect();
    let whole = |name: &str| {
        ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|part| name.strip_suffix(part))
            .unwrap_or(name)
            .to_owned()
    };
    for (first, name) in names.iter().enumerate() {
        let last = names.iter().rposition(|other| other == name).unwrap();
        assert!(names[first..=last].iter().all(|other| whole(other) == whole(name)), "{name} is torn apart");
    }
    assert!(page.is_empty() || page.ends_with('\n'));
}

#[test]
fn one_upstreams_page_gains_a_label_and_loses_nothing() {
    let merged = merge_metrics(&[("gpu-0", SAMPLE)]);
    let stripped = merged.replace("{upstream=\"gpu-0\",", "{").replace("{upstream=\"gpu-0\"}", "");
    assert_eq!(stripped, SAMPLE);
    assert_in_order(&merged);
}

#[test]
fn two_upstreams_stand_in_one_family() {
    let merged = merge_metrics(&[("gpu-0", SAMPLE), ("gpu-1", SAMPLE)]);
    assert_in_order(&merged);
    assert_eq!(samples(&merged).len(), 2 * samples(SAMPLE).len());
    let heads = |page: &str| page.lines().filter(|line| line.starts_with('#')).count();
    assert_eq!(heads(&merged), heads(SAMPLE));
    let lines: Vec<&str> = merged.lines().filter(|line| line.contains("vllm:num_requests_running")).collect();
    assert_eq!(
        lines[1..],
        [
            "# TYPE vllm:num_requests_running gauge",
            "vllm:num_requests_running{upstream=\"gpu-0\",engine=\"0\",model_name=\"tiny\"} 0.0",
            "vllm:num_requests_running{upstream=\"gpu-1\",engine=\"0\",model_name=\"tiny\"} 0.0",
        ]
    );
}

#[test]
fn lines_are_read_as_the_format_says() {
    for (line, merged) in [
        ("a 1", "a{upstream=\"u\"} 1\n"),
        ("a{} 1", "a{upstream=\"u\"} 1\n"),
        ("  a { } 1 ", "a{upstream=\"u\"} 1\n"),
        ("a{b=\"c\",} NaN 1700000000000", "a{upstream=\"u\",b=\"c\"} NaN 1700000000000\n"),
        ("a{ b = \"c\" , d=\"e\" } +Inf", "a{upstream=\"u\",b=\"c\",d=\"e\"} +Inf\n"),
        ("a{b=\"}\\\"{ \\\\\"} -1e-9\r", "a{upstream=\"u\",b=\"}\\\"{ \\\\\"} -1e-9\n"),
        ("a{upstream=\"x\"} 1", "a{upstream=\"u\",exported_upstream=\"x\"} 1\n"),
        (
            "a{upstream=\"x\",exported_upstream=\"y\"} 1",
            "a{upstream=\"u\",exported_upstream=\"x\",exported_exported_upstream=\"y\"} 1\n",
        ),
        ("a_bucket{le=\"1\"} 5 # {trace_id=\"t\"} 0.7 1.0", "a_bucket{upstream=\"u\",le=\"1\"} 5\n"),
        ("# HELP a", "# HELP a \n"),
        ("# HELP a some  text ", "# HELP a some  text \n"),
        ("#\tTYPE\ta\tgauge", "# TYPE a gauge\n"),
        ("# UNIT a seconds", ""),
        ("# EOF", ""),
        ("# TYPE a", ""),
        ("# HELP 7a text", ""),
        ("<html>", ""),
        ("a", ""),
        ("a one", ""),
        ("a 1 2 3", ""),
        ("a 1 now", ""),
        ("a{b=\"c\" 1", ""),
        ("a{b=\"c} 1", ""),
        ("a{b=c} 1", ""),
        ("a{=\"c\"} 1", ""),
        ("a{b:c=\"d\"} 1", ""),
        ("7a 1", ""),
        ("é 1", ""),
        ("", ""),
    ] {
        assert_eq!(merge_metrics(&[("u", line)]), merged, "{line}");
    }
    assert_eq!(merge_metrics(&[("a\"b\\c\nd", "x 1")]), "x{upstream=\"a\\\"b\\\\c\\nd\"} 1\n");
    assert_eq!(merge_metrics(&[]), "");
}

#[test]
fn families_of_one_name_and_two_types_keep_the_first() {
    let gauge = "# HELP x one\n# TYPE x gauge\nx 1\n# TYPE y counter\ny 1";
    let histogram = "# HELP x two\n# TYPE x histogram\nx_bucket{le=\"1\"} 2\nx_sum 3\nx_count 4\nz 5";
    assert_eq!(
        merge_metrics(&[("a", gauge), ("b", histogram)]),
        "# HELP x one\n# TYPE x gauge\nx{upstream=\"a\"} 1\nx_bucket{upstream=\"b\",le=\"1\"} 2\n\
         x_sum{upstream=\"b\"} 3\nx_count{upstream=\"b\"} 4\n\
         # TYPE y counter\ny{upstream=\"a\"} 1\nz{upstream=\"b\"} 5\n"
    );
    // Out of order in its page, and in a page that says nothing of types.
    assert_eq!(
        merge_metrics(&[
            ("a", "# TYPE h histogram\n# TYPE g gauge\nh_sum 1\ng 2\ng_sum 3"),
            ("b", "h_sum 4")
        ]),
        "# TYPE h histogram\nh_sum{upstream=\"a\"} 1\nh_sum{upstream=\"b\"} 4\n\
         # TYPE g gauge\ng{upstream=\"a\"} 2\ng_sum{upstream=\"a\"} 3\n"
    );
}

fn page() -> impl Strategy<Value = String> {
    let lines = [
        "# HELP a help",
        "# TYPE a gauge",
        "# TYPE a histogram",
        "# TYPE b counter",
        "a 1",
        "a{x=\"1\"} 2",
        "a_bucket{le=\"+Inf\"} 3",
        "a_sum 4",
        "a_count 5",
        "b 6",
        "b_sum 7",
        "c 8 9",
        "junk{",
        "",
        "# EOF",
    ];
    prop::collection::vec(select(lines.to_vec()), 0..20).prop_map(|lines| lines.join("\n"))
}

proptest! {
    #[test]
    fn no_sample_is_lost_or_made_up(pages in prop::collection::vec(page(), 0..4)) {
        let names: Vec<String> = (0..pages.len()).map(|index| format!("u{index}")).collect();
        let pages: Vec<_> = names.iter().map(String::as_str).zip(pages.iter().map(String::as_str)).collect();
        let merged = merge_metrics(&pages);
        assert_in_order(&merged);
        let mut count: BTreeMap<String, i64> = BTreeMap::new();
        for (name, page) in &pages {
            for line in samples(page).iter().filter(|line| !line.is_empty() && **line != "junk{") {
                *count.entry(merge_metrics(&[(name, line)]).trim_end().to_owned()).or_default() += 1;
            }
        }
        for line in samples(&merged) {
            *count.entry(line.to_owned()).or_default() -= 1;
        }
        prop_assert!(count.values().all(|difference| *difference == 0), "{:?}", count);
    }

    #[test]
    fn merging_what_was_merged_changes_only_labels(pages in prop::collection::vec(page(), 1..3)) {
        let pages: Vec<(&str, &str)> = pages.iter().map(|page| ("u", page.as_str())).collect();
        let merged = merge_metrics(&pages);
        let again = merge_metrics(&[("v", &merged)]);
        assert_in_order(&again);
        let stripped = again.replace("upstream=\"v\",exported_", "");
        let sorted = |page: &str| page.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        prop_assert_eq!(sorted(&stripped), sorted(&merged));
    }

    #[test]
    fn any_text_is_taken(
        name in any::<String>(), text in any::<String>(),
        likely in "([a-z{}=\",#\\\\ 1]|HELP|TYPE|\n){0,40}",
    ) {
        merge_metrics(&[(&name, &text), ("u", &likely)]);
    }
}
