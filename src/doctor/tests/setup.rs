//! Tests of findings about routes, sources and Redis, and of the report.

use super::*;

#[test]
fn routes_to_models_of_no_upstream_give_findings() {
    let routes =
        "routes: [{model: a, to: tiny}, {model: b, to: llama}, {model: c, to: tiny, upstreams: [x]}]\n";
    let text =
        format!("upstreams: [{{url: \"http://gpu-0:8000\", name: x}}, \"http://gpu-1:8000\"]\n{routes}");
    let config = check::check(&text, &|_| None).expect("a valid configuration");
    let upstreams = || -> Vec<UpstreamFacts> {
        let facts = config.upstreams.iter().zip(0..);
        facts.map(|(config, number)| UpstreamFacts { config: config.clone(), ..sound(number) }).collect()
    };
    let found = diagnose(&setup(&config, upstreams()));
    assert_eq!(codes(&found), [("routes[1]", "route_unserved")], "{found:?}");
    assert_eq!(found[0].severity, Severity::Error);
    // An upstream with unknown models may serve the model of the route.
    let mut unknown = upstreams();
    unknown[1] = UpstreamFacts {
        health: Err(QuestionFailure::Silent("no answer".into())),
        ..UpstreamFacts::unasked(unknown[1].config.clone())
    };
    assert_eq!(codes(&diagnose(&setup(&config, unknown))), [(config.upstreams[1].name.as_str(), "silent")]);
}

#[test]
fn sources_and_the_limit_of_files_give_findings() {
    let config = config("");
    let source = |label: &str, listed| SourceFacts { label: label.into(), listed };
    let facts = SetupFacts {
        sources: vec![
            source("gym a", Ok(1)),
            source("gym b", Ok(0)),
            source("gym c", Err("status 500".into())),
        ],
        unusable_certificates: vec!["listen: tls of 127.0.0.1:8443: /a.pem: no such file".into()],
        open_files: Some(1024),
        ..setup(&config, vec![sound(0)])
    };
    let wanted = [
        ("gym c", "source_unreadable"),
        ("the configuration", "certificate_unusable"),
        ("gym b", "source_empty"),
        ("this machine", "open_files"),
    ];
    assert_eq!(codes(&diagnose(&facts)), wanted);
}

fn redis(server: Result<RedisServer, RedisRefusal>) -> Vec<Finding> {
    let config = config("");
    let redis = Some(RedisFacts { url: "redis://a:6379/0".into(), server });
    diagnose(&SetupFacts { redis, ..setup(&config, Vec::new()) })
}

#[test]
fn faults_of_redis_give_findings() {
    let sound = RedisServer {
        version: Some("7.2.4".into()),
        role: Some("master".into()),
        max_memory: Some(0),
        memory_policy: Some("allkeys-lru".into()),
        clock: Some(ClockDifference { ahead: 0.001, error: 0.001 }),
        ..RedisServer::default()
    };
    assert_eq!(redis(Ok(sound.clone())), [], "a policy without a limit evicts nothing");
    assert_eq!(redis(Ok(RedisServer { version: Some("6.2.0".into()), ..sound.clone() })), []);
    let refusal = |denies_access| RedisRefusal { denies_access, text: "why".into() };
    let most = |bytes: u64| RedisServer { max_memory: Some(bytes), ..sound.clone() };
    let table = [
        (Err(refusal(false)), "redis_unreachable", Severity::Error),
        (Err(refusal(true)), "redis_password", Severity::Error),
        (
            Ok(RedisServer { version: Some("6.0.16".into()), ..sound.clone() }),
            "redis_version",
            Severity::Error,
        ),
        (Ok(RedisServer { role: Some("slave".into()), ..sound.clone() }), "redis_replica", Severity::Error),
        (Ok(most(1 << 30)), "redis_evicts", Severity::Warning),
        (
            Ok(RedisServer { memory_policy: Some("noeviction".into()), ..most(100 << 20) }),
            "redis_memory",
            Severity::Warning,
        ),
        (
            Ok(RedisServer { clock: Some(ClockDifference { ahead: -60.0, error: 0.1 }), ..sound.clone() }),
            "redis_clock",
            Severity::Note,
        ),
        (
            Ok(RedisServer { info_refused: Some("NOPERM".into()), ..sound.clone() }),
            "redis_info_refused",
            Severity::Note,
        ),
    ];
    for (server, code, severity) in table {
        let found = redis(server);
        assert_eq!(codes(&found), [("redis", code)], "{found:?}");
        assert_eq!(found[0].severity, severity, "{code}");
    }
}

#[test]
fn an_admin_address_without_a_balancer_gives_a_finding() {
    let config = config("");
    for (failure, seen, remedy) in [
        (QuestionFailure::Unreached("cannot connect".into()), "cannot connect", "start the balancer"),
        (QuestionFailure::Status(401, "why".into()), "status 401", "set VLLM_LB_ADMIN_TOKEN or admin.token"),
        (QuestionFailure::Silent("no answer".into()), "no answer", "see the log of the balancer"),
        (QuestionFailure::Status(404, "why".into()), "status 404", "correct --admin"),
        (QuestionFailure::Garbled("no list".into()), "no list", "correct --admin"),
    ] {
        let missing = MissingBalancer { admin: "http://127.0.0.1:9092".into(), failure };
        let found =
            diagnose(&SetupFacts { missing_balancer: Some(missing), ..setup(&config, vec![sound(0)]) });
        assert_eq!(codes(&found), [("http://127.0.0.1:9092", "no_balancer")], "{found:?}");
        assert_eq!(
            (found[0].severity, &*found[0].seen),
            (Severity::Error, &*format!("GET /admin/upstreams: {seen}"))
        );
        assert!(found[0].remedy.starts_with(remedy), "{found:?}");
    }
}

#[test]
fn the_report_has_the_severest_first_and_aligned() {
    let mut upstreams: Vec<UpstreamFacts> = (0..3).map(sound).collect();
    upstreams[0].has_dev_routes = true;
    upstreams[2].health = Err(QuestionFailure::Unreached("cannot connect: \u{1b}[2Jgone".into()));
    let config = config("");
    let facts = setup(&config, upstreams);
    let found = diagnose(&facts);
    let took = std::time::Duration::from_millis(1_234);
    let text = report::text(&facts, &found, took, false);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "3 upstreams, 2 healthy; 1.2 s");
    assert!(lines[2].starts_with("error    gpu-2  unreachable  GET /health: cannot connect: \\u{1b}[2Jgone"));
    assert!(lines[4].starts_with("warning  gpu-0  dev_routes   GET /is_sleeping answers"), "{text}");
    assert_eq!(lines.last(), Some(&"found        1 error, 1 warning"));
    assert!(!text.contains('\u{1b}'));
    assert!(report::text(&facts, &found, took, true).contains("\u{1b}[1;31merror"));
    let json = report::json(&facts, &found, took);
    assert_eq!((&json["errors"], &json["findings"][0]["code"]), (&1.into(), &"unreachable".into()));
    assert_eq!(json["upstreams"][2]["answers"], false);
    let facts = setup(&config, vec![sound(0)]);
    assert!(report::text(&facts, &[], took, false).ends_with("nothing found\n"));
}

proptest! {
    #[test]
    fn any_pages_and_lists_give_findings_of_the_upstreams(
        pages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 1..6),
        text in "\\PC{0,40}",
    ) {
        let upstreams: Vec<UpstreamFacts> = (0..).zip(&pages).map(|(number, bytes)| UpstreamFacts {
            metrics: Ok(page(bytes)),
            models: parse_models(bytes).map_err(QuestionFailure::Garbled),
            version: Some(text.clone()),
            ..sound(number)
        }).collect();
        let config = config("");
        let facts = setup(&config, upstreams);
        let found = diagnose(&facts);
        prop_assert!(found.is_sorted_by_key(|finding| finding.severity));
        let shown = report::text(&facts, &found, std::time::Duration::ZERO, false);
        prop_assert!(!shown.contains(|c: char| c.is_control() && c != '\n'));
    }
}
