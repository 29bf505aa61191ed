//! The corpus of configuration files, and the manual `conf/lb.yaml` held against the code.
//!
//! Beside every file of the corpus stands a `.expected`: for a valid one the effective configuration where it
//! differs from the default, for an invalid one the exact messages. After an intended change, look
//! at what the test shows and run it with `VLLM_LB_BLESS=1` to write the files anew.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::Value;
use vllm_lb::config::types::{
    Config, DiscoveryMethod, DiscoverySource, KubernetesService, Listen, ListenTls, Passthrough,
    PassthroughTarget, Retry, RouteConfig, Timeouts, UpstreamConfig,
};
use vllm_lb::config::{
    check, keys,
    problem::{ConfigPlace, ConfigProblem},
    render, url,
};

pub fn env(name: &str) -> Option<String> {
    match name {
        "TOKEN" | "VLLM_API_KEY" | "VLLM_LB_ADMIN_TOKEN" => Some("hunter2".into()),
        "THREADS" => Some("4".into()),
        "EMPTY" => Some(String::new()),
        _ => None,
    }
}

pub fn none(_: &str) -> Option<String> {
    None
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = root().join(folder);
    let entries = std::fs::read_dir(&folder).expect("the folder is in the tree");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("readable").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    assert!(!files.is_empty(), "no files in {}", folder.display());
    files
}

pub fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The lines of the problems of a file; none when it is valid.
fn problems(text: &str) -> Vec<String> {
    check::check(text, &env).err().unwrap_or_default().iter().map(ConfigProblem::to_string).collect()
}

/// As `problems`, for the product as it is: routes are refused until requests go by them.
fn as_it_ships(text: &str) -> Vec<String> {
    check::check(text, &env).err().unwrap_or_default().iter().map(ConfigProblem::to_string).collect()
}

/// The keys that hold a map of the user's own keys.
fn free() -> &'static [String] {
    static FREE: LazyLock<Vec<String>> = LazyLock::new(keys::free);
    &FREE
}

/// Every leaf of a rendered configuration as `path: value`.
fn leaves(value: &Value, path: &str, out: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) if !free().iter().any(|free| path.ends_with(&format!(".{free}"))) => {
            for (key, value) in map {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                leaves(value, &path, out);
            }
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            for (index, item) in items.iter().enumerate() {
                leaves(item, &format!("{path}[{index}]"), out);
            }
        }
        Value::Null => out.push((path.into(), "none".into())),
        Value::String(text) => out.push((path.into(), text.clone())),
        other => out.push((path.into(), other.to_string())),
    }
}

fn all_leaves(config: &Config) -> Vec<(String, String)> {
    let mut out = Vec::new();
    leaves(&render::json(config), "", &mut out);
    out
}

/// The same by keys, as the table of them has it; one of a list's items has as many leaves as items have it.
pub fn by_key(config: &Config) -> Vec<(String, String)> {
    let key = |path: String| ConfigPlace::named(&path).pattern();
    all_leaves(config).into_iter().map(|(path, value)| (key(path), value)).collect()
}

fn gym(written: &str) -> DiscoverySource {
    DiscoverySource::new(DiscoveryMethod::Gym(url::upstream(written).expect("is a URL")))
}

fn service(name: &str) -> DiscoverySource {
    DiscoverySource::new(DiscoveryMethod::Kubernetes(KubernetesService::new(name)))
}

/// A source of every kind; the file with the interval of the others.
fn sources() -> Vec<DiscoverySource> {
    let text = "upstreams: [{gym: 'http://gym:11000'}, {dns: 'https://dns:8000'}, \
                {kubernetes: {service: vllm}}, {file: upstreams.yaml, every: 10s}]";
    check::check(text, &none).unwrap_or_else(|problems| panic!("{problems:?}")).sources
}

/// The values of the above, and of an upstream, that are no defaults.
const NAMED_IN_SOURCES: [&str; 5] =
    ["gpu-0:8000", "http://gym:11000", "https://dns:8000", "vllm", "upstreams.yaml"];

fn compare(file: &Path, shown: &str) {
    let expected = file.with_extension("expected");
    if std::env::var_os("VLLM_LB_BLESS").is_some() {
        std::fs::write(&expected, shown).expect("the tree can be written");
    }
    assert_eq!(shown, text(&expected), "{}", file.display());
}

#[test]
fn valid_files_mean_what_is_expected() {
    let default = all_leaves(&Config::default());
    for file in files("tests/config/valid") {
        let config =
            check::check(&text(&file), &env).unwrap_or_else(|problems| panic!("{file:?}: {problems:?}"));
        let differing = all_leaves(&config).into_iter().filter(|leaf| !default.contains(leaf));
        let shown: String = differing.map(|(path, value)| format!("{path}: {value}\n")).collect();
        assert!(!shown.contains("hunter2"), "{shown}");
        compare(&file, &shown);
    }
}

#[test]
fn invalid_files_get_every_problem_at_once() {
    let mut most = 0;
    for file in files("tests/config/invalid") {
        let lines = problems(&text(&file));
        assert!(!lines.is_empty(), "{} is accepted", file.display());
        assert!(!lines.concat().contains("hunter"), "a secret in {lines:?}");
        most = most.max(lines.len());
        compare(&file, &lines.iter().map(|line| format!("{line}\n")).collect::<String>());
    }
    assert!(most > 10, "no file shows that problems are collected");
}

#[test]
fn rendered_yaml_reads_as_the_same_configuration() {
    for file in files("tests/config/valid").into_iter().chain(files("conf/examples")) {
        let config =
            check::check(&text(&file), &env).unwrap_or_else(|problems| panic!("{file:?}: {problems:?}"));
        let yaml = render::yaml(&config);
        let again = check::check(&yaml, &none).unwrap_or_else(|problems| panic!("{problems:?} in\n{yaml}"));
        assert_eq!(render::json(&again), render::json(&config), "{}", file.display());
    }
}

// === the manual ===

#[derive(Debug, Default)]
pub struct Entry {
    pub key: String,
    pub what: String,
    pub default: String,
    pub range: Option<String>,
    pub values: Option<String>,
    pub example: String,
}

/// The entries of the manual, and its list of other names.
pub fn manual() -> (Vec<Entry>, Vec<String>) {
    let (mut entries, mut aliases) = (Vec::<Entry>::new(), Vec::new());
    let mut is_default = false;
    for line in text(&root().join("conf/lb.yaml")).lines() {
        if let (true, Some(more), Some(entry)) =
            (is_default, line.strip_prefix("#           "), entries.last_mut())
        {
            entry.default.push_str(more);
            continue;
        }
        is_default = line.starts_with("# default:");
        let Some((field, value)) = line.strip_prefix("# ").and_then(|line| line.split_once(':')) else {
            continue;
        };
        let value = value.trim().to_string();
        if field == "key" {
            entries.push(Entry { key: value, ..Entry::default() });
            continue;
        }
        if field == "alias" {
            aliases.push(value);
            continue;
        }
        let Some(entry) = entries.last_mut() else { continue };
        match field {
            "what" => entry.what = value,
            "default" => entry.default = value,
            "range" => entry.range = Some(value),
            "values" => entry.values = Some(value),
            "example" => entry.example = value,
            _ => {}
        }
    }
    (entries, aliases)
}

/// Every key that holds a value and no further keys.
fn known_keys() -> Vec<String> {
    let mut found: Vec<String> = keys::all().into_iter().map(|row| row.path).collect();
    found.sort();
    found
}

#[test]
fn the_manual_has_every_key_and_nothing_else() {
    let (entries, aliases) = manual();
    let mut documented: Vec<String> = entries.iter().map(|entry| entry.key.clone()).collect();
    documented.sort();
    assert_eq!(documented, known_keys());
    let known: Vec<String> = keys::ALIASES.iter().map(|(alias, key)| format!("{alias} = {key}")).collect();
    assert_eq!(aliases, known);
    for entry in &entries {
        assert!(
            !entry.what.is_empty() && !entry.default.is_empty() && !entry.example.is_empty(),
            "{entry:?}"
        );
    }
}

#[test]
fn the_manual_has_the_defaults_of_the_code() {
    let url = url::upstream("https://gpu-0:8000").expect("is a URL");
    let config = Config {
        upstreams: vec![UpstreamConfig::new(url)],
        sources: sources(),
        routes: vec![RouteConfig::new(Timeouts::default(), Retry::default())],
        passthrough: vec![Passthrough { path: "/sleep".into(), to: PassthroughTarget::All }],
        ..Config::default()
    };
    let leaves = by_key(&config);
    let required = [
        "listen[].tls.certificate",
        "listen[].tls.key",
        "passthrough[].path",
        "upstreams[].kubernetes.service",
        "upstreams[].url",
    ];
    for entry in manual().0 {
        if required.contains(&entry.key.as_str()) {
            assert_eq!(entry.default, "required", "{}", entry.key);
            continue;
        }
        let values: Vec<&String> =
            leaves.iter().filter(|(key, _)| *key == entry.key).map(|(_, value)| value).collect();
        assert!(!values.is_empty(), "{} is not rendered", entry.key);
        for value in values {
            // A missing name is made of the URL; a source is another kind of item.
            let value = if NAMED_IN_SOURCES.contains(&value.as_str()) { "none" } else { value };
            assert_eq!(entry.default, value, "{}", entry.key);
        }
    }
}

#[test]
fn required_keys_are_required() {
    for (text, path) in [
        ("upstreams: [{name: a}]", "upstreams[0].url: is missing"),
        ("upstreams: [{kubernetes: {port: http}}]", "upstreams[0].kubernetes.service: is missing"),
        ("passthrough: [{to: all}]", "passthrough[0].path: is missing"),
        ("listen: [{address: 'a:1', tls: {key: k}}]", "listen[0].tls.certificate: is missing"),
        ("listen: [{address: 'a:1', tls: {certificate: c}}]", "listen[0].tls.key: is missing"),
    ] {
        let lines = problems(text);
        assert!(lines.iter().any(|line| line.starts_with(path)), "{lines:?}");
    }
}

/// A file that gives this value to this key.
fn file_with(key: &str, value: &str) -> String {
    let mut text = String::new();
    let mut close = String::new();
    for part in key.split('.') {
        let open = if part.ends_with("[]") { ": [{" } else { ": {" };
        text.push_str(part.trim_end_matches("[]"));
        text.push_str(open);
        close.insert_str(0, if part.ends_with("[]") { "}]" } else { "}" });
    }
    let (text, close) = (text.trim_end_matches(": {"), close.strip_prefix('}').unwrap_or(&close));
    format!("{text}: {value}{close}\n")
}

#[test]
fn the_manual_has_the_ranges_of_the_code() {
    let outside = ["-1", "99999999999", "9999999TiB", "9999999d"];
    let mut checked = 0;
    for entry in manual().0 {
        let lines: Vec<String> = match (&entry.range, &entry.values) {
            (Some(_), _) => {
                outside.iter().flat_map(|value| problems(&file_with(&entry.key, value))).collect()
            }
            (None, Some(_)) => problems(&file_with(&entry.key, "nonsense")),
            (None, None) => continue,
        };
        let path = entry.key.replace("[]", "[0]");
        let wanted = match (&entry.range, entry.values.as_deref()) {
            (Some(range), _) => format!("is out of range: {range} (line 1)"),
            (None, Some("true, false")) => "is neither true nor false (line 1)".into(),
            (None, values) => format!("allowed are {} (line 1)", values.unwrap_or_default()),
        };
        let found =
            lines.iter().any(|line| line.starts_with(&format!("{path}: ")) && line.ends_with(&wanted));
        assert!(found, "{path}: {wanted}, but the code says {lines:?}");
        checked += 1;
    }
    assert!(checked > 10, "the manual names {checked} ranges");
}

#[test]
fn the_examples_of_the_manual_are_valid() {
    for entry in manual().0 {
        let upstreams = if entry.example.contains("upstreams:") { "" } else { "\nupstreams: [http://a]" };
        let text = format!("{}{upstreams}\n", entry.example);
        let env = |_: &str| Some("4".to_string());
        if let Err(problems) = check::check(&text, &env) {
            panic!("{}: {problems:?}", entry.key);
        }
        let first = entry.key.split(['.', '[']).next().unwrap_or_default();
        assert!(entry.example.contains(&format!("{first}:")), "{} is about something else", entry.example);
    }
}

#[test]
fn the_manual_as_shipped_starts() {
    assert_eq!(as_it_ships(&text(&root().join("conf/lb.yaml"))), Vec::<String>::new());
}

#[test]
fn suspicious_values_are_warnings() {
    let table = [
        ("[{model: a, to: c}]", vec!["routes[0].to: no upstream serves \"c\""]),
        (
            "[{model: a, to: m1}, {model: b, upstreams: [y], to: m1}]",
            vec!["routes[1].to: no upstream serves \"m1\""],
        ),
        ("[{to: m2}, {model: b}]", vec!["routes[1]: is never reached: routes[0] matches all that it does"]),
        (
            "[{model: a, header: {x: 1}}, {model: a}, {model: a, path: /b}]",
            vec!["routes[2]: is never reached: routes[1] matches all that it does"],
        ),
        ("[{model: a, path: /a}, {model: a, header: {x: 1}}, {model: a*}, {model: '*'}]", vec![]),
    ];
    let upstreams =
        "upstreams: [{url: http://x, name: x, models: [m1]}, {url: http://y, name: y, models: [m2]}]";
    for (routes, wanted) in table {
        let config = check::check(&format!("{upstreams}\nroutes: {routes}\n"), &env).expect(routes);
        let lines: Vec<String> = check::warnings(&config).iter().map(ConfigProblem::to_string).collect();
        assert_eq!(lines, wanted, "{routes}");
    }
    let open = "upstreams: [{url: http://x, models: [m1]}, http://y]\nroutes: [{to: any}]";
    assert_eq!(check::warnings(&check::check(open, &env).expect("is valid")), []);
}

#[test]
fn an_admin_listener_that_is_open_to_all_and_an_upstream_that_is_a_listener_are_warnings() {
    const DOUBLE: &str = "upstreams[1].url: http://b:80 is that of upstreams[0] too: one server counts twice";
    let table = [
        ("admin: {address: '127.0.0.1:9090'}", "http://a", vec![]),
        ("admin: {address: 'localhost:9090'}", "http://a", vec![]),
        ("admin: {address: '[::1]:9090'}", "http://a", vec![]),
        ("admin: {address: '0.0.0.0:9090', token: s}", "http://a", vec![]),
        (
            "admin: {address: '0.0.0.0:9090'}",
            "http://a",
            vec![
                "admin.address: every machine that reaches 0.0.0.0:9090 may change and stop upstreams: set \
                 admin.token or VLLM_LB_ADMIN_TOKEN",
            ],
        ),
        ("listen: '0.0.0.0:8000'", "http://gpu-0:8000", vec![]),
        ("listen: '127.0.0.1:8000'", "http://127.0.0.1:18000", vec![]),
        (
            "listen: '0.0.0.0:8000'",
            "http://localhost:8000",
            vec!["upstreams[0].url: http://localhost:8000 is a listener of this balancer, and no vLLM"],
        ),
        (
            "listen: '[::]:8000'",
            "http://127.0.0.1:9090",
            vec!["upstreams[0].url: http://127.0.0.1:9090 is a listener of this balancer, and no vLLM"],
        ),
        // The two of one server each believed in its whole cache.
        ("", "http://b', {url: 'http://b', name: two}, 'http://a", vec![DOUBLE]),
    ];
    for (keys, upstream, wanted) in table {
        let text = format!("upstreams: ['{upstream}']\n{keys}\n");
        let config = check::check(&text, &env).unwrap_or_else(|problems| panic!("{keys}: {problems:?}"));
        let lines: Vec<String> = check::warnings(&config).iter().map(ConfigProblem::to_string).collect();
        assert_eq!(lines, wanted, "{keys} {upstream}");
    }
}

/// With a source, neither the names nor the models are known in advance.
#[test]
fn names_that_may_be_discovered_are_warnings() {
    let upstreams = "upstreams: [{url: http://x, name: x, models: [m1]}, {gym: http://g}]";
    let routes = [
        "{model: a, to: any}",
        "{model: b, upstreams: [x, z], to: m1}",
        "{model: c, upstreams: [z], to: m}",
        "{model: d, upstreams: [x], to: m}",
        "{model: e, upstreams: ['gym http://g:80', x], to: m1}",
    ];
    let routes = routes.join(", ");
    let text = format!("{upstreams}\nroutes: [{routes}]\npassthrough: [{{path: /a, to: y}}]\n");
    let config = check::check(&text, &env).expect("is valid");
    let lines: Vec<String> = check::warnings(&config).iter().map(ConfigProblem::to_string).collect();
    let wanted = [
        "routes[1].upstreams[1]: no upstream is named \"z\" unless one is discovered",
        "routes[2].upstreams[0]: no upstream is named \"z\" unless one is discovered",
        "passthrough[0].to: no upstream is named \"y\" unless one is discovered",
        "routes[3].to: no upstream serves \"m\"",
    ];
    assert_eq!(lines, wanted);
}

#[test]
fn the_manual_as_shipped_is_the_default_with_two_upstreams() {
    let shipped = check::check(&text(&root().join("conf/lb.yaml")), &none).expect("the manual is valid");
    assert_eq!(shipped.upstreams.len(), 2);
    let config = Config { upstreams: shipped.upstreams.clone(), ..Config::default() };
    assert_eq!(render::json(&shipped), render::json(&config));
}

#[test]
fn the_shipped_examples_are_valid() {
    for file in files("conf/examples") {
        let env = |_: &str| Some("x".to_string());
        if let Err(problems) = check::check(&text(&file), &env) {
            panic!("{}: {problems:?}", file.display());
        }
    }
}

/// With every key at another value than its default, nothing renders as the default. A key that the file does
/// not have is set by its example in the manual: see `the_example_of_every_key_sets_the_key`.
#[test]
fn every_key_is_read() {
    let everything = text(&root().join("tests/config/valid/everything.yaml"));
    let config = check::check(&everything, &none).expect("is valid");
    let url = url::upstream("https://default:1").expect("is a URL");
    let default = Config {
        upstreams: vec![UpstreamConfig::new(url)],
        sources: vec![gym("https://default:2"), service("default")],
        routes: vec![RouteConfig::new(Timeouts::default(), Retry::default())],
        passthrough: vec![Passthrough { path: "/".into(), to: PassthroughTarget::All }],
        listen: vec![Listen {
            tls: Some(ListenTls { certificate: "c".into(), key: "k".into() }),
            ..Config::default().listen.remove(0)
        }],
        ..Config::default()
    };
    let (read, default) = (by_key(&config), by_key(&default));
    let names = |key: &str| everything.contains(&format!("{}:", key.rsplit('.').next().unwrap_or(key)));
    for key in known_keys().into_iter().filter(|key| names(key)) {
        let find = |leaves: &[(String, String)]| -> Vec<String> {
            leaves.iter().filter(|(leaf, _)| *leaf == key).map(|(_, value)| value.clone()).collect()
        };
        let (read, default) = (find(&read), find(&default));
        assert!(!read.is_empty() && read.len() == default.len(), "{key}: {read:?}, {default:?}");
        assert!(!read.iter().any(|value| default.contains(value)), "{key} is not read: {read:?}");
    }
}

proptest! {
    /// A file that was damaged anywhere gives a configuration or problems, and never a panic.
    #[test]
    fn arbitrary_files_never_panic(
        at in 0..2000_usize,
        cut in 0..20_usize,
        insert in "[\\[\\]{}:,&*<$!|>'\"#\n -]{0,4}",
    ) {
        for file in ["tests/config/valid/everything.yaml", "tests/config/valid/merge.yaml"] {
            let text: Vec<char> = text(&root().join(file)).chars().collect();
            let at = at % text.len();
            let after = (at + cut).min(text.len());
            let (start, end) = (text[..at].iter().copied(), text[after..].iter().copied());
            let damaged: String = start.chain(insert.chars()).chain(end).collect();
            for problem in problems(&damaged) {
                prop_assert!(!problem.contains('\n'), "{:?}", problem);
            }
        }
    }
}
