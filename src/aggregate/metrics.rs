//! Merges the metrics of several upstreams in Prometheus' text format into one page, distinguished by a
//! label.
//!
//! The format requires all samples of a family together behind one HELP and one TYPE, so pages cannot simply
//! be concatenated. Invalid lines are dropped, so that one faulty upstream does not make the whole page
//! unreadable. Exemplars are dropped too, since they are not part of this format.
//!
//! One pass over each page; a line costs what its bytes cost.

use std::collections::HashMap;

/// The suffixes of a family's name in the names of its samples.
const SUFFIXES: [&str; 8] = ["_bucket", "_sum", "_count", "_total", "_created", "_info", "_gsum", "_gcount"];

#[derive(Default)]
struct MetricFamily<'p> {
    name: &'p str,
    help: Option<&'p str>,
    kind: Option<&'p str>,
    samples: String,
}

#[derive(Default)]
struct MetricFamilies<'p> {
    list: Vec<MetricFamily<'p>>,
    by_name: HashMap<&'p str, usize>,
    /// Decided once for each name, so that its samples stay together with later pages.
    by_sample: HashMap<&'p str, usize>,
}

/// Merges the pages of upstreams, each given with the upstream's name.
pub(crate) fn merge_metrics(pages: &[(&str, &str)]) -> String {
    let mut families = MetricFamilies::default();
    for (upstream, page) in pages {
        let label = format!("upstream=\"{}\"", escaped(upstream));
        // The family of the latest HELP or TYPE: its name in the page decides which samples belong to it.
        let mut current = None;
        for line in page.split('\n').map(|line| line.trim_end_matches('\r')) {
            match MetricsLine::parse(line) {
                Some(MetricsLine::Help { name, text }) => {
                    let index = families.index(name);
                    families.list[index].help.get_or_insert(text);
                    current = Some(index);
                }
                Some(MetricsLine::Type { name, kind }) => {
                    let index = families.index(name);
                    families.list[index].kind.get_or_insert(kind);
                    current = Some(index);
                }
                Some(MetricsLine::Sample(sample)) => {
                    let index = families.of_sample(sample.name, current);
                    sample.write(&mut families.list[index].samples, &label);
                }
                None => {}
            }
        }
    }
    families.write()
}

// === impl Families ===

impl<'p> MetricFamilies<'p> {
    fn index(&mut self, name: &'p str) -> usize {
        *self.by_name.entry(name).or_insert_with(|| {
            self.list.push(MetricFamily { name, ..MetricFamily::default() });
            self.list.len() - 1
        })
    }

    fn of_sample(&mut self, name: &'p str, current: Option<usize>) -> usize {
        if let Some(index) = self.by_sample.get(name) {
            return *index;
        }
        let index = match self.by_name.get(name) {
            Some(index) => *index,
            None => self.whole(name, current).unwrap_or_else(|| self.index(name)),
        };
        self.by_sample.insert(name, index);
        index
    }

    /// Returns the family of a sample, such as of the sum of a histogram.
    fn whole(&self, name: &str, current: Option<usize>) -> Option<usize> {
        let names = SUFFIXES.iter().filter_map(|suffix| name.strip_suffix(suffix));
        let has_parts = |index: &usize| matches!(self.list[*index].kind, Some("histogram" | "summary"));
        names
            .filter_map(|family| self.by_name.get(family).copied())
            .find(|index| Some(*index) == current || has_parts(index))
    }

    fn write(self) -> String {
        let length = |family: &MetricFamily<'_>| {
            let head = family.help.map_or(0, str::len) + family.kind.map_or(0, str::len);
            head + 2 * family.name.len() + family.samples.len() + 20
        };
        let mut page = String::with_capacity(self.list.iter().map(length).sum());
        for family in self.list {
            for (word, text) in [("HELP", family.help), ("TYPE", family.kind)] {
                if let Some(text) = text {
                    page.extend(["# ", word, " ", family.name, " ", text, "\n"]);
                }
            }
            page.push_str(&family.samples);
        }
        page
    }
}

// === Lines ===

/// A line of a page of metrics.
#[derive(Debug, PartialEq)]
pub(super) enum MetricsLine<'p> {
    Help { name: &'p str, text: &'p str },
    Type { name: &'p str, kind: &'p str },
    Sample(MetricSample<'p>),
}

/// A sample of a metric.
#[derive(Debug, PartialEq)]
pub(super) struct MetricSample<'p> {
    pub name: &'p str,
    /// The validated labels without braces.
    pub labels: &'p str,
    pub value: &'p str,
    timestamp: Option<&'p str>,
}

impl<'p> MetricsLine<'p> {
    /// Parses a line; `None` for an empty line, a comment or an invalid line.
    pub(super) fn parse(line: &'p str) -> Option<Self> {
        let line = line.trim_start_matches([' ', '\t']);
        if let Some(comment) = line.strip_prefix('#') {
            let (word, rest) = split_blank(comment.trim_start_matches([' ', '\t']));
            let (name, text) = split_blank(rest);
            return match word {
                _ if name_end(name) != name.len() || name.is_empty() => None,
                "HELP" => Some(MetricsLine::Help { name, text }),
                "TYPE" if !text.is_empty() => Some(MetricsLine::Type { name, kind: text.trim_end() }),
                _ => None,
            };
        }
        let (name, rest) = line.split_at(name_end(line));
        if name.is_empty() {
            return None;
        }
        let (labels, rest) = match rest.trim_start_matches([' ', '\t']).strip_prefix('{') {
            Some(inside) => {
                let end = labels_end(inside)?;
                (&inside[..end], &inside[end + 1..])
            }
            None => ("", rest),
        };
        let mut words = rest.split('#').next()?.split_ascii_whitespace();
        let value = words.next().filter(|value| is_value(value))?;
        let timestamp = words.next();
        if words.next().is_some() || timestamp.is_some_and(|time| time.parse::<f64>().is_err()) {
            return None;
        }
        Some(MetricsLine::Sample(MetricSample { name, labels, value, timestamp }))
    }
}

impl MetricSample<'_> {
    fn write(&self, page: &mut String, upstream: &str) {
        page.extend([self.name, "{", upstream]);
        let mut rest = self.labels;
        while let Some((name, value, after)) = next_label(rest) {
            page.push(',');
            // Named as in Prometheus when the label exists already; repeated if that exists too.
            if name.trim_start_matches("exported_") == "upstream" {
                page.push_str("exported_");
            }
            page.extend([name, "=", value]);
            rest = after;
        }
        page.extend(["} ", self.value]);
        if let Some(timestamp) = self.timestamp {
            page.extend([" ", timestamp]);
        }
        page.push('\n');
    }
}

fn split_blank(text: &str) -> (&str, &str) {
    let (word, rest) = text.split_at(text.find([' ', '\t']).unwrap_or(text.len()));
    (word, rest.trim_start_matches([' ', '\t']))
}

/// Returns where the metric's name at the beginning of the text ends.
fn name_end(text: &str) -> usize {
    let fits = |(index, byte): (usize, u8)| {
        byte.is_ascii_alphabetic() || byte == b'_' || byte == b':' || (index > 0 && byte.is_ascii_digit())
    };
    text.bytes().enumerate().position(|item| !fits(item)).unwrap_or(text.len())
}

/// Returns the place of the brace that ends the labels; `None` when they are invalid.
fn labels_end(inside: &str) -> Option<usize> {
    let mut rest = inside;
    while let Some((_, _, after)) = next_label(rest) {
        rest = after;
    }
    let rest = rest.trim_start_matches([' ', '\t', ',']);
    rest.starts_with('}').then_some(inside.len() - rest.len())
}

/// Splits off the first label of a list and its value with the quotes.
pub(super) fn next_label(labels: &str) -> Option<(&str, &str, &str)> {
    let labels = labels.trim_start_matches([' ', '\t', ',']);
    let (name, rest) = labels.split_at(name_end(labels));
    let rest = rest.trim_start_matches([' ', '\t']).strip_prefix('=')?.trim_start_matches([' ', '\t']);
    let inside = rest.strip_prefix('"')?;
    let mut escaped = false;
    let end = inside.bytes().position(|byte| {
        let end = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        end
    })?;
    let (value, after) = rest.split_at(end + 2);
    (!name.is_empty() && !name.contains(':')).then_some((name, value, after))
}

/// Whether the text is a number or one of the format's special values.
fn is_value(text: &str) -> bool {
    text.parse::<f64>().is_ok()
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests;
