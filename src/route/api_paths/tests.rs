//! Tests of `paths`: every route of vLLM 0.32, and the answers to other paths.

use proptest::prelude::*;

use super::*;

/// The routes of vLLM 0.32 with the policy for each, written independently of the table.
const REFERENCE: &str = "
    POST /v1/chat/completions prefix json
    POST /v1/chat/completions/batch prefix json
    POST /v1/completions prefix json
    POST /v1/responses prefix json
    GET /v1/responses/resp_1 sticky nowhere
    POST /v1/responses/resp_1/cancel sticky nowhere
    POST /v1/messages prefix json anthropic
    POST /v1/messages/count_tokens least json anthropic
    POST /cohere/v2/chat prefix json
    POST /cohere/v2/chat/render least json
    POST /generative_scoring prefix json
    POST /v1/systemone prefix json
    POST /v1/embeddings least json
    POST /v2/embed least json
    POST /pooling least json
    POST /classify least json
    POST /score least json
    POST /v1/score least json
    POST /rerank least json
    POST /v1/rerank least json
    POST /v2/rerank least json
    POST /v1/audio/transcriptions least multipart
    POST /v1/audio/translations least multipart
    GET /v1/realtime least query
    POST /tokenize least json
    POST /detokenize least json
    GET /tokenizer_info deny
    POST /v1/chat/completions/render least json
    POST /v1/completions/render least json
    POST /v1/messages/render least json anthropic
    POST /v1/responses/render least json
    POST /v1/chat/completions/derender least json
    POST /v1/completions/derender least json
    POST /inference/v1/generate prefix json
    POST /inference/v1/abort_requests fanout nowhere
    POST /abort_requests deny
    GET /v1/models models nowhere
    GET /health health nowhere detail
    GET /ping health nowhere detail
    POST /ping health nowhere detail
    POST /invocations prefix sniff
    POST /adapters deny
    DELETE /adapters/a deny
    GET /version version nowhere detail
    GET /load load nowhere detail
    GET /metrics metrics nowhere detail
    GET /metrics/ metrics nowhere detail
    HEAD /metrics_of_any_name metrics nowhere detail
    GET /kv_event_sources deny
    GET /openapi.json least nowhere detail
    HEAD /openapi.json least nowhere detail
    GET /docs least nowhere detail
    GET /redoc least nowhere detail
    GET /docs/oauth2-redirect least nowhere detail
    GET /static/swagger-ui/a.js least nowhere detail
    POST /v1/load_lora_adapter deny
    POST /v1/unload_lora_adapter deny
    POST /start_profile deny
    POST /stop_profile deny
    POST /reset_prefix_cache deny
    POST /reset_mm_cache deny
    POST /reset_encoder_cache deny
    POST /sleep deny
    POST /wake_up deny
    POST /release_kv_cache_memory deny
    GET /is_sleeping deny
    POST /pause deny
    POST /resume deny
    GET /is_paused deny
    POST /init_weight_transfer_engine deny
    POST /shutdown_weight_transfer_engine deny
    POST /start_weight_update deny
    POST /start_draft_weight_update deny
    POST /update_weights deny
    POST /finish_weight_update deny
    POST /update_weight_version deny
    POST /weight_checker deny
    GET /weight_info deny
    GET /get_world_size deny
    POST /collective_rpc deny
    GET /server_info deny
    POST /scale_elastic_ep deny
    POST /is_scaling_elastic_ep deny
    POST /fault_tolerance/apply deny
    GET /fault_tolerance/status deny
";

fn find(method: &str, path: &str) -> PathMatch {
    decode(path).map_or(PathMatch::NotFound, |path| PathTable::default().find(method, &path))
}

fn reference() -> impl Iterator<Item = Vec<&'static str>> {
    REFERENCE.lines().map(|line| line.split_whitespace().collect()).filter(|row: &Vec<_>| !row.is_empty())
}

#[test]
fn has_every_route_of_vllm_with_its_policy() {
    let mut seen = Vec::new();
    for row in reference() {
        let PathMatch::Route(route) = find(row[0], row[1]) else { panic!("{row:?}") };
        let policy = match &route.policy {
            PathPolicy::Route { prefix: true } => "prefix",
            PathPolicy::Route { prefix: false } => "least",
            PathPolicy::Sticky { id } => {
                assert_eq!(id, "resp_1");
                "sticky"
            }
            PathPolicy::Aggregate(AggregateKind::Models) => "models",
            PathPolicy::Aggregate(AggregateKind::Load) => "load",
            PathPolicy::Aggregate(AggregateKind::Version) => "version",
            PathPolicy::Aggregate(AggregateKind::Metrics) => "metrics",
            PathPolicy::FanOut => "fanout",
            PathPolicy::Upstream(name) => name,
            PathPolicy::Answer(OwnAnswer::Health) => "health",
            PathPolicy::Deny => "deny",
        };
        let model = match route.api.model_in() {
            ModelLocation::Json => "json",
            ModelLocation::Multipart => "multipart",
            ModelLocation::Query => "query",
            ModelLocation::Nowhere => "nowhere",
            ModelLocation::Sniff => "sniff",
        };
        let style = match route.api.error_style() {
            ErrorStyle::OpenAi => "",
            ErrorStyle::Anthropic => "anthropic",
            ErrorStyle::Detail => "detail",
        };
        assert_eq!(policy, row[2], "{row:?}");
        assert_eq!(model, *row.get(3).unwrap_or(&"nowhere"), "{row:?}");
        assert_eq!(style, *row.get(4).unwrap_or(if policy == "deny" { &"detail" } else { &"" }), "{row:?}");
        seen.push((row[0], row[1]));
    }
    for row in API_ROUTES {
        let covered =
            |(method, path): &(&str, &str)| row.verb.allows(method) && fit(row.path, path).is_some();
        assert!(seen.iter().any(covered), "{row:?} is not in the reference");
    }
}

#[test]
fn rejects_like_fastapi() {
    let not_allowed = |allow| PathMatch::MethodNotAllowed { allow };
    let redirect = |to: &str| PathMatch::Redirect { to: to.to_owned() };
    for (method, path, found) in [
        ("HEAD", "/v1/models", not_allowed("GET")),
        ("HEAD", "/health", not_allowed("GET")),
        ("HEAD", "/ping", not_allowed("GET")),
        ("DELETE", "/ping", not_allowed("GET")),
        ("OPTIONS", "/v1/chat/completions", not_allowed("POST")),
        ("GET", "/v1/chat/completions", not_allowed("POST")),
        ("get", "/v1/models", not_allowed("GET")),
        ("GET", "/v1/responses", not_allowed("POST")),
        ("DELETE", "/v1/responses/a", not_allowed("GET")),
        ("DELETE", "/v1/responses/a/cancel", not_allowed("POST")),
        ("POST", "/docs", not_allowed("GET, HEAD")),
        ("POST", "/v1/models/", redirect("/v1/models")),
        ("GET", "/v1/models///", redirect("/v1/models")),
        ("GET", "/v1/model%73/", redirect("/v1/models")),
        ("GET", "/v1/responses/", redirect("/v1/responses")),
        ("GET", "/v1/responses/a%20b/", redirect("/v1/responses/a b")),
        ("GET", "/v1/responses/a/cancel/", redirect("/v1/responses/a/cancel")),
        ("GET", "/static", redirect("/static/")),
        ("GET", "/", PathMatch::NotFound),
        ("HEAD", "/", PathMatch::NotFound),
        ("GET", "", PathMatch::NotFound),
        ("OPTIONS", "*", PathMatch::NotFound),
        ("GET", "//v1/models", PathMatch::NotFound),
        ("GET", "//v1/models/", PathMatch::NotFound),
        ("GET", "/V1/models", PathMatch::NotFound),
        ("GET", "/v1/models/llama", PathMatch::NotFound),
        ("GET", "/v1/responses/a%2Fb", PathMatch::NotFound),
        ("GET", "/v1/responses/a/input_items", PathMatch::NotFound),
        ("GET", "/v1/files", PathMatch::NotFound),
        ("GET", "/sessions/s/v1/models", PathMatch::NotFound),
        ("GET", "/v1/models%", PathMatch::NotFound),
        ("GET", "/v1/models%0a", PathMatch::NotFound),
        ("GET", "/v1/responses/%00", PathMatch::NotFound),
        ("GET", "/v1/responses/%ff", PathMatch::NotFound),
        ("GET", "/v1/responses/%+1", PathMatch::NotFound),
        ("GET", "/static/../server_info", PathMatch::NotFound),
        ("GET", "/static/%2e%2E/server_info", PathMatch::NotFound),
        ("GET", "/static%2F..%2fserver_info", PathMatch::NotFound),
        ("GET", "/static/a/./b", PathMatch::NotFound),
        ("GET", "/static/..", PathMatch::NotFound),
        ("GET", "/metrics/../server_info", PathMatch::NotFound),
        ("GET", "/v1/responses/..", PathMatch::NotFound),
        ("GET", "/v1/./models", PathMatch::NotFound),
        ("GET", "/sleep", PathMatch::NotFound),
        ("POST", "/sleep/", PathMatch::NotFound),
    ] {
        assert_eq!(find(method, path), found, "{method} {path}");
    }
    assert_eq!(find("GET", "/v1%2Fmodel%73"), find("GET", "/v1/models"));
}

#[test]
fn accepts_dots_within_a_segment() {
    for path in ["/static/a.js", "/static/..a", "/static/a..", "/static/...", "/v1/responses/.a"] {
        assert!(matches!(find("GET", path), PathMatch::Route(_)), "{path}");
    }
}

#[test]
fn passes_configured_paths_through() {
    let item = |path: &str, to| Passthrough { path: path.to_owned(), to };
    let gpu = || PassthroughTarget::Upstream("gpu-0".to_owned());
    let table = PathTable::new(&[
        item("/sleep", PassthroughTarget::All),
        item("/server_info", gpu()),
        item("/adapters/{name}", gpu()),
        item("/plugin/thing", gpu()),
        item("/v1/models", gpu()),
    ]);
    let route = |policy| PathMatch::Route(ApiRoute { api: Api::Control, policy });
    let to_gpu = || route(PathPolicy::Upstream("gpu-0".into()));
    assert_eq!(table.find("POST", "/sleep"), route(PathPolicy::FanOut));
    assert_eq!(table.find("GET", "/sleep"), PathMatch::MethodNotAllowed { allow: "POST" });
    assert_eq!(table.find("POST", "/sleep/"), PathMatch::Redirect { to: "/sleep".to_owned() });
    assert_eq!(table.find("GET", "/server_info"), to_gpu());
    assert_eq!(table.find("DELETE", "/adapters/a"), to_gpu());
    assert_eq!(table.find("PATCH", "/plugin/thing"), to_gpu());
    assert_eq!(table.find("POST", "/wake_up"), route(PathPolicy::Deny));
    // Only denied paths can be passed through.
    assert_eq!(table.find("GET", "/v1/models"), find("GET", "/v1/models"));
    assert_eq!(table.find("POST", "/v1/models"), PathMatch::MethodNotAllowed { allow: "GET" });
}

#[test]
fn escapes_locations() {
    for (https, host, path, query, url) in [
        (false, "lb:8000", "/v1/models", None, "http://lb:8000/v1/models"),
        (true, "[::1]:8000", "/v1/models", Some("a=b%20c&d"), "https://[::1]:8000/v1/models?a=b%20c&d"),
        (false, "h", "/v1/responses/a b", Some(""), "http://h/v1/responses/a%20b"),
        (false, "h", "/v1/responses/é", None, "http://h/v1/responses/%C3%A9"),
        (false, "h", "/v1/responses/a?b#c%", Some("x"), "http://h/v1/responses/a%3Fb%23c%25?x"),
        (false, "h\r\nx: y", "/a", Some("\r\n\""), "http://h%0D%0Ax:%20y/a?%0D%0A%22"),
        (false, "evil@h", "/a", None, "http://evil%40h/a"),
    ] {
        assert_eq!(location(https, host, path, query), url);
    }
}

#[test]
fn names_are_labels_and_only_realtime_is_a_websocket() {
    let names: std::collections::BTreeSet<_> = API_ROUTES.iter().map(|row| row.api.name()).collect();
    let apis: std::collections::HashSet<_> = API_ROUTES.iter().map(|row| row.api).collect();
    assert_eq!(names.len(), apis.len());
    assert!(names.iter().all(|name| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')));
    assert!(apis.into_iter().all(|api| api.is_websocket() == (api == Api::Realtime)));
}

proptest! {
    #[test]
    fn accepts_any_path(
        path in any::<String>(),
        likely in "(/|%|v1|models|responses|2F|\\{|\\}|:path){0,9}",
    ) {
        find("GET", &path);
        find("GET", &likely);
    }

    #[test]
    fn redirects_once(path in "/(v1|models|responses|health|/|static|a){0,5}") {
        if let PathMatch::Redirect { to } = find("GET", &path) {
            let next = find("GET", &to);
            prop_assert!(!matches!(next, PathMatch::NotFound | PathMatch::Redirect { .. }), "{}", to);
        }
    }

    #[test]
    fn escaping_every_byte_changes_nothing(
        path in "/(v1|/|models|responses|health|a|\\.)*",
        method in "GET|POST",
    ) {
        let escaped: String = path.bytes().map(|byte| format!("%{byte:02x}")).collect();
        prop_assert_eq!(find(&method, &escaped), find(&method, &path));
    }
}

#[test]
fn finds_a_session_in_the_path() {
    for (path, found) in [
        ("/sessions/a/v1/chat/completions", Some(("a", "/v1/chat/completions"))),
        ("/sessions/a/v1", Some(("a", "/v1"))),
        ("/sessions/a/v1/", Some(("a", "/v1/"))),
        ("/sessions/harbor/hello-world:0/v1/models", Some(("harbor/hello-world:0", "/v1/models"))),
        ("/sessions/a%2Fb%20c/v1/models", Some(("a/b c", "/v1/models"))),
        ("/sessions/a/v1/sessions/b/v1/x", Some(("a", "/v1/sessions/b/v1/x"))),
        ("/sessions/a/v10/b/v1/x", Some(("a/v10/b", "/v1/x"))),
        ("/sessions//v1/models", None),
        ("/sessions/v1/models", None),
        ("/sessions/a", None),
        ("/sessions/a/v2/x", None),
        ("/sessions/%zz/v1/x", None),
        ("/sessions/../v1/x", None),
        ("/v1/sessions/a/v1/x", None),
        ("/session/a/v1/x", None),
        ("/ng-rollout/a.B_c-1/v1/chat/completions", Some(("a.B_c-1", "/v1/chat/completions"))),
        ("/ng-rollout/a/training-token-capture/v1/responses", Some(("a", "/v1/responses"))),
        ("/ng-rollout/a/v1", Some(("a", "/v1"))),
        ("/ng-rollout/a/training-token-capture", None),
        ("/ng-rollout/a/training-token-capturev1/x", None),
        ("/ng-rollout/a/other/v1/x", None),
        ("/ng-rollout/a/v10/x", None),
        ("/ng-rollout/.a/v1/x", None),
        ("/ng-rollout/../v1/x", None),
        ("/ng-rollout/a%2Fb/v1/x", None),
        ("/ng-rollout//v1/x", None),
        ("/ng-rollout/a", None),
        ("/", None),
    ] {
        let (id, rest) = of_session(path).unzip();
        assert_eq!((id.as_deref(), rest), found.unzip(), "{path}");
    }
}
