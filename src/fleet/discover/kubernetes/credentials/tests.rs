//! What token files and credential plugins give, and what becomes of a plugin that does not end.

use std::collections::HashMap;
use std::path::PathBuf;

use kube::config::AuthProviderConfig;

use super::*;
use crate::config::types::KubernetesService;
use crate::fleet::discover::kubernetes::api::SliceApi;
use crate::fleet::discover::source::{FailureReason, SourceFailure};

/// A plugin that runs a script.
fn plugin(script: &str) -> ExecConfig {
    ExecConfig {
        api_version: Some("client.authentication.k8s.io/v1".into()),
        command: Some("sh".into()),
        args: Some(vec!["-c".into(), script.into()]),
        ..ExecConfig::default()
    }
}

fn map<const COUNT: usize>(pairs: [(&str, &str); COUNT]) -> HashMap<String, String> {
    pairs.map(|(key, value)| (key.to_string(), value.to_string())).into()
}

fn reason(failure: ApiFailure) -> String {
    match failure {
        ApiFailure::Unreached(why) => why,
        other => panic!("{other:?}"),
    }
}

/// Whether the process runs: one that has ended and is not waited for has the state `Z`.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with(['Z', 'X']))
}

/// Looks again and again, for at most ten seconds.
async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what}: it never is");
}

#[test]
fn reads_what_a_plugin_prints() {
    let parse = |status: &str| {
        PluginCredential::parse(format!(r#"{{"kind": "ExecCredential", "status": {status}}}"#).as_bytes())
    };
    let found = parse(r#"{"token": "t", "expirationTimestamp": "2030-01-01T00:00:00Z"}"#).expect("is valid");
    assert_eq!((found.token.as_deref(), found.expires().is_some()), (Some("t"), true));
    let both = r#"{"clientCertificateData": "certificate", "clientKeyData": "key"}"#;
    let mut auth = AuthInfo::default();
    assert_eq!(parse(both).expect("is valid").put_into(&mut auth), None);
    assert_eq!(auth.client_certificate_data, Some(STANDARD.encode("certificate")));
    assert!(auth.client_key_data.is_some() && auth.token.is_none());
    let yaml = "kind: ExecCredential\nstatus:\n  token: t\n  expirationTimestamp: 2030-01-01T00:00:00Z\n";
    let found = PluginCredential::parse(yaml.as_bytes()).expect("is valid");
    assert_eq!((found.token.as_deref(), found.expires().is_some()), (Some("t"), true));
    for status in [
        "{}",
        "null",
        r#"{"token": ""}"#,
        r#"{"token": 5}"#,
        r#"{"clientKeyData": "key"}"#,
        r#"{"token": "t", "expirationTimestamp": "soon"}"#,
    ] {
        assert!(parse(status).is_none(), "{status}");
    }
    for output in ["", "[hunter2", "token", "\u{0}"] {
        assert!(PluginCredential::parse(output.as_bytes()).is_none(), "{output:?}");
    }
}

#[test]
fn a_credential_is_due_before_it_expires() {
    let due = |expires: Timestamp| {
        let credential = PluginCredential {
            token: Some("t".into()),
            client_certificate_data: None,
            client_key_data: None,
            expiration_timestamp: Some(expires.to_string()),
        };
        credential.put_into(&mut AuthInfo::default()).expect("it expires").saturating_duration_since(now())
    };
    let left = due(Timestamp::now() + Duration::from_secs(3600)).as_secs();
    assert!((3580..=3590).contains(&left), "{left}");
    assert_eq!(due(Timestamp::now() - Duration::from_secs(3600)), Duration::ZERO);
}

#[tokio::test]
async fn a_plugin_gets_its_variables_and_is_waited_for() {
    let script = r#"info=$(echo $KUBERNETES_EXEC_INFO | tr -dc '[:alnum:].')
        printf '{"status": {"token": "%s"}}' "$WORD-$info"
        exec >&-; sleep 0.1"#;
    let exec = ExecConfig { env: Some(vec![map([("name", "WORD"), ("value", "one")])]), ..plugin(script) };
    let found = answer(&exec, PLUGIN_TIMEOUT).await.expect("it answers");
    let info = "kindExecCredentialapiVersionclient.authentication.k8s.iov1specinteractivefalse";
    assert_eq!(found.token, Some(format!("one-{info}")));
}

#[tokio::test]
async fn a_plugin_that_fails_is_named_without_what_it_printed() {
    let missing = ExecConfig { command: Some("/nowhere/plugin".into()), ..plugin("") };
    let terminal = ExecConfig { interactive_mode: Some(ExecInteractiveMode::Always), ..plugin("true") };
    let endless = plugin("yes hunter2");
    for (exec, wanted) in [
        (plugin("echo hunter2; exit 3"), "the credential plugin failed: exit status: 3"),
        (plugin("echo [hunter2"), "the credential plugin printed no valid ExecCredential"),
        (missing, "the credential plugin cannot be run: No such file"),
        (
            ExecConfig { command: None, ..plugin("") },
            "the credential plugin cannot be run: it names no command",
        ),
        (endless, "the credential plugin cannot be run: it printed more than 1048576 bytes"),
        (terminal, "the credential plugin requires a terminal"),
    ] {
        let why = reason(answer(&exec, PLUGIN_TIMEOUT).await.err().expect(wanted));
        assert!(why.starts_with(wanted) && !why.contains("hunter2"), "{why}");
    }
}

/// A plugin that waits for room in the pipe would not end.
#[tokio::test]
async fn a_plugin_may_write_any_amount_to_its_standard_error() {
    let credential = r#"echo '{"status": {"token": "t"}}'"#;
    let little = format!("printf first >&2; {credential}; exec >&-; sleep 0.1; printf ' last' >&2");
    let much = format!("head -c 1000000 /dev/zero >&2; {credential}");
    for (script, wanted) in [(little, b"first last".to_vec()), (much, vec![0; MAX_ERROR_BYTES + 1])] {
        let (mut process, output) = PluginProcess::start(&plugin(&script)).expect("it starts");
        let ran = tokio::time::timeout(PLUGIN_TIMEOUT, process.run(output)).await.expect("it ends");
        let (printed, status) = ran.expect("its output can be read");
        assert!(status.success() && PluginCredential::parse(&printed).is_some());
        assert!(process.errors == wanted, "{} bytes", process.errors.len());
    }
    assert_eq!(shown(b"why".to_vec()), b"why\n");
    assert_eq!(shown(b"why\n".to_vec()), b"why\n");
    let cut = shown(vec![b'x'; MAX_ERROR_BYTES + 1]);
    assert_eq!((&cut[..MAX_ERROR_BYTES], &cut[MAX_ERROR_BYTES..]), (&[b'x'; MAX_ERROR_BYTES][..], ERROR_CUT));
}

/// A process that outlives the plugin may hold its standard error, as a daemon that the plugin starts does.
#[tokio::test]
async fn a_plugin_ends_although_its_standard_error_is_held() {
    let script = r#"sleep 600 >&- & echo "$!" >&2; echo '{"status": {"token": "t"}}'"#;
    let (mut process, output) = PluginProcess::start(&plugin(script)).expect("it starts");
    let ran = tokio::time::timeout(PLUGIN_TIMEOUT, process.run(output)).await;
    let held = String::from_utf8(process.errors.clone()).expect("is a number");
    let held = held.trim().parse().ok().and_then(Pid::from_raw).expect("is a process");
    rustix::process::kill_process(held, Signal::KILL).expect("it runs");
    ran.expect("it ends").expect("its output can be read");
}

/// Regression: the source was silent for as long as the plugin ran. The clock runs ahead while all wait.
#[tokio::test(start_paused = true)]
async fn a_plugin_that_does_not_end_is_a_failure_of_the_source() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let path = directory.path().join("config");
    let text = "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
        users: [{name: u, user: {exec: {command: sleep, args: ['600']}}}]\n\
        clusters: [{name: a, cluster: {server: 'http://127.0.0.1:9'}}]\n\
        contexts: [{name: c, context: {cluster: a, user: u}}]\n";
    std::fs::write(&path, text).expect("can be written");
    let service = KubernetesService { kubeconfig: Some(path), ..KubernetesService::new("vllm") };
    let began = now();
    let failure = SliceApi::open(&service, &mut || {}).await.err().expect("there is no credential");
    let took = now() - began;
    assert!(PLUGIN_TIMEOUT <= took && took < PLUGIN_TIMEOUT + Duration::from_secs(1), "{took:?}");
    assert!(failure.keeps_version(), "no answer has come");
    let failure = SourceFailure::from(failure);
    assert_eq!(failure.reason, FailureReason::Timeout);
    assert_eq!(failure.text, "the credential plugin did not end within 15s");
}

/// No process is left: neither the plugin, nor what it has started and what holds its output.
#[tokio::test]
async fn a_plugin_that_is_given_up_is_killed_with_all_that_it_started() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let file = |name: &str| directory.path().join(name);
    let pid = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.strip_suffix('\n').map(str::to_string)
    };
    for (number, end) in ["wait", "exit 0"].into_iter().enumerate() {
        let (plugin_pid, child_pid) = (file(&format!("plugin-{number}")), file(&format!("child-{number}")));
        let script = format!(
            "echo $$ > {}; sleep 600 & echo $! > {}; {end}",
            plugin_pid.display(),
            child_pid.display()
        );
        let task = tokio::spawn(async move { answer(&plugin(&script), PLUGIN_TIMEOUT).await });
        eventually("both are started", || pid(&plugin_pid).is_some() && pid(&child_pid).is_some()).await;
        let pids = [pid(&plugin_pid), pid(&child_pid)].map(|pid| pid.expect("it was written"));
        assert!(runs(&pids[1]), "the child runs");
        task.abort();
        assert!(task.await.is_err_and(|error| error.is_cancelled()), "it has not answered");
        eventually("both have ended", || !pids.iter().any(|pid| runs(pid))).await;
    }
}

#[tokio::test]
async fn a_token_file_gives_its_token_without_line_ends() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let path = directory.path().join("token");
    let name = path.display().to_string();
    for text in ["hunter2\n", "hunter2", "\n hunter2 \r\n"] {
        std::fs::write(&path, text).expect("can be written");
        assert_eq!(token(name.clone(), &mut || {}).await.expect("is a token"), "hunter2", "{text:?}");
    }
    let long = "x".repeat(MAX_TOKEN_BYTES as usize + 1);
    for (text, wanted) in [(" \n", "it is empty"), (long.as_str(), "more than 65536 bytes")] {
        std::fs::write(&path, text).expect("can be written");
        let why = reason(token(name.clone(), &mut || {}).await.expect_err(wanted));
        assert!(why.starts_with(&format!("token file {name}: ")) && why.contains(wanted), "{why}");
    }
    let why = reason(token("/dev/zero".into(), &mut || {}).await.expect_err("it is no file"));
    assert_eq!(why, "token file /dev/zero: it is no file");
}

#[tokio::test]
async fn other_credentials_stand_before_a_token_file_and_a_plugin() {
    let with = |auth: AuthInfo| AuthInfo {
        token_file: Some("/nowhere/token".into()),
        exec: Some(plugin("exit 3")),
        ..auth
    };
    let text = |text: &str| Some(text.to_string());
    let basic = AuthInfo { username: text("u"), password: Some("p".into()), ..AuthInfo::default() };
    for auth in [AuthInfo { token: Some("t".into()), ..AuthInfo::default() }, basic] {
        assert!(matches!(resolve(&mut with(auth), &mut || {}).await, Ok(None)));
    }
    let why =
        reason(resolve(&mut with(AuthInfo::default()), &mut || {}).await.expect_err("there is no such file"));
    assert!(why.starts_with("token file /nowhere/token"), "{why}");
    let config = map([("cmd-path", "gcloud")]);
    let provider = AuthProviderConfig { name: "gcp".into(), config, ..AuthProviderConfig::default() };
    let why =
        resolve(&mut AuthInfo { auth_provider: Some(provider), ..AuthInfo::default() }, &mut || {}).await;
    assert!(reason(why.expect_err("it runs a command")).ends_with("with cmd-path: use exec"));
}
