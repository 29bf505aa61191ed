//! The upstreams that follow from the answers of sources, and the validation of sources.

use super::*;
use crate::config::types::Config;
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
    let upstreams: Vec<UpstreamConfig> = source.upstreams(&found).collect();
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
    let lists = |urls: &str| gym::parse(format!(r#"{{"base_url": {urls}}}"#).as_bytes()).expect("is valid");
    discoverer.store_list("gym http://g:2".into(), lists(r#"["http://a:1", "http://b:1"]"#));
    let owners = |discoverer: &Discoverer| -> Vec<String> {
        let owner = |config: &UpstreamConfig| {
            let source = config.discovered.as_ref().map_or("", |found| found.source.as_str());
            format!("{} {source}", config.url.display())
        };
        discoverer.listed_upstreams().iter().map(owner).collect()
    };
    assert_eq!(owners(&discoverer), ["http://a:1 gym http://g:2", "http://b:1 gym http://g:2"]);
    discoverer.store_list("gym http://g:1".into(), lists(r#"["http://b:1", "https://a:1"]"#));
    assert_eq!(owners(&discoverer), ["http://b:1 gym http://g:1", "https://a:1 gym http://g:1"]);
    discoverer.store_list("gym http://unknown:1".into(), lists(r#"["http://c:1"]"#));
    assert_eq!(discoverer.found.len(), 2, "a source outside the plan is ignored");
}
