//! Each place that may name a session, and the order in which they count.

use http::HeaderValue;
use proptest::prelude::*;

use super::*;

const BODY: &str = r#"{"model":"m","messages":[],"#;

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.append(*name, HeaderValue::from_str(value).unwrap());
    }
    headers
}

fn find(path: Option<&str>, headers: &HeaderMap, body: &str, model: &str) -> Option<Session> {
    let mut scanner = Scanner::new();
    scanner.scan(body.as_bytes());
    let body = Some((body.as_bytes(), &scanner));
    SessionLookup { path, headers, body, model }.session(&places()).map(|(session, _)| session)
}

/// Where the default configuration looks.
fn places() -> SessionPlaces {
    SessionPlaces::new(&SessionConfig::default())
}

/// The session of a name.
fn named(name: &str, source: SessionOrigin) -> Option<Session> {
    find(Some(name), &HeaderMap::new(), "", "m").map(|session| Session { source, ..session })
}

fn in_body(fields: &str) -> Option<Session> {
    find(None, &HeaderMap::new(), &format!("{BODY}{fields}}}"), "m")
}

#[test]
fn uses_the_first_place_that_names_a_session() {
    let all =
        headers(&[("x-rllm-session-id", "h2"), ("x-session-id", "h1"), ("cookie", "vllm_lb_session=c")]);
    let body = r#"{"user":"u","session_id":"b"}"#;
    let without = |name| {
        let mut fewer = all.clone();
        fewer.remove(name);
        fewer
    };
    let cookie = headers(&[("cookie", "vllm_lb_session=c")]);
    for (path, headers, body, name, source) in [
        (Some("p"), &all, body, "p", SessionOrigin::Path),
        (Some(""), &all, body, "h1", SessionOrigin::Header),
        (None, &without("x-session-id"), body, "h2", SessionOrigin::Header),
        (None, &cookie, body, "b", SessionOrigin::Body),
        (None, &cookie, r#"{"user":"u"}"#, "u", SessionOrigin::Body),
        (None, &cookie, "{}", "c", SessionOrigin::Cookie),
    ] {
        let expected = named(name, source);
        assert!(expected.is_some());
        assert_eq!(find(path, headers, body, "m"), expected, "{path:?} {headers:?} {body}");
    }
    assert_eq!(find(None, &HeaderMap::new(), "{}", "m"), None);
    let no_body = SessionLookup { path: None, headers: &HeaderMap::new(), body: None, model: "m" };
    assert_eq!(no_body.session(&places()), None);
}

#[test]
fn reads_only_configured_places() {
    let headers = headers(&[("x-session-id", "h"), ("x-mine", "mine"), ("cookie", "sid=c")]);
    let mut scanner = Scanner::new();
    let body = br#"{"session_id":"b","metadata":{"chat":"m"}}"#;
    scanner.scan(body);
    let request = SessionLookup { path: None, headers: &headers, body: Some((body, &scanner)), model: "m" };
    let nothing =
        SessionConfig { headers: vec![], body: vec![], cookies: vec![], ..SessionConfig::default() };
    assert_eq!(request.session(&SessionPlaces::new(&nothing)), None);
    let session =
        |sessions: &SessionConfig| request.session(&SessionPlaces::new(sessions)).map(|(session, _)| session);
    for (sessions, name, source) in [
        (SessionConfig { headers: vec!["x-mine".into()], ..nothing.clone() }, "mine", SessionOrigin::Header),
        (SessionConfig { body: vec!["metadata.chat".into()], ..nothing.clone() }, "m", SessionOrigin::Body),
        (SessionConfig { cookies: vec!["sid".into()], ..nothing.clone() }, "c", SessionOrigin::Cookie),
    ] {
        assert_eq!(session(&sessions), named(name, source), "{sessions:?}");
    }
}

#[test]
fn labels_a_session_by_its_printable_name() {
    let headers = headers(&[("x-session-id", " sess-1 ")]);
    let request = SessionLookup { path: None, headers: &headers, body: None, model: "m" };
    assert_eq!(request.session(&places()).unwrap().1, "sess-1");
    for (name, told) in [
        (&b"a b/\xc3\xa9"[..], "a b/\u{e9}"),
        (b"a\nb\x1b[1m", "a\u{fffd}b\u{fffd}[1m"),
        (b"\xff", "\u{fffd}"),
    ] {
        assert_eq!(printable(name), told);
    }
    let long = "\u{e9}".repeat(100);
    assert_ne!(printable(format!("{long}1").as_bytes()), printable(format!("{long}2").as_bytes()));
    assert_eq!(printable("x".repeat(MAX_LABEL_BYTES).as_bytes()), "x".repeat(MAX_LABEL_BYTES));
}

#[test]
fn reads_fields_of_a_body() {
    for (fields, name) in [
        (r#""session_id":"a""#, Some("a")),
        (r#""session_id":" a ""#, Some("a")),
        (r#""session_id":"a\u00e9\n""#, Some("a\u{e9}")),
        (r#""s\u0065ssion_id":"a""#, Some("a")),
        (r#""session_id":17"#, Some("17")),
        (r#""session_id":"a","session_id":"b""#, Some("b")),
        (r#""session_id":"""#, None),
        (r#""session_id":"  ""#, None),
        (r#""session_id":null"#, None),
        (r#""session_id":true"#, None),
        (r#""session_id":["a"]"#, None),
        (r#""session_id":"","prompt_cache_key":"k""#, Some("k")),
        (r#""prompt_cache_key":"k","user":"u""#, Some("k")),
        (r#""metadata":{"x":1,"session_id":"s"},"user":"u""#, Some("s")),
        (r#""metadata":{"session_id":{"session_id":"s"}},"user":"u""#, Some("u")),
        (r#""metadata":{"rllm":{"session_id":"s","run_id":"r"}},"rllm":{"session_id":"t"}"#, Some("s")),
        (r#""rllm":{"run_id":"r","session_id":"s"},"session_id":"t""#, Some("s")),
        (r#""session_params":{"id":"i","session_id":"s"},"session_id":"t""#, Some("s")),
        (r#""metadata":{"rllm":{"run_id":"r"}},"user":"u""#, Some("u")),
        (r#""metadata":{"rllm":["session_id","s"]},"user":"u""#, Some("u")),
        (r#""metadata":{"rllm":{"session_id":{"session_id":"s"}}}"#, None),
        (r#""metadata":{"rllm":{"session_id":""},"session_id":"s"}"#, Some("s")),
        (r#""rllm":"session_id","session_params":null"#, None),
        (r#""metadata":"session_id","user":"u""#, Some("u")),
        (r#""metadata":null"#, None),
        (r#""metadata":{"user_id":"user_1f_account__session_0b-5"}"#, Some("0b-5")),
        (r#""metadata":{"user_id":"user_1f_account__session_"},"user":"u""#, Some("u")),
        (r#""metadata":{"user_id":"somebody"},"user":"u""#, Some("u")),
        (r#""metadata":{"user_id":"a_session_b","session_id":"s"}"#, Some("s")),
        (r#""metadata":{"user_id":"{\"device_id\":\"d\",\"session_id\":\"s\"}"}"#, Some("s")),
        (r#""metadata":{"user_id":"{\"session_id\":"}"#, None),
        (r#""messages":[{"session_id":"no"}]"#, None),
    ] {
        let expected = name.and_then(|name| named(name, SessionOrigin::Body));
        assert_eq!(in_body(fields), expected, "{fields}");
    }
}

#[test]
fn ignores_a_cut_field() {
    let body = r#"{"session_id":"abc"}"#;
    for end in 0..body.len() - 1 {
        assert_eq!(find(None, &HeaderMap::new(), &body[..end], "m"), None, "{end}");
    }
}

#[test]
fn reads_cookies() {
    for (line, name) in [
        ("vllm_lb_session=a", Some("a")),
        ("b=1; vllm_lb_session=a=b; c", Some("a=b")),
        (" vllm_lb_session = a ;", Some("a")),
        ("vllm_lb_session_x=1", None),
        ("x_vllm_lb_session=1", None),
        ("vllm_lb_session=", None),
        ("vllm_lb_session", None),
        (";;=", None),
    ] {
        let expected = name.and_then(|name| named(name, SessionOrigin::Cookie));
        assert_eq!(find(None, &headers(&[("cookie", line)]), "{}", "m"), expected, "{line}");
    }
    let two = headers(&[("cookie", "a=1"), ("cookie", "vllm_lb_session=a")]);
    assert_eq!(find(None, &two, "{}", "m"), named("a", SessionOrigin::Cookie));
}

#[test]
fn a_cookie_that_starlette_signed_names_its_session_however_it_is_signed() {
    for line in [
        "VLLMModel___policy_model=eyJzZXNzaW9uX2lkIjogIjBiNWMtNDEifQ==.aQ3x0A.one",
        "a=1; VLLMModel___policy_model=\"eyJzZXNzaW9uX2lkIjogIjBiNWMtNDEifQ==.aQ3x9Z.two\"",
    ] {
        let expected = named("0b5c-41", SessionOrigin::Cookie);
        assert_eq!(find(None, &headers(&[("cookie", line)]), "{}", "m"), expected, "{line}");
    }
    let both = headers(&[("cookie", "A___b=c; vllm_lb_session=own")]);
    assert_eq!(find(None, &both, "{}", "m"), named("own", SessionOrigin::Cookie), "in the order of the list");
    let raw = headers(&[("cookie", "A___b=c")]);
    assert_eq!(find(None, &raw, "{}", "m"), named("c", SessionOrigin::Cookie));
    assert_eq!(find(None, &headers(&[("cookie", "A__b=c")]), "{}", "m"), None);
}

#[test]
fn reads_headers_of_agents() {
    for name in ["x-claude-code-session-id", "x-session-affinity", "session-id", "session_id"] {
        let expected = named("s", SessionOrigin::Header);
        assert_eq!(find(None, &headers(&[(name, "s")]), "{}", "m"), expected, "{name}");
    }
}

#[test]
fn gives_subagents_their_own_session_or_the_parents() {
    let session = |pairs: &[(&'static str, &str)], subagents| {
        let headers = headers(pairs);
        let places = SessionPlaces::new(&SessionConfig { subagents, ..SessionConfig::default() });
        let lookup = SessionLookup { path: None, headers: &headers, body: None, model: "m" };
        lookup.session(&places).map(|(session, label)| (session.key, label)).unwrap()
    };
    let claude = "x-claude-code-session-id";
    let agent = "x-claude-code-agent-id";
    // The first agent, a subagent, and another one, of each client.
    for [first, second, third] in [
        [vec![(claude, "s")], vec![(claude, "s"), (agent, "a")], vec![(claude, "s"), (agent, "b")]],
        [
            vec![("session-id", "s"), ("thread-id", "s")],
            vec![("session-id", "s"), ("thread-id", "a"), ("x-codex-parent-thread-id", "s")],
            vec![("session-id", "s"), ("thread-id", "b"), ("x-codex-parent-thread-id", "a")],
        ],
        [
            vec![("x-session-affinity", "s")],
            vec![("x-session-affinity", "a"), ("x-parent-session-id", "s")],
            vec![("x-session-affinity", "b"), ("x-parent-session-id", "s")],
        ],
    ] {
        let of = |subagents| [&first, &second, &third].map(|pairs| session(pairs, subagents));
        let own = of(SubagentSessions::Own);
        assert!(own[0].0 != own[1].0 && own[0].0 != own[2].0 && own[1].0 != own[2].0, "{own:?}");
        assert_eq!(own[0], session(&[(claude, "s")], SubagentSessions::Own));
        assert_eq!(own[1], session(&second, SubagentSessions::Own));
        let follow = of(SubagentSessions::Follow);
        assert!(follow.iter().all(|session| *session == own[0]), "{follow:?}");
    }
    let (_, label) = session(&[(claude, "s"), (agent, "a")], SubagentSessions::Own);
    assert_eq!(label, "s", "totals and traces of a session are those of all its agents");
}

#[test]
fn another_model_is_another_session_and_a_long_name_is_known_to_its_end() {
    let none = HeaderMap::new();
    assert_ne!(find(Some("a"), &none, "", "m"), find(Some("a"), &none, "", "n"));
    let long = "x".repeat(1 << 20);
    let longer = format!("{long}y");
    assert_ne!(named(&long, SessionOrigin::Path), named(&longer, SessionOrigin::Path));
    assert_eq!(
        named("a", SessionOrigin::Path).unwrap().key,
        9_143_808_475_024_823_649,
        "balancers must agree"
    );
}

proptest! {
    #[test]
    fn a_name_is_the_same_session_wherever_it_stands(name in "[a-zA-Z0-9_:/-]{1,40}") {
        let key = named(&name, SessionOrigin::Path).unwrap().key;
        let body = serde_json::json!({"prompt_cache_key": name}).to_string();
        for session in [
            find(None, &headers(&[("x-session-id", &name)]), "{}", "m"),
            find(None, &headers(&[("cookie", &format!("vllm_lb_session={name}"))]), "{}", "m"),
            find(None, &HeaderMap::new(), &body, "m"),
        ] {
            prop_assert_eq!(session.unwrap().key, key);
        }
    }

    #[test]
    fn labels_are_short_and_stable(name in any::<Vec<u8>>(), times in 1..40_usize) {
        let told = printable(&name.repeat(times));
        prop_assert!(told.len() <= MAX_LABEL_BYTES && !told.contains(char::is_control));
        prop_assert_eq!(printable(told.as_bytes()), told);
    }

    #[test]
    fn any_bytes_are_taken(body in any::<Vec<u8>>(), metadata in any::<String>()) {
        let tail = serde_json::json!({"metadata": {"user_id": metadata}}).to_string();
        let places = places();
        for body in [body.as_slice(), tail.as_bytes()] {
            let mut scanner = Scanner::new();
            scanner.scan(body);
            let body = Some((body, &scanner));
            let headers = HeaderMap::new();
            let lookup = SessionLookup { path: None, headers: &headers, body, model: "" };
            lookup.session(&places);
        }
    }
}
