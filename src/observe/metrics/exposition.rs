//! Writes metrics in the text format of Prometheus 0.0.4, or in OpenMetrics 1.0.
//!
//! In OpenMetrics the family of a counter is named without `_total`, and the one of an info without `_info`;
//! families of seconds and bytes name their unit, and the page has an end.

use std::fmt::{Display, Write};

use super::spec::{MetricKind, MetricSpec};

/// The room for a page of a balancer with few upstreams.
const PAGE_BYTES: usize = 32 << 10;

/// The units that OpenMetrics is told, by the end of the family's name.
const UNITS: [&str; 2] = ["seconds", "bytes"];

/// The format of a page of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpositionFormat {
    /// The text format of Prometheus, version 0.0.4.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

/// A page of metrics while it is written.
pub(in crate::observe) struct ExpositionWriter {
    page: String,
    format: ExpositionFormat,
}

// === impl ExpositionFormat ===

impl ExpositionFormat {
    /// The format that a client with these values of `accept` prefers: OpenMetrics if it is named, and the
    /// text format is not preferred.
    pub fn accepted<'a>(accept: impl Iterator<Item = &'a str>) -> Self {
        let (mut open, mut text) = (0.0, 0.0);
        for range in accept.flat_map(|value| value.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default();
            let quality = parts.filter_map(|part| part.strip_prefix("q=")).find_map(|q| q.parse().ok());
            let quality: f64 = quality.unwrap_or(1.0);
            if kind.eq_ignore_ascii_case("application/openmetrics-text") {
                open = quality.max(open);
            } else if kind.eq_ignore_ascii_case("text/plain") {
                text = quality.max(text);
            }
        }
        if open > 0.0 && open >= text { ExpositionFormat::OpenMetrics } else { ExpositionFormat::Text }
    }

    /// The value of `content-type`.
    pub fn content_type(self) -> &'static str {
        match self {
            ExpositionFormat::Text => "text/plain; version=0.0.4; charset=utf-8",
            ExpositionFormat::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

// === impl ExpositionWriter ===

impl ExpositionWriter {
    pub(super) fn new(format: ExpositionFormat) -> Self {
        ExpositionWriter { page: String::with_capacity(PAGE_BYTES), format }
    }

    /// Writes the head of a family. Its samples follow.
    pub(super) fn family(&mut self, spec: &MetricSpec) {
        let (name, kind) = self.family_of(spec);
        // Writing to a string does not fail.
        let _ = write!(self.page, "# HELP {name} ");
        let quotes = self.format == ExpositionFormat::OpenMetrics;
        escape(&spec.plain_help(), quotes, &mut self.page);
        let _ = write!(self.page, "\n# TYPE {name} {kind}\n");
        let unit =
            UNITS.iter().find(|unit| name.strip_suffix(**unit).is_some_and(|rest| rest.ends_with('_')));
        if let (ExpositionFormat::OpenMetrics, Some(unit)) = (self.format, unit) {
            let _ = writeln!(self.page, "# UNIT {name} {unit}");
        }
    }

    fn family_of(&self, spec: &MetricSpec) -> (&'static str, &'static str) {
        let name = spec.name;
        match (spec.kind, self.format) {
            (MetricKind::Counter, ExpositionFormat::OpenMetrics) => {
                (name.strip_suffix("_total").unwrap_or(name), "counter")
            }
            (MetricKind::Info, ExpositionFormat::OpenMetrics) => {
                (name.strip_suffix("_info").unwrap_or(name), "info")
            }
            (MetricKind::Counter, ExpositionFormat::Text) => (name, "counter"),
            (MetricKind::Gauge, _) | (MetricKind::Info, ExpositionFormat::Text) => (name, "gauge"),
            (MetricKind::Histogram, _) => (name, "histogram"),
        }
    }

    /// Writes one sample. `labels` are written by [`label_pairs`].
    pub(super) fn sample(&mut self, spec: &MetricSpec, labels: &str, value: impl Display) {
        self.page.push_str(spec.name);
        self.labels_and_value(labels, None, value);
    }

    /// Writes the samples of a histogram, from the counts of its buckets; the last count is of the values
    /// above all bounds.
    pub(super) fn histogram(&mut self, spec: &MetricSpec, labels: &str, counts: &[u64], sum: f64) {
        let mut total = 0;
        for (index, count) in counts.iter().enumerate() {
            total += count;
            self.page.push_str(spec.name);
            self.page.push_str("_bucket");
            self.labels_and_value(labels, Some(spec.buckets.get(index).copied()), total);
        }
        self.page.push_str(spec.name);
        self.page.push_str("_sum");
        self.labels_and_value(labels, None, sum);
        self.page.push_str(spec.name);
        self.page.push_str("_count");
        self.labels_and_value(labels, None, total);
    }

    /// `bound`: the upper bound of a bucket, `Some(None)` of the last one.
    fn labels_and_value(&mut self, labels: &str, bound: Option<Option<f64>>, value: impl Display) {
        let page = &mut self.page;
        if !labels.is_empty() || bound.is_some() {
            page.push('{');
            page.push_str(labels);
            if bound.is_some() && !labels.is_empty() {
                page.push(',');
            }
            let _ = match (bound, self.format) {
                (None, _) => Ok(()),
                (Some(None), _) => write!(page, "le=\"+Inf\""),
                (Some(Some(bound)), ExpositionFormat::Text) => write!(page, "le=\"{bound}\""),
                // A number with a decimal point.
                (Some(Some(bound)), ExpositionFormat::OpenMetrics) => write!(page, "le=\"{bound:?}\""),
            };
            page.push('}');
        }
        let _ = writeln!(page, " {value}");
    }

    /// The whole page.
    pub(super) fn finish(mut self) -> Vec<u8> {
        if self.format == ExpositionFormat::OpenMetrics {
            self.page.push_str("# EOF\n");
        }
        self.page.into_bytes()
    }
}

/// Writes labels and their values as samples have them, without the braces.
pub(super) fn label_pairs<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::new();
    for (name, value) in pairs {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(name);
        text.push_str("=\"");
        escape(value, true, &mut text);
        text.push('"');
    }
    text
}

/// Writes a text with its special characters escaped.
fn escape(text: &str, quotes: bool, into: &mut String) {
    for char in text.chars() {
        match char {
            '\\' => into.push_str("\\\\"),
            '\n' => into.push_str("\\n"),
            '"' if quotes => into.push_str("\\\""),
            char => into.push(char),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_is_written_for_clients_that_prefer_it() {
        let accepted = |values: &[&str]| ExpositionFormat::accepted(values.iter().copied());
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,\
            application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        for open in
            [&[prometheus][..], &["application/openmetrics-text"], &["a/b", "Application/OpenMetrics-Text"]]
        {
            assert_eq!(accepted(open), ExpositionFormat::OpenMetrics, "{open:?}");
        }
        let preferred = "application/openmetrics-text; q=0.1, text/plain";
        for text in [&[][..], &["*/*"], &["text/plain"], &[preferred], &["application/openmetrics-text;q=0"]]
        {
            assert_eq!(accepted(text), ExpositionFormat::Text, "{text:?}");
        }
    }

    fn page(format: ExpositionFormat) -> String {
        let mut writer = ExpositionWriter::new(format);
        let spec =
            |name, kind| MetricSpec { name, kind, labels: &[], help: "a \"b\" `c`\n", buckets: &[0.5, 1.0] };
        let counter = spec("x_bytes_total", MetricKind::Counter);
        writer.family(&counter);
        writer.sample(&counter, &label_pairs([("a", "\\\"\n"), ("b", "")].into_iter()), 3u64);
        let histogram = spec("y_seconds", MetricKind::Histogram);
        writer.family(&histogram);
        writer.histogram(&histogram, "", &[1, 0, 2], 4.5);
        let info = spec("z_info", MetricKind::Info);
        writer.family(&info);
        writer.sample(&info, "v=\"1\"", 1);
        String::from_utf8(writer.finish()).unwrap()
    }

    #[test]
    fn both_formats_name_families_units_and_bounds_in_their_way() {
        let text = "# HELP x_bytes_total a \"b\" c\\n\n# TYPE x_bytes_total counter\n\
            x_bytes_total{a=\"\\\\\\\"\\n\",b=\"\"} 3\n\
            # HELP y_seconds a \"b\" c\\n\n# TYPE y_seconds histogram\n\
            y_seconds_bucket{le=\"0.5\"} 1\ny_seconds_bucket{le=\"1\"} 1\ny_seconds_bucket{le=\"+Inf\"} 3\n\
            y_seconds_sum 4.5\ny_seconds_count 3\n\
            # HELP z_info a \"b\" c\\n\n# TYPE z_info gauge\nz_info{v=\"1\"} 1\n";
        assert_eq!(page(ExpositionFormat::Text), text);
        let open = "# HELP x_bytes a \\\"b\\\" c\\n\n# TYPE x_bytes counter\n# UNIT x_bytes bytes\n\
            x_bytes_total{a=\"\\\\\\\"\\n\",b=\"\"} 3\n\
            # HELP y_seconds a \\\"b\\\" c\\n\n# TYPE y_seconds histogram\n# UNIT y_seconds seconds\n\
            y_seconds_bucket{le=\"0.5\"} 1\ny_seconds_bucket{le=\"1.0\"} 1\ny_seconds_bucket{le=\"+Inf\"} 3\n\
            y_seconds_sum 4.5\ny_seconds_count 3\n\
            # HELP z a \\\"b\\\" c\\n\n# TYPE z info\nz_info{v=\"1\"} 1\n# EOF\n";
        assert_eq!(page(ExpositionFormat::OpenMetrics), open);
    }
}
