//! The source of each setting, without a process.

use std::ffi::OsString;

use super::*;
use crate::config::secret::Secret;
use crate::config::types::{ListenAddress, UpstreamConfig};

const FILE: &str = "
listen: 127.0.0.1:1
admin: {address: '127.0.0.1:2'}
upstreams: [http://file]
log: {level: debug, format: yaml}
";

/// Loads a command line (without the program's name) with some variables and `FILE` as `lb.yaml`.
fn run(line: &str, variables: &[(&str, &str)]) -> Result<Loaded, String> {
    let words = std::iter::once("vllm-lb").chain(line.split_whitespace()).map(OsString::from);
    let args = crate::cli::parse(words).map_err(|ending| ending.text)?;
    let env = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
    let read = |path: &Path| match path.to_str() {
        Some("lb.yaml") => Ok(FILE.to_string()),
        Some("bad.yaml") => Ok("threads: many\nupstreams: [ftp://a]\n".into()),
        Some("device.yaml") => Ok("upstreams: [{file: /dev/zero}, {file: gone.yaml}]\n".into()),
        _ => Err(io::Error::new(io::ErrorKind::NotFound, "no such file")),
    };
    load(args, &env, &read).map_err(|problems| problems.to_string())
}

fn config(line: &str, variables: &[(&str, &str)]) -> Config {
    run(line, variables).unwrap_or_else(|problems| panic!("{line}: {problems}")).config
}

fn problems(line: &str, variables: &[(&str, &str)]) -> String {
    run(line, variables).map(|_| ()).expect_err(line)
}

fn tcp(address: &str) -> ListenAddress {
    ListenAddress::Tcp(address.into())
}

#[test]
fn urls_alone_are_a_complete_set_up() {
    let loaded = run("http://gpu-0:8000 http://gpu-1:8000/v1", &[]).expect("is complete");
    let names: Vec<_> = loaded.config.upstreams.iter().map(|upstream| upstream.name.as_str()).collect();
    assert_eq!(names, ["gpu-0:8000", "gpu-1:8000"]);
    assert_eq!(loaded.config.listen[0].address, tcp("0.0.0.0:8000"));
    assert!(matches!(loaded.mode, LoadMode::Serve) && loaded.demo.is_none() && loaded.warnings.is_empty());
}

#[test]
fn flags_go_before_environment_and_environment_before_file() {
    let variables = [
        ("VLLM_LB_CONFIG", "lb.yaml"),
        ("VLLM_LB_LISTEN", "127.0.0.1:3, [::1]:3"),
        ("VLLM_LB_ADMIN", "127.0.0.1:4"),
        ("VLLM_LB_ADMIN_TOKEN", "from-env"),
        ("VLLM_LB_LOGFORMAT", "json"),
        ("VLLM_LB_VERBOSITY", "Warning"),
    ];
    let file = config("-c lb.yaml", &[]);
    assert_eq!((&file.listen[0].address, &file.admin.address), (&tcp("127.0.0.1:1"), &tcp("127.0.0.1:2")));
    assert_eq!((file.log.level, file.log.format), (LogLevel::Debug, Some(LogFormat::Yaml)));

    let env = config("", &variables);
    let listen: Vec<_> = env.listen.iter().map(|listen| listen.address.clone()).collect();
    assert_eq!((listen, env.admin.address), (vec![tcp("127.0.0.1:3"), tcp("[::1]:3")], tcp("127.0.0.1:4")));
    assert_eq!((env.log.level, env.log.format), (LogLevel::Warning, Some(LogFormat::Json)));
    assert_eq!(env.upstreams[0].name, "file:80");
    assert_eq!((file.admin.token, env.admin.token), (None, Some(Secret::new("from-env"))));

    let flags = config("-l 127.0.0.1:5 -l 127.0.0.1:6 -a 127.0.0.1:7 -L txt -v http://flag", &variables);
    assert_eq!((flags.listen.len(), flags.admin.address), (2, tcp("127.0.0.1:7")));
    assert_eq!((flags.log.level, flags.log.format), (LogLevel::Info, Some(LogFormat::Txt)));
    let names: Vec<_> = flags.upstreams.iter().map(|UpstreamConfig { name, .. }| name.as_str()).collect();
    assert_eq!(names, ["flag:80"], "the command line replaces the file's list");
}

#[test]
fn verbosity_goes_in_steps_and_stops_at_the_ends() {
    let table = [
        ("http://a", "", LogLevel::Info),
        ("http://a -v", "", LogLevel::Debug),
        ("http://a -vvv", "", LogLevel::Loud),
        ("http://a -vvvvvvvvv", "", LogLevel::Loud),
        ("http://a -q", "", LogLevel::Warning),
        ("http://a -qqqqqqq", "", LogLevel::Quiet),
        ("http://a -v -q", "", LogLevel::Info),
        ("http://a", "Loudest", LogLevel::Loud),
        ("http://a", "1", LogLevel::Loud),
        ("http://a", "0", LogLevel::Error),
        ("http://a", "w", LogLevel::Warning),
        ("http://a -q", "Verbose", LogLevel::Debug),
    ];
    for (line, variable, level) in table {
        for name in ["VLLM_LB_VERBOSITY", "VLLM_PXY_VERBOSITY"] {
            assert_eq!(config(line, &[(name, variable)]).log.level, level, "{line} {variable}");
        }
    }
}

#[test]
fn a_bad_variable_of_the_log_is_a_warning_and_a_bad_flag_a_problem() {
    let variables = [("VLLM_PXY_VERBOSITY", "xtreme"), ("VLLM_PXY_LOGFORMAT", "xml")];
    let loaded = run("http://a", &variables).expect("starts");
    assert_eq!((loaded.config.log.level, loaded.config.log.format), (LogLevel::Info, None));
    assert_eq!(loaded.warnings.len(), 2, "{:?}", loaded.warnings);
    assert!(problems("http://a -L xml", &[]).starts_with("--log-format: \"xml\" is unknown"));
    for (format, wanted) in [("yml", LogFormat::Yaml), ("yaml", LogFormat::Yaml), ("j", LogFormat::Json)] {
        assert_eq!(config(&format!("http://a -L {format}"), &[]).log.format, Some(wanted));
    }
}

#[test]
fn the_newer_name_of_a_variable_wins_and_an_empty_one_is_none() {
    let both = [("VLLM_PXY_LOGFORMAT", "txt"), ("VLLM_LB_LOGFORMAT", "json")];
    assert_eq!(config("http://a", &both).log.format, Some(LogFormat::Json));
    let empty = [("VLLM_PXY_LOGFORMAT", "txt"), ("VLLM_LB_LOGFORMAT", ""), ("VLLM_LB_REDIS", "")];
    assert_eq!(config("http://a", &empty).log.format, Some(LogFormat::Txt));
}

#[test]
fn redis_comes_from_the_flag_or_a_variable() {
    let shown = |config: Config| config.redis.map(|url| url.to_string());
    assert_eq!(shown(config("http://a", &[])), None);
    let local = Some("redis://localhost:6379/0".to_string());
    assert_eq!(shown(config("http://a -R local", &[("VLLM_LB_REDIS", "redis://h")])), local);
    let variables = [("VLLM_PXY_REDIS", "redis://u:hunter2@h:42/2")];
    assert_eq!(shown(config("http://a", &variables)), Some("redis://u:***@h:42/2".into()));
    let shown = problems("http://a -R http://u:hunter2@h", &[]);
    assert!(shown.starts_with("--redis: \"http://***@h\" has an unknown scheme"), "{shown}");
}

#[test]
fn all_problems_of_all_sources_come_at_once() {
    let shown = problems("-c bad.yaml -l 1 -a 2 -L xml -R x -u", &[]);
    let places: Vec<_> = shown.lines().map(|line| line.split(':').next().unwrap_or_default()).collect();
    let wanted = ["threads", "upstreams[0]", "--log-format", "--listen", "--admin", "--redis"];
    assert_eq!(places, wanted, "{shown}");
}

#[test]
fn a_file_that_cannot_be_read_is_the_one_problem() {
    assert_eq!(problems("-c gone.yaml", &[]), "--config: cannot read \"gone.yaml\": no such file\n");
    let shown = problems("", &[("VLLM_LB_CONFIG", "gone.yaml")]);
    assert!(shown.starts_with("VLLM_LB_CONFIG: cannot read"), "{shown}");
}

/// Regression: the test of a configuration waited for ever where a listed file was a pipe.
#[test]
fn a_listed_file_that_is_no_file_is_not_opened() {
    let shown = problems("-t -c device.yaml", &[]);
    assert_eq!(shown, "/dev/zero: cannot read \"/dev/zero\": it is no file\n");
    assert!(run("-c device.yaml", &[]).is_ok(), "a balancer starts without it");
}

#[test]
fn without_upstreams_it_says_what_to_do() {
    let shown = problems("", &[]);
    assert!(shown.contains("vllm-lb http://gpu-0:8000") && shown.contains("--demo"), "{shown}");
}

#[test]
fn upstreams_of_the_command_line_are_checked() {
    let shown = problems("http://a http://a/v1 gpu-0:8000", &[]);
    assert_eq!(shown.lines().count(), 2, "{shown}");
    assert!(shown.contains("UPSTREAM_URL: http://a:80 is given twice"), "{shown}");
}

#[test]
fn a_misspelt_command_is_no_upstream_without_a_scheme() {
    let shown = problems("statsu", &[]);
    assert!(shown.contains("\"statsu\" is neither a command"), "{shown}");
    assert!(problems("gpu-0:8000", &[]).contains("has no scheme"));
}

#[test]
fn demo_stands_in_for_all_upstreams() {
    let loaded = run("-c lb.yaml --demo 3", &[]).expect("needs no upstreams");
    assert_eq!((loaded.demo, loaded.config.upstreams.len()), (Some(3), 0));
}

#[test]
fn modes() {
    assert!(matches!(run("-t http://a", &[]).map(|loaded| loaded.mode), Ok(LoadMode::Test)));
    let upgrade = |line: &str| run(line, &[]).map(|loaded| loaded.upgrade);
    assert_eq!((upgrade("http://a -u"), upgrade("http://a")), (Ok(true), Ok(false)));
    let engine =
        run("engine -v", &[("VLLM_LB_REDIS", "nonsense"), ("VLLM_LB_CONFIG", "gone")]).expect("no upstreams");
    assert!(matches!(engine.mode, LoadMode::Engine(_)));
    assert_eq!(engine.config.log.level, LogLevel::Debug);
}
