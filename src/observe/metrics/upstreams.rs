//! Gauges of upstreams. They are not stored: each scrape reads them from the leases, so they cannot drift.

use super::exposition::{ExpositionWriter, label_pairs};
use super::spec::MetricSpec;
use crate::fleet::sight::SightState;

/// The number of states that an upstream may have.
const STATE_COUNT: usize = 6;

/// The current values of one upstream's gauges; unknown values are `None` and omitted.
#[derive(Clone, Copy)]
pub struct UpstreamGauges<'a> {
    pub upstream: &'a str,
    pub ready: bool,
    /// The labels of all states, and whether the upstream has the state.
    pub states: [(&'static str, bool); STATE_COUNT],
    pub active: u64,
    /// Requests of siblings in flight on the upstream, by their latest reports.
    pub siblings_active: u64,
    pub backlog: u64,
    pub context: u64,
    pub incarnation: u64,
    pub sight: SightState,
    pub foreign: Option<u64>,
    pub unaccounted: Option<i64>,
    pub kv_usage: Option<f64>,
    pub cache_tokens: Option<u64>,
}

const SIGHT: MetricSpec = MetricSpec::gauge(
    "vllm_lb_upstream_sight",
    "1 for how well the balancer sees the upstream's cache: `exact`, `learnt` or `blind`; 0 for the other \
     two ([meanings](routing.md#how-well-the-balancer-sees))",
    &["upstream", "sight"],
);

/// Reads a gauge from the row of an upstream.
type ReadGauge = fn(&UpstreamGauges<'_>) -> Option<f64>;

const STATE: MetricSpec = MetricSpec::gauge(
    "vllm_lb_upstream_state",
    "1 for the state that the upstream has, 0 for the others ([states](operating.md#states-of-an-upstream))",
    &["upstream", "state"],
);

const GAUGES: [(MetricSpec, ReadGauge); 10] = [
    (by_upstream("vllm_lb_upstream_ready", "1 while the upstream takes requests"), |row| {
        Some(f64::from(u8::from(row.ready)))
    }),
    (by_upstream("vllm_lb_upstream_active", "requests in flight on the upstream"), |row| {
        Some(row.active as f64)
    }),
    (
        by_upstream(
            "vllm_lb_upstream_siblings_active",
            "requests of siblings in flight on the upstream, by their latest reports",
        ),
        |row| Some(row.siblings_active as f64),
    ),
    (
        by_upstream("vllm_lb_upstream_backlog_tokens", "prompt tokens whose first byte has not come yet"),
        |row| Some(row.backlog as f64),
    ),
    (by_upstream("vllm_lb_upstream_context_tokens", "prompt tokens of all requests in flight"), |row| {
        Some(row.context as f64)
    }),
    (
        by_upstream(
            "vllm_lb_upstream_incarnation",
            "goes up when the upstream's cache counts as empty: it restarted, or it came back",
        ),
        |row| Some(row.incarnation as f64),
    ),
    (
        by_upstream(
            "vllm_lb_upstream_foreign_requests",
            "requests of other clients on the upstream, by its own metrics; absent while unknown, like the \
             next three",
        ),
        |row| row.foreign.map(|count| count as f64),
    ),
    (
        by_upstream(
            "vllm_lb_upstream_unaccounted_requests",
            "how far the balancers' view of the upstream diverges from its own, see \
             [divergence](#divergence-between-balancers)",
        ),
        |row| row.unaccounted.map(|count| count as f64),
    ),
    (by_upstream("vllm_lb_upstream_kv_usage", "the used share of the upstream's cache, 0 to 1"), |row| {
        row.kv_usage
    }),
    (
        by_upstream("vllm_lb_upstream_cache_tokens", "the number of tokens that the upstream's cache holds"),
        |row| row.cache_tokens.map(|tokens| tokens as f64),
    ),
];

const fn by_upstream(name: &'static str, help: &'static str) -> MetricSpec {
    MetricSpec::gauge(name, help, &["upstream"])
}

/// The descriptions of all gauges of upstreams.
#[cfg(test)]
pub(super) fn specs() -> impl Iterator<Item = MetricSpec> {
    GAUGES.iter().map(|(spec, _)| *spec).chain([STATE, SIGHT])
}

/// Writes the gauges of the upstreams.
pub(super) fn write(rows: &[UpstreamGauges<'_>], page: &mut ExpositionWriter) {
    let labels: Vec<String> =
        rows.iter().map(|row| label_pairs([("upstream", row.upstream)].into_iter())).collect();
    for (spec, read) in &GAUGES {
        let known = rows.iter().zip(&labels).filter_map(|(row, labels)| Some((read(row)?, labels)));
        for (index, (value, labels)) in known.enumerate() {
            if index == 0 {
                page.family(spec);
            }
            page.sample(spec, labels, value);
        }
    }
    if rows.is_empty() {
        return;
    }
    page.family(&STATE);
    for (row, labels) in rows.iter().zip(&labels) {
        for (state, has) in row.states {
            page.sample(&STATE, &format!("{labels},state=\"{state}\""), u8::from(has));
        }
    }
    page.family(&SIGHT);
    for (row, labels) in rows.iter().zip(&labels) {
        for sight in SightState::ALL {
            let has = u8::from(row.sight == sight);
            page.sample(&SIGHT, &format!("{labels},sight=\"{}\"", sight.label()), has);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::exposition::ExpositionFormat;
    use super::*;

    #[test]
    fn gauges_of_upstreams_are_escaped_and_unknown_values_are_absent() {
        let states = ["unknown", "ready", "suspect", "down", "draining", "tripped"];
        let row = UpstreamGauges {
            upstream: "a\"b\n",
            ready: true,
            states: states.map(|state| (state, state == "ready")),
            active: 2,
            siblings_active: 5,
            backlog: 3,
            context: 4,
            incarnation: 0,
            sight: SightState::Blind,
            foreign: None,
            unaccounted: Some(-1),
            kv_usage: Some(0.25),
            cache_tokens: None,
        };
        let known = UpstreamGauges { upstream: "b", foreign: Some(0), ..row };
        let mut page = ExpositionWriter::new(ExpositionFormat::Text);
        write(&[row, known], &mut page);
        let text = String::from_utf8(page.finish()).unwrap();
        for line in [
            "vllm_lb_upstream_active{upstream=\"a\\\"b\\n\"} 2\n",
            "vllm_lb_upstream_siblings_active{upstream=\"b\"} 5\n",
            "vllm_lb_upstream_kv_usage{upstream=\"b\"} 0.25\n",
            "vllm_lb_upstream_unaccounted_requests{upstream=\"b\"} -1\n",
            " gauge\nvllm_lb_upstream_foreign_requests{upstream=\"b\"} 0\n",
            "vllm_lb_upstream_state{upstream=\"b\",state=\"ready\"} 1\n",
            "vllm_lb_upstream_state{upstream=\"b\",state=\"tripped\"} 0\n",
            "vllm_lb_upstream_sight{upstream=\"b\",sight=\"blind\"} 1\n",
            "vllm_lb_upstream_sight{upstream=\"b\",sight=\"exact\"} 0\n",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        assert!(!text.contains("cache_tokens"), "{text}");
    }
}
