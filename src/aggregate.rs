//! Merges the answers of several upstreams into one.
//!
//! Upstreams may have different versions, so values that cannot be parsed count as absent.
//!
//! Pure: no connections, no cache, no guesses about upstreams that did not answer.

mod engine_info;
mod engine_metrics;
mod metrics;
mod models;

pub(crate) use self::engine_info::{EngineInfo, parse_engine_info};
pub(crate) use self::engine_metrics::{EngineMetrics, parse_engine_metrics};
pub(crate) use self::metrics::merge_metrics;
pub(crate) use self::models::{ModelCard, models_list, parse_models};

/// Returns the sum of the answers to `GET /load`; an answer without a number counts as 0.
pub(crate) fn load_sum(answers: &[&[u8]]) -> u64 {
    #[derive(serde::Deserialize)]
    struct ServerLoad {
        server_load: u64,
    }
    let load = |answer: &&[u8]| {
        let parsed: Result<ServerLoad, _> = serde_json::from_slice(answer);
        parsed.ok().map(|load| load.server_load)
    };
    answers.iter().filter_map(load).fold(0, u64::saturating_add)
}

/// Returns the oldest of the versions, as written. A version without a leading number is chosen only among
/// its like.
pub(crate) fn version_min(versions: &[&str]) -> Option<String> {
    let oldest = versions.iter().min_by_key(|version| {
        let key = version_key(version);
        (key.is_none(), key)
    });
    oldest.map(|version| (*version).to_owned())
}

/// The order of Python's versions: the numbers of the release, then pre- or post-release, then its number.
/// The part after a plus sign is not compared.
type VersionKey = (Vec<u64>, ReleaseStage, u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum ReleaseStage {
    Dev,
    Alpha,
    Beta,
    Candidate,
    Release,
    Post,
}

fn version_key(version: &str) -> Option<VersionKey> {
    let version = version.trim().trim_start_matches(['v', 'V']).to_ascii_lowercase();
    let (mut digits, mut rest) = split_digits(version.split('+').next()?);
    let mut release = Vec::new();
    while !digits.is_empty() {
        release.push(digits.parse().unwrap_or(u64::MAX));
        (digits, rest) = match rest.strip_prefix('.').map(split_digits) {
            Some((digits, after)) if !digits.is_empty() => (digits, after),
            _ => ("", rest),
        };
    }
    if release.is_empty() {
        return None;
    }
    while release.last() == Some(&0) {
        release.pop();
    }
    let rest = rest.trim_start_matches(['.', '-', '_']);
    let word_end = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
    let stage = match &rest[..word_end] {
        "dev" => ReleaseStage::Dev,
        "a" | "alpha" => ReleaseStage::Alpha,
        "b" | "beta" => ReleaseStage::Beta,
        "c" | "rc" | "pre" | "preview" => ReleaseStage::Candidate,
        "post" | "rev" | "r" => ReleaseStage::Post,
        _ => ReleaseStage::Release,
    };
    let (number, _) = split_digits(rest[word_end..].trim_start_matches(['.', '-', '_']));
    Some((release, stage, number.parse().unwrap_or(0)))
}

fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn adds_loads() {
        let load: &[u8] = include_bytes!("../tests/data/vllm-0.32/load.body");
        assert_eq!(load_sum(&[load, br#"{"server_load": 3}"#, br#"{"new":1,"server_load":4}"#]), 7);
        assert_eq!(load_sum(&[]), 0);
        assert_eq!(load_sum(&[b"", b"[]", br#"{"server_load":-1}"#, br#"{"server_load":"2"}"#, b"\xff"]), 0);
        let most = format!(r#"{{"server_load":{}}}"#, u64::MAX);
        assert_eq!(load_sum(&[most.as_bytes(), most.as_bytes()]), u64::MAX);
    }

    #[test]
    fn orders_versions_as_python_does() {
        let ordered = [
            "0.9.2",
            "0.10.1.1",
            "0.11.0rc2",
            "v0.11.0",
            "0.11.0.post1",
            "0.31.9",
            "0.32.0.dev17+gabcdef",
            "0.32.0a1",
            "0.32.0b1",
            "0.32.0rc1",
            "0.32.0rc12",
            "0.32.0+cu128",
            "0.32.1",
            "1",
        ];
        for (index, version) in ordered.iter().enumerate() {
            for newer in &ordered[index..] {
                assert_eq!(version_min(&[newer, version]).as_deref(), Some(*version), "{version} {newer}");
            }
        }
        assert_eq!(version_min(&["0.32", "0.32.0"]).as_deref(), Some("0.32"));
        assert_eq!(version_min(&["main", "0.32.0", ""]).as_deref(), Some("0.32.0"));
        assert_eq!(version_min(&["main"]).as_deref(), Some("main"));
        assert_eq!(version_min(&["99999999999999999999999.1", "0.1"]).as_deref(), Some("0.1"));
        assert_eq!(version_min(&[]), None);
    }

    proptest! {
        #[test]
        fn accepts_any_answers(loads in any::<Vec<Vec<u8>>>(), versions in any::<Vec<String>>()) {
            load_sum(&loads.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let versions: Vec<&str> = versions.iter().map(String::as_str).collect();
            let oldest = version_min(&versions);
            prop_assert!(oldest.is_none_or(|oldest| versions.contains(&oldest.as_str())));
        }
    }
}
