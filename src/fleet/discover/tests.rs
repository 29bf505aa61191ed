//! The upstreams that follow from the answers of sources, and the validation of sources.

use super::engine::FoundEngine;
use super::*;
use crate::config::secret::Secret;
use crate::config::types::{
    Config, DiscoveryMethod, DiscoveryOrigin, DiscoverySource, KubernetesService, UpstreamTls,
};
use crate::config::url;
use crate::observe::Observer;

fn source(written: &str) -> DiscoverySource {
    DiscoverySource::new(DiscoveryMethod::Gym(url::upstream(written).expect("is a URL")))
}

#[tokio::test]
async fn gives_each_engine_the_settings_of_its_source_and_of_the_configuration() {
    let tls = UpstreamTls { verify: false, ..UpstreamTls::default() };
    let source =
        DiscoverySource { weight: 2.0, max_active: Some(7), tls: tls.clone(), ..source("http://g:1") };
    let config = Config { sources: vec![source], ..Config::default() };
    let (fleet, _keeper) = Fleet::new(&config, Observer::default()).expect("it needs no file");
    let source = fleet.plan.borrow().sources[0].clone();
    let document =
        br#"{"base_url": ["http://a:1/v1", "https://b", "http://a:1/x/v1"], "api_key": "k", "model": "m"}"#;
    let found = gym::parse(document).expect("is valid");
    let upstreams = source.upstreams(&gym::engines_of(&found));
    let names: Vec<&str> = upstreams.iter().map(|upstream| upstream.name.as_str()).collect();
    assert_eq!(names, ["a:1", "b:443", "a:1/x"]);
    let discovered = Some(DiscoveryOrigin { source: "gym http://g:1".into(), model: Some("m".into()) });
    for upstream in &upstreams {
        assert_eq!((upstream.weight, upstream.max_active), (2.0, Some(7)));
        assert_eq!(upstream.api_key.as_ref().map(Secret::expose), Some("k"));
        assert_eq!((&upstream.models, &upstream.discovered), (&None, &discovered));
        let wanted = if upstream.url.https { tls.clone() } else { UpstreamTls::default() };
        assert_eq!(upstream.tls, wanted, "{}", upstream.name);
    }
}

#[tokio::test]
async fn rejects_a_source_with_unreadable_authorities_before_polling() {
    let tls = UpstreamTls { ca: Some("/nowhere/ca.pem".into()), ..UpstreamTls::default() };
    let with = |url: &str| Config {
        sources: vec![DiscoverySource { tls: tls.clone(), ..source(url) }],
        ..Config::default()
    };
    let problem = Fleet::new(&with("https://g:1"), Observer::default()).err().expect("there is no such file");
    assert!(problem.contains("/nowhere/ca.pem") && problem.contains("gym https://g:1"), "{problem}");
    // Whether the engines of the source use TLS is unknown.
    assert!(Fleet::new(&with("http://g:1"), Observer::default()).is_ok());
}

/// The first of several sources also wins when only the names of their engines are equal.
#[tokio::test]
async fn gives_an_engine_to_the_first_source_that_lists_it() {
    let sources = vec![source("http://g:1"), source("http://g:2")];
    let (fleet, _keeper) =
        Fleet::new(&Config { sources, ..Config::default() }, Observer::default()).expect("it needs no file");
    let (sender, _answers) = mpsc::channel(1);
    let mut discoverer = Discoverer::new(fleet, sender);
    discoverer.follow_plan();
    let lists = |source: &str, urls: &str| {
        let found = gym::parse(format!(r#"{{"base_url": {urls}}}"#).as_bytes()).expect("is valid");
        SourceList { source: source.into(), engines: gym::engines_of(&found) }
    };
    discoverer.store_list(lists("gym http://g:2", r#"["http://a:1", "http://b:1"]"#));
    let owners = |discoverer: &Discoverer| -> Vec<String> {
        let owner = |config: &UpstreamConfig| {
            let source = config.discovered.as_ref().map_or("", |found| found.source.as_str());
            format!("{} {source}", config.url.display())
        };
        discoverer.listed_upstreams().iter().map(owner).collect()
    };
    assert_eq!(owners(&discoverer), ["http://a:1 gym http://g:2", "http://b:1 gym http://g:2"]);
    discoverer.store_list(lists("gym http://g:1", r#"["http://b:1", "https://a:1"]"#));
    assert_eq!(owners(&discoverer), ["http://b:1 gym http://g:1", "https://a:1 gym http://g:1"]);
    discoverer.store_list(lists("gym http://unknown:1", r#"["http://c:1"]"#));
    assert_eq!(discoverer.found.len(), 2, "a source outside the plan is ignored");
}

/// Sessions follow the name: a pod keeps it while the pod of that name elsewhere comes and goes.
#[tokio::test]
async fn a_pod_keeps_its_name_while_its_namesake_elsewhere_restarts() {
    let service = |namespace: &str, service: &str| {
        let service =
            KubernetesService { namespace: Some(namespace.into()), ..KubernetesService::new(service) };
        DiscoverySource::new(DiscoveryMethod::Kubernetes(service))
    };
    let sources = vec![service("a", "vllm"), service("b", "vllm"), service("a", "other")];
    let (fleet, _keeper) =
        Fleet::new(&Config { sources, ..Config::default() }, Observer::default()).expect("it needs no file");
    let (sender, _answers) = mpsc::channel(1);
    let mut discoverer = Discoverer::new(fleet, sender);
    discoverer.follow_plan();
    let mut list = |source: &str, pods: &[(&str, &str)]| {
        let engine = |(pod, url): &(&str, &str)| {
            let found = FoundEngine::at(url::upstream(url).expect("is a URL"));
            FoundEngine { name: Some((*pod).into()), ..found }.into()
        };
        let engines = pods.iter().map(engine).collect();
        discoverer.store_list(SourceList { source: format!("kubernetes {source}"), engines });
        discoverer.listed_upstreams().into_iter().map(|upstream| upstream.name).collect::<Vec<_>>()
    };
    assert_eq!(list("b/vllm", &[("vllm-0", "http://10.0.1.1")]), ["10.0.1.1:80"]);
    assert_eq!(list("a/other", &[("other-0", "http://10.0.0.2")]), ["10.0.1.1:80", "other-0"]);
    assert_eq!(list("a/vllm", &[("vllm-0", "http://10.0.0.1")]), ["vllm-0", "10.0.1.1:80", "other-0"]);
    assert_eq!(list("a/vllm", &[]), ["10.0.1.1:80", "other-0"]);
}

#[test]
fn gives_an_engine_its_own_settings_before_those_of_its_source() {
    let source = DiscoverySource {
        weight: 2.0,
        max_active: Some(7),
        models: Some(vec!["m".into()]),
        api_key_env: Some("VLLM_LB_KEY_A".into()),
        tls: UpstreamTls { verify: false, ..UpstreamTls::default() },
        ..source("http://g:1")
    };
    let at = |url: &str| FoundEngine::at(url::upstream(url).expect("is a URL"));
    let plain = DiscoveredEngine::from(at("http://10.0.0.1:8000")).upstream(&source);
    assert_eq!((plain.name.as_str(), plain.weight, plain.max_active), ("10.0.0.1:8000", 2.0, Some(7)));
    assert_eq!((plain.models.as_deref(), plain.host.as_deref()), (Some(&["m".to_string()][..]), None));
    assert_eq!((plain.api_key_env.as_deref(), plain.tls.verify), (Some("VLLM_LB_KEY_A"), true));
    let engine = FoundEngine {
        name: Some("gpu".into()),
        weight: 3.0,
        max_active: Some(1),
        api_key: Some(Secret::new("k")),
        host: Some("vllm.svc".into()),
        ..at("https://[::1]:8443")
    };
    let own = DiscoveredEngine::from(engine.clone()).upstream(&source);
    assert_eq!((own.name.as_str(), own.weight, own.max_active), ("gpu", 6.0, Some(1)));
    assert_eq!((own.api_key_env, own.host.as_deref()), (None, Some("vllm.svc:8443")));
    assert_eq!((own.tls.sni.as_deref(), own.tls.verify), (Some("vllm.svc"), false));
    let light = FoundEngine { weight: 1e-9, ..engine };
    assert_eq!(DiscoveredEngine::from(light).upstream(&source).weight, 0.001);
    let whole = UpstreamConfig { weight: 5.0, ..UpstreamConfig::new(at("http://a:1").url) };
    let configured = DiscoveredEngine::from(whole).upstream(&source);
    assert_eq!((configured.weight, configured.max_active, configured.models), (5.0, None, None));
    assert_eq!(configured.discovered.map(|found| found.source), Some("gym http://g:1".into()));
}
