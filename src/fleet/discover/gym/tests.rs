//! Valid and invalid documents of model servers.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn shown(found: &DiscoveredServers) -> (Vec<String>, Option<&str>, Option<&str>) {
    let urls = found.urls.iter().map(UpstreamUrl::display).collect();
    (urls, found.api_key.as_ref().map(Secret::expose), found.model.as_deref())
}

#[test]
fn parses_the_documents_of_model_servers() {
    let table = [
        (
            r#"{"base_url": "http://a:1/v1", "api_key": "dummy", "model": "m"}"#,
            &["http://a:1"][..],
            Some("dummy"),
            Some("m"),
        ),
        (
            r#"{"base_url": ["http://a:1/v1", "http://b:2/v1/"], "api_key": "EMPTY", "model": "org/m"}"#,
            &["http://a:1", "http://b:2"],
            Some("EMPTY"),
            Some("org/m"),
        ),
        (r#"{"base_url": ["http://a:1", "http://a:1/v1", "http://A:1/"]}"#, &["http://a:1"], None, None),
        (r#"{"base_url": "https://h/team/v1"}"#, &["https://h:443/team"], None, None),
        (r#"{"base_url": " http://[::1]:8000/v1 "}"#, &["http://[::1]:8000"], None, None),
        (r#"{"base_url": "http://a:1", "api_key": "", "model": " "}"#, &["http://a:1"], None, None),
        (r#"{"base_url": "http://a:1", "api_key": null, "model": null}"#, &["http://a:1"], None, None),
        // Further members of newer servers.
        (r#"{"base_url": "http://a:1", "native_dp_size": 4, "x": [{}]}"#, &["http://a:1"], None, None),
    ];
    for (body, urls, key, model) in table {
        let found = parse(body.as_bytes()).unwrap_or_else(|why| panic!("{body}: {why}"));
        let urls: Vec<String> = urls.iter().map(ToString::to_string).collect();
        assert_eq!(shown(&found), (urls, key, model), "{body}");
    }
}

#[test]
fn rejects_an_invalid_document_with_the_reason() {
    let many: Vec<String> = (0..=MAX_ENGINES).map(|number| format!("http://a:1/{number}")).collect();
    let many = json!({"base_url": many}).to_string();
    let deep = format!(r#"{{"base_url": {}"#, "[".repeat(100_000));
    let table = [
        ("", "is no JSON object"),
        ("ok", "is no JSON object"),
        ("[]", "is no JSON object"),
        ("\"http://a:1\"", "is no JSON object"),
        ("{\"base_url\": \"http://a:1\"", "is no JSON object"),
        ("\u{feff}{}", "is no JSON object"),
        (&deep, "is no JSON object"),
        ("{}", "base_url is missing"),
        (r#"{"base_url": null}"#, "base_url is missing"),
        (r#"{"base_url": 8000}"#, "base_url is neither a text nor a list"),
        (r#"{"base_url": {"a": "http://a:1"}}"#, "base_url is neither a text nor a list"),
        (r#"{"base_url": []}"#, "base_url names no engine yet"),
        (r#"{"base_url": ["http://a:1", 3]}"#, "base_url has an item that is no text"),
        (r#"{"base_url": ["http://a:1", ["http://b:1"]]}"#, "base_url has an item that is no text"),
        (r#"{"base_url": ""}"#, "base_url must not be empty"),
        (r#"{"base_url": ["http://a:1", "b:2"]}"#, "base_url \"b:2\" has no scheme"),
        (r#"{"base_url": "ftp://a"}"#, "base_url \"ftp://a\" has an unknown scheme"),
        (r#"{"base_url": "http://a:99999/v1"}"#, "base_url \"http://a:99999/v1\" has no valid port"),
        (r#"{"base_url": "http://a:1/v1?x=1"}"#, "must end with its path"),
        (r#"{"base_url": "unix:/run/secret.sock"}"#, "is no http URL"),
        (r#"{"base_url": "http://a:1", "api_key": 7}"#, "api_key is no text"),
        (r#"{"base_url": "http://a:1", "api_key": "a\r\nb"}"#, "api_key must be visible ASCII"),
        (r#"{"base_url": "http://a:1", "model": ["m"]}"#, "model is no text"),
        (r#"{"base_url": "http://a:1", "model": "a\nb"}"#, "has control characters"),
        (&many, "base_url names 1025 engines: 1024 is the most"),
    ];
    for (body, wanted) in table {
        let why = parse(body.as_bytes()).expect_err(body);
        assert!(why.contains(wanted), "{why} lacks {wanted}");
        assert!(why.len() < 300 && !why.contains('\n'), "{why}");
    }
    assert!(parse(&[0xff, 0xfe]).is_err());
}

#[test]
fn shows_no_secret_in_an_error() {
    for body in [
        r#"{"base_url": "http://u:hunter2@a"}"#,
        r#"{"base_url": "http://a", "api_key": "hunter2 hunter2"}"#,
        r#"{"base_url": "http://a", "api_key": ["hunter2"]}"#,
    ] {
        let why = parse(body.as_bytes()).expect_err(body);
        assert!(!why.contains("hunter2"), "{why}");
    }
}

proptest! {
    #[test]
    fn never_panics_on_a_damaged_document(text in "\\PC{0,40}", cut in 0..80_usize) {
        let whole = r#"{"base_url": ["http://a:1/v1", "http://b:2"], "api_key": "k", "model": "m"}"#;
        let cut = cut.min(whole.len());
        let damaged = format!("{}{text}{}", &whole[..cut], &whole[cut..]);
        let _ = parse(damaged.as_bytes());
        prop_assert!(cut == whole.len() || parse(&whole.as_bytes()[..cut]).is_err());
    }

    #[test]
    fn lists_every_engine_once_and_in_order(ports in proptest::collection::vec(1..6_u16, 1..12)) {
        let written: Vec<String> = ports.iter().map(|port| format!("http://a:{port}/v1")).collect();
        let found = parse(json!({"base_url": written}).to_string().as_bytes()).expect("is valid");
        let mut wanted: Vec<u16> = Vec::new();
        for port in ports {
            if !wanted.contains(&port) {
                wanted.push(port);
            }
        }
        prop_assert_eq!(found.urls.iter().map(|url| url.port).collect::<Vec<_>>(), wanted);
    }
}
