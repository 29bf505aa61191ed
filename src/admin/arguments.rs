//! What a call of the admin API says: in its path, its query and its body.

use bytes::Bytes;
use http::{Request, StatusCode};
use serde_json::{Map, Value};

use super::answer::AdminReject;
use crate::names::{MAX_SHOWN_BYTES, cut};
use crate::prompt::session::printable;
use crate::route::api_paths::decode_escapes;

/// A parameter of the query; `""` when it stands there without a value.
pub(super) fn parameter<'r>(request: &'r Request<Bytes>, name: &str) -> Option<&'r str> {
    let pairs = request.uri().query()?.split('&');
    let mut pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// Rejects a query with a parameter that is not among the known ones.
pub(super) fn check_parameters(request: &Request<Bytes>, known: &[&str]) -> Result<(), AdminReject> {
    let pairs = request.uri().query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
    let mut names = pairs.map(|pair| pair.split_once('=').map_or(pair, |(name, _)| name));
    names.find(|name| !known.contains(name)).map_or(Ok(()), |name| {
        let name = cut(name, MAX_SHOWN_BYTES).concat();
        let known = match known {
            [] => "it has none".into(),
            known => format!("known are {}", known.join(", ")),
        };
        Err(AdminReject::problem(format!("{name:?} is not a parameter of this call: {known}")))
    })
}

/// Decodes an id that is percent-encoded in a path or a query.
pub(super) fn decoded_id(written: &str) -> Result<String, AdminReject> {
    decode_escapes(written).ok_or_else(|| AdminReject::problem("the id is not percent-encoded UTF-8"))
}

/// The id under which a session is stored: the label of its recorded requests.
pub(super) fn stored_id(id: &str) -> String {
    printable(id.trim_ascii().as_bytes())
}

/// The object in the body of a call. An empty body and one that is not JSON count as an empty object.
pub(super) fn object(request: &Request<Bytes>) -> Result<Map<String, Value>, AdminReject> {
    match serde_json::from_slice(request.body()) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(AdminReject::problem("the body must be a JSON object")),
        Err(_) => Ok(Map::new()),
    }
}

/// The text of a member of a body; `None` for null and for an empty text.
pub(super) fn text_member(body: &Map<String, Value>, name: &str) -> Result<Option<String>, AdminReject> {
    match body.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        Some(_) => Err(AdminReject::problem(format!("{name} must be a string"))),
    }
}

/// The session ids in a body; empty when the body has no list of them.
pub(super) fn session_ids(body: &Map<String, Value>) -> Result<Vec<String>, AdminReject> {
    let wrong = || AdminReject::problem("session_ids must be a list of strings");
    match body.get("session_ids") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => {
            ids.iter().map(|id| id.as_str().map(String::from).ok_or_else(wrong)).collect()
        }
        Some(_) => Err(wrong()),
    }
}

/// The part of a list that a call requests.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct ListRange {
    /// Seconds since 1970.
    pub since: Option<f64>,
    /// A number of entries.
    pub limit: Option<usize>,
}

impl ListRange {
    /// Parses `?since=…&limit=…`.
    pub(super) fn of_query(request: &Request<Bytes>) -> Result<Self, AdminReject> {
        let written = |name| parameter(request, name).map(|text| decode_escapes(text).unwrap_or_default());
        let wrong = |error| AdminReject::new(StatusCode::UNPROCESSABLE_ENTITY, error);
        let since =
            written("since").map(|text| text.trim().parse().ok().filter(|since: &f64| since.is_finite()));
        let limit = written("limit").map(|text| count(text.trim()));
        match (since, limit) {
            (Some(None), _) => Err(wrong("since must be a number of seconds since 1970")),
            (_, Some(None)) => Err(wrong("limit must be a number of entries, 0 or more")),
            (since, limit) => Ok(ListRange { since: since.flatten(), limit: limit.flatten() }),
        }
    }

    /// Parses `since` and `limit` of a body.
    pub(super) fn of_body(body: &Map<String, Value>) -> Result<Self, AdminReject> {
        let member = |name| body.get(name).filter(|value| !value.is_null());
        let since = member("since").map(Value::as_f64);
        let limit = member("limit").map(|limit| match limit {
            Value::Number(number) => {
                // JSON may write a huge limit as a fraction; precision is irrelevant there.
                let is_count = |number: &f64| *number >= 0.0 && number.fract() == 0.0;
                number.as_f64().filter(is_count).map(|number| number as usize)
            }
            _ => None,
        });
        match (since, limit) {
            (Some(None), _) => Err(AdminReject::problem("since must be a number of seconds since 1970")),
            (_, Some(None)) => Err(AdminReject::problem("limit must be a number of entries, 0 or more")),
            (since, limit) => Ok(ListRange { since: since.flatten(), limit: limit.flatten() }),
        }
    }
}

/// Parses a count of decimal digits; a number too large for `usize` counts as no limit.
fn count(text: &str) -> Option<usize> {
    let is_count = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_count.then(|| text.parse().unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn parameters_are_found() {
        let request = |query: &str| {
            let uri = format!("/admin/upstreams/a{query}");
            Request::builder().uri(uri).body(Bytes::new()).expect("is a URI")
        };
        assert_eq!(parameter(&request("?force&wait=3s"), "force"), Some(""));
        assert_eq!(parameter(&request("?force&wait=3s"), "wait"), Some("3s"));
        assert_eq!(parameter(&request("?enforce=1"), "force"), None);
        assert_eq!(parameter(&request(""), "wait"), None);
    }

    #[test]
    fn parameters_that_a_call_does_not_have_are_rejected_by_name() {
        let check = |query: &str| {
            let request = Request::builder().uri(format!("/admin/decisions{query}")).body(Bytes::new());
            check_parameters(&request.expect("is a URI"), &["id", "limit"])
        };
        for query in ["", "?", "?&", "?id=a", "?limit", "?limit=x&id=", "?id=a=b&&limit=1&id=c"] {
            assert!(check(query).is_ok(), "{query}");
        }
        for query in ["?ids=a", "?Id=a", "?limit=1&idd", "?=a", "?id%3Da"] {
            let Err(AdminReject(status, error)) = check(query) else { panic!("{query} is accepted") };
            assert_eq!(status, StatusCode::BAD_REQUEST, "{query}");
            assert!(error.to_string().contains("known are id, limit"), "{query}: {error}");
        }
        let Err(AdminReject(_, error)) = check(&format!("?{}", "x".repeat(4000))) else {
            panic!("is accepted")
        };
        assert!(error.to_string().len() < 300, "{error}");
    }

    fn of_query(query: &str) -> Option<ListRange> {
        let request = Request::builder().uri(format!("/sessions?{query}")).body(Bytes::new());
        ListRange::of_query(&request.expect("is a URI")).ok()
    }

    fn of_body(body: Value) -> Option<ListRange> {
        ListRange::of_body(body.as_object().expect("is an object")).ok()
    }

    #[test]
    fn reads_ranges_from_queries() {
        let range = |since, limit| Some(ListRange { since, limit });
        for (query, expected) in [
            ("", range(None, None)),
            ("since=1.5&limit=3", range(Some(1.5), Some(3))),
            ("since=-1&limit=0", range(Some(-1.0), Some(0))),
            ("since=1e%2B9", range(Some(1e9), None)),
            ("limit=99999999999999999999999999", range(None, Some(usize::MAX))),
            ("since=", None),
            ("since=nan", None),
            ("since=inf", None),
            ("since=x", None),
            ("since=%zz", None),
            ("limit=", None),
            ("limit=-1", None),
            ("limit=1.5", None),
            ("limit=%2B1", None),
            ("limit=ten", None),
        ] {
            assert_eq!(of_query(query), expected, "{query}");
        }
    }

    #[test]
    fn reads_ranges_from_bodies() {
        let range = |since, limit| Some(ListRange { since, limit });
        for (body, expected) in [
            (json!({}), range(None, None)),
            (json!({"since": null, "limit": null}), range(None, None)),
            (json!({"since": 3, "limit": 0}), range(Some(3.0), Some(0))),
            (json!({"since": 1.25, "limit": 7}), range(Some(1.25), Some(7))),
            (json!({"limit": 1e30}), range(None, Some(usize::MAX))),
            (json!({"since": "3"}), None),
            (json!({"limit": "3"}), None),
            (json!({"limit": -1}), None),
            (json!({"limit": 1.5}), None),
            (json!({"limit": true}), None),
            (json!({"limit": [1]}), None),
        ] {
            assert_eq!(of_body(body.clone()), expected, "{body}");
        }
    }
}
