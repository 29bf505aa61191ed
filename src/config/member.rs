//! The changes of an upstream at run time, as a JSON text in the Redis that all balancers share.
//!
//! ```text
//! {"upstream": {"url": "http://gpu-7:8000", ...}, "drain": true, "weight": 2, "removed": false,
//!  "entry": "8f14e45fceea167a"}
//! ```
//!
//! An upstream that was added at run time has `upstream`, in the form of the file; a key is named by its
//! variable. An upstream of the file, or a discovered one, has only what was changed. Unknown fields, which a
//! newer balancer may write, are ignored.
//!
//! `entry` is a hash of the upstream's entry in the file of the balancer that made the changes. A balancer
//! ends the changes when the entry in its own file changes to one with another hash: its file is newer than
//! the changes. When the entry changes to one with this hash, the balancer that made the changes had the new
//! file already, and the changes last.

use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::xxh3_64;

use super::check;
use super::render;
use super::secret::Secret;
use super::types::{UpstreamConfig, parse_weight};

/// Why an upstream cannot come from a sibling.
pub(crate) const NOT_ON_A_SOCKET: &str =
    "balancers on a Redis do not share upstreams on unix sockets: name it in the file";

/// The changes of one upstream.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct MemberRecord {
    pub upstream: Option<UpstreamConfig>,
    pub drain: Option<bool>,
    pub weight: Option<f64>,
    pub removed: bool,
    /// The hash of the file's entry that was changed; `None`: the file had none, or an older balancer wrote
    /// the record.
    pub entry: Option<u64>,
}

/// Returns a hash of an upstream's settings in the file, without its key. Balancers of other releases compare
/// it: a key that only they know, and that the file does not set, must not change it.
pub(crate) fn entry_hash(upstream: &UpstreamConfig) -> u64 {
    xxh3_64(entry_text(upstream).as_bytes())
}

/// Returns a hash of an upstream's settings in the file with its key, for the successor of this process: a
/// reload finds a changed key, too.
pub(crate) fn keyed_entry_hash(upstream: &UpstreamConfig) -> u64 {
    let key = upstream.api_key.as_ref().map(Secret::expose);
    xxh3_64(json!([entry_text(upstream), key]).to_string().as_bytes())
}

/// The settings that the file sets to other values than the defaults.
fn entry_text(upstream: &UpstreamConfig) -> String {
    let mut entry = render::upstream_without_key(upstream);
    remove_equal(&mut entry, &render::upstream_without_key(&UpstreamConfig::new(upstream.url.clone())));
    entry["url"] = upstream.url.display().into();
    entry.sort_all_objects();
    entry.to_string()
}

/// Removes what both values have under the same keys.
fn remove_equal(value: &mut Value, other: &Value) {
    let (Value::Object(map), Value::Object(other)) = (value, other) else { return };
    map.retain(|key, inner| other.get(key) != Some(&*inner));
    map.iter_mut().for_each(|(key, inner)| other.get(key).into_iter().for_each(|o| remove_equal(inner, o)));
}

impl MemberRecord {
    /// Parses a record; the error is the rest of a sentence.
    pub(crate) fn read(text: &str) -> Result<Self, String> {
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
        let entry = map.get("entry").and_then(Value::as_str);
        let entry = entry.and_then(|entry| u64::from_str_radix(entry, 16).ok());
        let removed = is("removed").unwrap_or(false);
        Ok(MemberRecord { upstream, drain: is("drain"), weight, removed, entry })
    }

    /// Whether the record may expire: it only removes its upstream, or changes nothing.
    pub(crate) fn may_expire(&self) -> bool {
        self.removed || self.changes_nothing()
    }

    /// Whether the upstream is as it is configured.
    pub(crate) fn changes_nothing(&self) -> bool {
        !self.removed && self.upstream.is_none() && self.weight.is_none() && self.drain != Some(true)
    }

    /// Whether the changes last where the entry of the upstream in the file changes to one with this hash.
    pub(crate) fn outlasts(&self, entry: u64) -> bool {
        self.entry == Some(entry)
    }

    /// Checks that siblings can apply the record, and that it holds no key.
    pub(crate) fn check_shareable(&self) -> Result<(), &'static str> {
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
    pub(crate) fn write(&self) -> String {
        self.written(self.upstream.as_ref().map(render::upstream_without_key))
    }

    /// Serializes the record for this process and its successor.
    pub(crate) fn write_with_key(&self) -> String {
        self.written(self.upstream.as_ref().map(render::upstream_with_key))
    }

    fn written(&self, upstream: Option<Value>) -> String {
        let MemberRecord { drain, weight, removed, .. } = self;
        let mut written = json!({"upstream": upstream, "drain": drain, "weight": weight, "removed": removed});
        if let Some(entry) = self.entry {
            written["entry"] = format!("{entry:016x}").into();
        }
        written.to_string()
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
            MemberRecord {
                drain: Some(false),
                weight: Some(2.5),
                removed: true,
                upstream: None,
                entry: Some(u64::MAX - 1),
            },
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

    /// Regression: a key that a release adds would have changed the hash of every entry, and so ended all
    /// run-time changes at the first restart of that release.
    #[test]
    fn the_hash_of_an_entry_is_of_what_the_file_sets() {
        for (item, text) in [
            (r#"{"url": "http://gpu-7:8000"}"#, r#"{"url":"http://gpu-7:8000"}"#),
            (
                r#"{"url": "http://gpu-7:8000", "weight": 1, "api_key": "k"}"#,
                r#"{"url":"http://gpu-7:8000"}"#,
            ),
            (
                r#"{"url": "https://gpu-7:1", "name": "a", "weight": 2, "tls": {"verify": false}}"#,
                r#"{"name":"a","tls":{"verify":false},"url":"https://gpu-7:1","weight":2}"#,
            ),
        ] {
            assert_eq!(entry_text(&check::upstream_alone(item).expect(item)), text);
        }
    }

    /// Regression: the hash that a process hands over to its successor was of all keys that the release has.
    #[test]
    fn the_keyed_hash_of_an_entry_is_of_what_the_file_sets_and_the_key() {
        for (item, text) in [
            (r#"{"url": "http://gpu-7:8000"}"#, r#"["{\"url\":\"http://gpu-7:8000\"}",null]"#),
            (
                r#"{"url": "http://gpu-7:8000", "weight": 1, "api_key": "k"}"#,
                r#"["{\"url\":\"http://gpu-7:8000\"}","k"]"#,
            ),
        ] {
            let hash = keyed_entry_hash(&check::upstream_alone(item).expect(item));
            assert_eq!(hash, xxh3_64(text.as_bytes()), "{item}");
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
