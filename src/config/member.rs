//! The changes of an upstream at run time, as a JSON text in the Redis that all balancers share.
//!
//! ```text
//! {"upstream": {"url": "http://gpu-7:8000", ...}, "drain": true, "weight": 2, "removed": false}
//! ```
//!
//! An upstream that was added at run time has `upstream`, in the form of the file and with its key. An
//! upstream of the file, or a discovered one, has only what was changed. Unknown fields, which a newer
//! balancer may write, are ignored.

use serde_json::{Map, Value, json};

use super::check;
use super::render;
use super::types::{UpstreamConfig, parse_weight};

/// The changes of one upstream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemberRecord {
    pub upstream: Option<UpstreamConfig>,
    pub drain: Option<bool>,
    pub weight: Option<f64>,
    pub removed: bool,
}

impl MemberRecord {
    /// Parses a record; the error is the rest of a sentence.
    pub fn read(text: &str) -> Result<Self, String> {
        let map: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| format!("is no JSON object: {error}"))?;
        let upstream = match map.get("upstream") {
            None | Some(Value::Null) => None,
            Some(written) => Some(check::upstream_alone(&written.to_string()).map_err(|problems| {
                let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
                problems.join("; ")
            })?),
        };
        let written = map.get("weight").filter(|written| !written.is_null());
        let weight = written.map(|written| parse_weight(&written.to_string())).transpose()?;
        let is = |key: &str| map.get(key).and_then(Value::as_bool);
        Ok(MemberRecord { upstream, drain: is("drain"), weight, removed: is("removed").unwrap_or(false) })
    }

    /// Serializes the record for the Redis. It holds the upstream's key: every client that can read the
    /// Redis can use that key.
    pub fn write(&self) -> String {
        let upstream = self.upstream.as_ref().map(render::upstream_with_key);
        let MemberRecord { drain, weight, removed, .. } = self;
        json!({"upstream": upstream, "drain": drain, "weight": weight, "removed": removed}).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let upstreams = [
            r#"{"url": "http://gpu-7:8000"}"#,
            r#"{"url": "https://gpu-7/x", "name": "a-b", "models": ["m"], "weight": 0.5, "api_key": "hunter2",
                "max_active": 3, "tls": {"verify": false, "sni": "h"}}"#,
            r#"{"url": "unix:/run/vllm.sock"}"#,
        ];
        let mut members = vec![
            MemberRecord::default(),
            MemberRecord { drain: Some(false), weight: Some(2.5), removed: true, upstream: None },
        ];
        for text in upstreams {
            let upstream = check::upstream_alone(text).expect(text);
            members.push(MemberRecord { upstream: Some(upstream), ..MemberRecord::default() });
        }
        for member in members {
            assert_eq!(MemberRecord::read(&member.write()), Ok(member));
        }
    }

    #[test]
    fn rejects_invalid_records_and_ignores_unknown_fields() {
        for text in
            ["", "[]", r#"{"upstream": {"url": "nonsense"}}"#, r#"{"upstream": 3}"#, r#"{"weight": 0}"#]
        {
            assert!(MemberRecord::read(text).is_err(), "{text}");
        }
        let newer = r#"{"drain": true, "colour": {"red": 1}}"#;
        assert_eq!(
            MemberRecord::read(newer),
            Ok(MemberRecord { drain: Some(true), ..MemberRecord::default() })
        );
    }
}
