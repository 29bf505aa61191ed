//! The description of a metric: one text for the exposition and for the table of the documentation.

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::observe) enum MetricKind {
    /// Only rises; its name ends in `_total`.
    Counter,
    Gauge,
    Histogram,
    /// Always 1, with facts as labels; its name ends in `_info`.
    Info,
}

/// The description of a metric.
#[derive(Clone, Copy, Debug)]
pub(in crate::observe) struct MetricSpec {
    pub name: &'static str,
    pub kind: MetricKind,
    pub labels: &'static [&'static str],
    /// What the metric counts or shows, in the Markdown of docs/metrics.md: code in back quotes, and links.
    pub help: &'static str,
    /// The upper bounds of a histogram's buckets.
    pub buckets: &'static [f64],
}

// === impl MetricSpec ===

impl MetricSpec {
    /// Describes a gauge.
    pub(super) const fn gauge(
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
    ) -> Self {
        MetricSpec { name, kind: MetricKind::Gauge, labels, help, buckets: &[] }
    }

    /// The help text without the marks of Markdown.
    pub(super) fn plain_help(&self) -> String {
        let (mut plain, mut rest) = (String::with_capacity(self.help.len()), self.help);
        while let Some(at) = rest.find(['`', '[']) {
            plain.push_str(&rest[..at]);
            let marked = &rest[at..];
            let link = marked.strip_prefix('[').and_then(|link| {
                let (text, target) = link.split_once("](")?;
                Some((text, target.split_once(')')?.1))
            });
            rest = match link {
                Some((text, behind)) => {
                    plain.push_str(text);
                    behind
                }
                None => marked.trim_start_matches(['`', '[']),
            };
        }
        plain.push_str(rest);
        plain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_is_shown_without_markdown() {
        let plain = |help| MetricSpec::gauge("a", help, &[]).plain_help();
        assert_eq!(plain("no marks"), "no marks");
        assert_eq!(plain("`a` of `b.c` ([why](x.md#y)), `d`"), "a of b.c (why), d");
    }
}
