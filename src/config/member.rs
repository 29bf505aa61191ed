//! The changes of an upstream at run time, as a JSON text in the Redis that all balancers share.
//!
//! ```text
//! {"upstream": {"url": "http://gpu-7:8000", ...}, "drain": true, "weight": 2, "removed": false}
//! ```
//!
//! An upstream that was added at run time has `upstream`, in the form of the file; a key is named by its
//! variable. An upstream of the file, or a discovered one, has only what was changed. Unknown fields, which a
//! newer balancer may write, are ignored.

use serde_json::{Map, Value, json};

use super::check;
use super::render;
use super::types::{UpstreamConfig, parse_weight};

/// Why an upstream cannot come from a sibling.
pub const NOT_ON_A_SOCKET: &str =
    "balancers on a Redis do not share upstreams on unix sockets: name it in the file";

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

    /// Whether the record may expire: it only removes its upstream, or changes nothing.
    pub fn may_expire(&self) -> bool {
        self.removed || self.changes_nothing()
    }

    /// Whether the upstream is as it is configured.
    pub fn changes_nothing(&self) -> bool {
        !self.removed && self.upstream.is_none() && self.weight.is_none() && self.drain != Some(true)
    }

    /// Checks that siblings can apply the record, and that it holds no key.
    pub fn check_shareable(&self) -> Result<(), &'static str> {
        let Some(upstream) = &self.upstream else { return Ok(()) };
        if upstream.url.unix.is_some() {
            return Err(NOT_ON_A_SOCKET);
        }
        if !self.has_no_key() {
            return Err(
                "api_key would stand in Redis in clear: give every balancer the key in a variable, and \
                        its name as api_key_env",
            );
        }
        Ok(())
    }

    /// Whether the record has no key in clear.
    fn has_no_key(&self) -> bool {
        self.upstream.as_ref().is_none_or(|upstream| upstream.api_key.is_none())
    }

    /// Serializes the record for the Redis, without the upstream's key: clients that can read the Redis
    /// must not have it.
    pub fn write(&self) -> String {
        self.written(self.upstream.as_ref().map(render::upstream_without_key))
    }

    /// Serializes the record for this process and its successor.
    pub fn write_with_key(&self) -> String {
        self.written(self.upstream.as_ref().map(render::upstream_with_key))
    }

    fn written(&self, upstream: Option<Value>) -> String {
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
            r#"{"url": "http://gpu-8", "api_key_env": "VLLM_LB_KEY_GPU"}"#,
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
            assert_eq!(MemberRecord::read(&member.write_with_key()), Ok(member.clone()));
            assert!(!member.write().contains("hunter2"));
            if member.check_shareable().is_ok() {
                assert_eq!(MemberRecord::read(&member.write()), Ok(member));
            }
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
