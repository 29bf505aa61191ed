//! The real binary: what it prints, and the code it ends with, when it is only asked to check.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output};

struct Ran {
    code: Option<i32>,
    stdout: String,
    /// Standard output and error together: where a message goes is main's to choose.
    all: String,
}

/// Runs the binary with nothing in its environment but these variables.
fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-lb"));
    let Output { status, stdout, stderr } = command
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied())
        .output()
        .expect("the binary can be started");
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    Ran { code: status.code(), all: format!("{stdout}{stderr}"), stdout: stdout.into_owned() }
}

fn in_tree(path: &str) -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path).display().to_string()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(text.as_bytes()).expect("written");
    file
}

#[test]
fn a_good_file_is_ok() {
    for path in ["conf/lb.yaml", "conf/examples/two-servers.yaml", "conf/examples/models.yaml"] {
        let ran = run(&["-c", &in_tree(path), "-t"], &[]);
        assert_eq!((ran.code, ran.all.contains("configuration ok")), (Some(0), true), "{}", ran.all);
    }
    assert_eq!(run(&["--test", "http://gpu-0:8000"], &[]).code, Some(0));
    assert_eq!(run(&["-t", "--demo"], &[]).code, Some(0));
}

/// A start failed on what the test of the same configuration had passed.
#[test]
fn files_that_the_configuration_names_are_read() {
    let made = || rcgen::generate_simple_self_signed(["lb.test".to_string()]).expect("it is made");
    let (one, other) = (made(), made());
    let (certificate, key) = (file(&one.cert.pem()), file(&one.signing_key.serialize_pem()));
    let foreign = file(&other.signing_key.serialize_pem());
    let path = |file: &tempfile::NamedTempFile| file.path().display().to_string();
    let listen = |certificate: &str, key: &str| {
        let tls = format!("{{certificate: {certificate}, key: {key}}}");
        format!("listen: [{{address: 127.0.0.1:0, tls: {tls}}}]\nupstreams: [http://a]\n")
    };
    let authority = |ca: &str| format!("upstreams: [{{url: https://a, tls: {{ca: {ca}}}}}]\n");
    let (certificate, key) = (path(&certificate), path(&key));
    for (text, problem) in [
        (listen(&certificate, &key), None),
        (authority(&certificate), None),
        (listen("/missing.pem", &key), Some("listen: tls of 127.0.0.1:0: /missing.pem: ")),
        (listen(&certificate, &path(&foreign)), Some("listen: tls of 127.0.0.1:0: ")),
        (listen(&certificate, "/dev/null"), Some("/dev/null: it is no file")),
        (authority("/missing.pem"), Some("tls.ca /missing.pem: ")),
        (authority(&key), Some("no certificate in the file")),
    ] {
        let ran = run(&["-t", "-c", &path(&file(&text))], &[]);
        let code = if problem.is_some() { 64 } else { 0 };
        assert_eq!(ran.code, Some(code), "{text}: {}", ran.all);
        assert!(ran.all.contains(problem.unwrap_or("configuration ok")), "{text}: {}", ran.all);
    }
}

#[test]
fn a_bad_file_shows_every_problem_and_ends_with_64() {
    let ran = run(&["-t", "-c", &in_tree("tests/config/invalid/ranges.yaml")], &[]);
    assert_eq!(ran.code, Some(64), "{}", ran.all);
    let expected =
        std::fs::read_to_string(in_tree("tests/config/invalid/ranges.expected")).expect("in the tree");
    assert!(expected.lines().count() > 10);
    for line in expected.lines() {
        assert!(ran.all.contains(line), "{line} is missing in\n{}", ran.all);
    }
    assert!(!ran.all.contains("configuration ok"));
}

#[test]
fn the_process_exits_on_an_invalid_configuration() {
    for arguments in [&[][..], &["gpu-0:8000"], &["-c", "/nonexistent/lb.yaml"], &["-l", "x", "http://a"]] {
        let ran = run(arguments, &[]);
        assert_eq!(ran.code, Some(64), "{arguments:?}: {}", ran.all);
        assert!(!ran.all.is_empty());
    }
}

#[test]
fn a_bad_redis_url_is_shown_without_its_password() {
    let bad = "redis://user:hunter2@host:port/0";
    for (arguments, variables) in [
        (&["http://a", "-R", bad][..], &[][..]),
        (&["http://a", "--redis=http://u:hunter2@h"], &[]),
        (&["http://a"], &[("VLLM_LB_REDIS", bad)]),
        (&["http://a"], &[("VLLM_PXY_REDIS", bad)]),
    ] {
        let ran = run(arguments, variables);
        assert_eq!(ran.code, Some(64), "{}", ran.all);
        assert!(!ran.all.contains("hunter2") && ran.all.contains("***@h"), "{}", ran.all);
    }
}

#[test]
fn a_mistyped_flag_does_not_print_a_secret() {
    let ran = run(&["http://a", "--redsi=redis://u:hunter2@h", "--demo", "redis://u:hunter2@h"], &[]);
    assert!(ran.code == Some(64) && !ran.all.contains("hunter2"), "{}", ran.all);
    let ran = run(&["--demo", "redis://u:hunter2@h"], &[]);
    assert!(ran.code == Some(64) && !ran.all.contains("hunter2"), "{}", ran.all);
}

#[test]
fn the_environment_names_the_file_and_flags_override_it() {
    let bad = file("upstreams: [http://a]\nlisten: nowhere\n");
    let path = bad.path().to_str().expect("is UTF-8");
    let variables = [("VLLM_LB_CONFIG", path)];
    assert_eq!(run(&["-t"], &variables).code, Some(64));
    assert_eq!(run(&["-t", "-c", &in_tree("conf/lb.yaml")], &variables).code, Some(0));
    let variables = [("VLLM_LB_LISTEN", "nowhere")];
    assert_eq!(run(&["-t", "http://a"], &variables).code, Some(64));
    assert_eq!(run(&["-t", "http://a", "-l", "127.0.0.1:0"], &variables).code, Some(0));
}

#[test]
fn variables_are_filled_in() {
    let file = file("upstreams: ['http://${GPU}:${PORT:-8000}']\n");
    let path = file.path().to_str().expect("is UTF-8");
    assert_eq!(run(&["-t", "-c", path], &[("GPU", "gpu-0")]).code, Some(0));
    let ran = run(&["-t", "-c", path], &[]);
    assert!(
        ran.code == Some(64) && ran.all.contains("upstreams[0]: the variable GPU is not set"),
        "{}",
        ran.all
    );
}

#[test]
fn help_and_version_exit_with_0_and_usage_errors_with_64() {
    let help = run(&["--help"], &[]);
    assert_eq!(help.code, Some(0));
    for wanted in
        ["--config", "--listen", "--admin", "--redis", "--verbose", "--quiet", "--log-format", "--test"]
    {
        assert!(help.stdout.contains(wanted), "{wanted}: {}", help.stdout);
    }
    for wanted in
        ["--upgrade", "--demo", "engine", "UPSTREAM_URL", "Examples:", "VLLM_LB_VERBOSITY", "VLLM_PXY_REDIS"]
    {
        assert!(help.stdout.contains(wanted), "{wanted}: {}", help.stdout);
    }
    let version = run(&["--version"], &[]);
    assert_eq!((version.code, version.stdout), (Some(0), format!("vllm-lb {}\n", env!("CARGO_PKG_VERSION"))));
    for arguments in [&["--nonsense"][..], &["-c"], &["--demo", "http://a"], &["engine", "--nonsense"]] {
        assert_eq!(run(arguments, &[]).code, Some(64), "{arguments:?}");
    }
}

#[test]
fn sources_that_need_another_build_are_rejected() {
    let file = file("upstreams: [{kubernetes: {service: vllm}}]\n");
    let path = file.path().to_str().expect("is UTF-8");
    if cfg!(feature = "kubernetes") {
        assert_eq!(run(&["-c", path, "-t"], &[]).code, Some(0));
        return;
    }
    for arguments in [&["-t"][..], &[]] {
        let ran = run(&[&["-c", path], arguments].concat(), &[]);
        let wanted = "upstreams: kubernetes vllm: this vllm-lb was built without the feature kubernetes";
        assert!(ran.code == Some(64) && ran.all.contains(wanted), "{}", ran.all);
    }
}

#[test]
fn a_test_checks_listed_files_beside_the_configuration() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write =
        |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("it is written");
    write("lb.yaml", "upstreams: [{file: listed/gpus.yaml}]\n");
    std::fs::create_dir(folder.path().join("listed")).expect("a folder is made");
    let path = folder.path().join("lb.yaml");
    let test = || run(&["-t", "-c", path.to_str().expect("is UTF-8")], &[]);
    let ran = test();
    assert!(ran.code == Some(0) && ran.all.contains("listed/gpus.yaml: cannot read"), "{}", ran.all);
    write("listed/gpus.yaml", "- http://gpu-0:8000\n- url: http://gpu-1:8000\n  wieght: 2\n- gpu-2\n");
    let ran = test();
    for wanted in [
        "listed/gpus.yaml: [1].wieght: unknown key: did you mean \"weight\"? (line 3)",
        "listed/gpus.yaml: [2]: \"gpu-2\" has no scheme",
    ] {
        assert!(ran.code == Some(64) && ran.all.contains(wanted), "{}", ran.all);
    }
    write("listed/gpus.yaml", "# none yet\n");
    let ran = test();
    assert!(ran.code == Some(64) && ran.all.contains("listed/gpus.yaml: lists no upstream"), "{}", ran.all);
    write("listed/gpus.yaml", "[http://gpu-0:8000]\n");
    assert_eq!(test().code, Some(0));
}

/// Two requests with a block in common, and one of another kind.
const TRACE: &str = concat!(
    "{\"timestamp\": 0, \"input_length\": 1100, \"output_length\": 10, \"hash_ids\": [0, 1, 2]}\n",
    "{\"timestamp\": 3000, \"input_length\": 1300, \"output_length\": 20, \"hash_ids\": [0, 1, 3]}\n",
    "{\"timestamp\": 9000, \"input_length\": 600, \"output_length\": 1, \"hash_ids\": [7, 8]}\n",
);

#[test]
fn a_simulation_prints_one_row_a_policy_and_needs_no_upstreams() {
    let trace = file(TRACE);
    let path = trace.path().to_str().expect("is UTF-8");
    let ran = run(&["simulate", "--trace", path, "--upstreams", "2"], &[("VLLM_LB_CONFIG", "gone")]);
    assert_eq!((ran.code, ran.stdout.lines().count()), (Some(0), 11), "{}", ran.all);
    assert!(ran.stdout.starts_with("policy"), "{}", ran.all);
    let some = ["simulate", "--trace", path, "--policies", "work,oracle", "--json"];
    let ran = run(&[&some[..], &["--balancers", "4", "--interval", "never"]].concat(), &[]);
    let rows: Vec<serde_json::Value> =
        ran.stdout.lines().map(|row| serde_json::from_str(row).expect("is JSON")).collect();
    assert_eq!((ran.code, rows.len()), (Some(0), 2), "{}", ran.all);
    assert_eq!((&rows[1]["policy"], &rows[1]["requests"]), (&"oracle".into(), &3.into()));
    let ttft = rows[0]["ttft_mean"].as_f64().expect("a number");
    assert!((0.05..0.5).contains(&ttft), "{ttft}");
}

#[test]
fn a_simulation_explains_invalid_arguments() {
    let bad = file(&format!("{TRACE}{{}}\n"));
    let path = bad.path().to_str().expect("is UTF-8");
    for (arguments, problem) in [
        (&["simulate"][..], "--trace"),
        (&["simulate", "--trace", path], "line 4: missing field `timestamp`"),
        (&["simulate", "--trace", "/nonexistent/trace"], "cannot read /nonexistent/trace"),
        (&["simulate", "--trace", path, "--shape", "rag"], "cannot be used with"),
        (&["simulate", "--shape", "cats"], "allowed are agents, rag"),
        (&["simulate", "--shape", "rag", "--policies", "work,best"], "allowed are round-robin"),
        (&["simulate", "--shape", "rag", "--upstreams", "0"], "--upstreams"),
        (&["simulate", "--shape", "rag", "--balancers", "65"], "--balancers"),
        (&["simulate", "--shape", "rag", "--interval", "20"], "is not a duration"),
        (&["simulate", "--shape", "rag", "--interval", "0"], "out of range"),
        (&["simulate", "--shape", "rag", "--rate", "0"], "out of range"),
        (&["simulate", "--shape", "rag", "--speed", "fast"], "is not a number"),
        (&["simulate", "--shape", "rag", "--cache-tokens", "100"], "out of range"),
    ] {
        let ran = run(arguments, &[]);
        assert_eq!(ran.code, Some(64), "{arguments:?}: {}", ran.all);
        assert!(ran.all.contains(problem) && ran.stdout.is_empty(), "{arguments:?}: {}", ran.all);
    }
    let help = run(&["simulate", "--help"], &[]);
    assert!(help.code == Some(0) && help.stdout.contains("threshold-switch"), "{}", help.all);
}

/// Two turns of a session, a call of another one, and a call that was refused.
fn captured() -> String {
    let call = |session: &str, second: u32, prompt: std::ops::Range<u32>, answer: std::ops::Range<u32>| {
        serde_json::json!({
            "session_id": session, "timestamp": 1_760_000_000 + second, "latency_ms": 500.5, "status": 200,
            "prompt_token_ids": prompt.collect::<Vec<_>>(),
            "completion_token_ids": answer.collect::<Vec<_>>(),
            "messages": [{"role": "user", "content": "x"}], "raw_request": {"model": "m"},
        })
    };
    let mut refused = call("a", 9, 0..100, 0..0);
    refused["status"] = 500.into();
    let calls =
        [call("a", 0, 0..320, 320..340), call("b", 1, 0..160, 900..910), call("a", 5, 0..480, 0..9), refused];
    calls.map(|call| format!("{call}\n")).concat()
}

#[test]
fn a_simulation_replays_captured_calls() {
    let trace = file(&captured());
    let path = trace.path().to_str().expect("is UTF-8");
    let ran = run(&["simulate", "--trace", path, "--upstreams", "2", "--policies", "work", "--json"], &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.all);
    assert!(ran.all.contains("1 calls without an answer are left out"), "{}", ran.all);
    let row: serde_json::Value = serde_json::from_str(&ran.stdout).expect("one row of JSON and nothing else");
    assert_eq!((&row["requests"], &row["refused"]), (&3.into(), &0.into()));
    // Ten blocks of the second session or of the first, and the whole first turn of the second one.
    let hits = row["hits"].as_f64().expect("a number");
    assert!((340.0 / 960.0 - 0.02..=500.0 / 960.0).contains(&hits), "{hits}");
    let bad = file(&format!("{}{{\"session_id\": \"a\"}}\n", captured()));
    let ran = run(&["simulate", "--trace", bad.path().to_str().expect("is UTF-8")], &[]);
    assert!(ran.code == Some(64) && ran.all.contains("line 5: missing field `timestamp`"), "{}", ran.all);
}

#[test]
fn an_export_exits_with_the_code_of_its_failure() {
    for (arguments, code, text) in [
        (&["traces"][..], 64, "export"),
        (&["traces", "export", "--since", "x"], 64, "is not a number"),
        (&["traces", "export", "--store", "memory"], 64, "sqlite:PATH"),
        (&["traces", "export", "--admin", "http://127.0.0.1:1"], 1, "http://127.0.0.1:1"),
        (&["traces", "export", "--store", "sqlite:/nonexistent/traces.db"], 1, "/nonexistent/traces.db"),
        (&["traces", "export", "--help"], 0, "VLLM_LB_ADMIN_TOKEN"),
    ] {
        let ran = run(arguments, &[]);
        assert_eq!(ran.code, Some(code), "{arguments:?}: {}", ran.all);
        assert!(ran.all.contains(text), "{arguments:?}: {}", ran.all);
    }
}
