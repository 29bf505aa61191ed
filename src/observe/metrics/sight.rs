//! The metric of how well the balancer sees the caches of the upstreams.

use crate::fleet::sight::SightState;

/// The lines of the metric: for each upstream, by its escaped name, 1 for its sight and 0 for the others.
pub(super) fn lines(upstreams: &[(String, SightState)]) -> String {
    if upstreams.is_empty() {
        return String::new();
    }
    let name = "vllm_lb_upstream_sight";
    let help = "1 for how well the balancer sees the upstream's cache.";
    let mut text = format!("# HELP {name} {help}\n# TYPE {name} gauge\n");
    for (upstream, sight) in upstreams {
        for state in SightState::ALL {
            let (is_so, label) = (u8::from(*sight == state), state.label());
            text.push_str(&format!("{name}{{upstream=\"{upstream}\",sight=\"{label}\"}} {is_so}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_upstream_has_one_sight() {
        let text = lines(&[("a".into(), SightState::Blind), ("b".into(), SightState::Exact)]);
        let of = |value: &str| text.lines().filter(|line| line.ends_with(value)).collect::<Vec<_>>();
        let wanted = [("a", "blind"), ("b", "exact")].map(|(name, sight)| {
            format!("vllm_lb_upstream_sight{{upstream=\"{name}\",sight=\"{sight}\"}} 1")
        });
        assert_eq!(of(" 1"), wanted);
        assert_eq!(of(" 0").len(), 4);
        assert_eq!(lines(&[]), "");
    }
}
