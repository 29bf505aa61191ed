//! Where the address and the credentials come from.

use super::*;
use crate::config::types::KubernetesService;

#[test]
fn reads_the_account_of_a_pod() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let write =
        |name: &str, text: &str| std::fs::write(directory.path().join(name), text).expect("can be written");
    let missing = in_pod(directory.path(), "10.0.0.1", "443").expect_err("there is no account");
    assert!(missing.contains("namespace"), "{missing}");
    write("namespace", "team-a\n");
    let missing = in_pod(directory.path(), "10.0.0.1", "443").expect_err("there is no authority");
    assert!(missing.contains("ca.crt"), "{missing}");
    let key = rcgen::KeyPair::generate().expect("rcgen makes keys");
    let authority = rcgen::CertificateParams::default().self_signed(&key).expect("rcgen makes certificates");
    write("ca.crt", &authority.pem());
    write("token", "t");
    for (host, url) in [("10.0.0.1", "https://10.0.0.1:443/"), ("fd00::1", "https://[fd00::1]:443/")] {
        let config = in_pod(directory.path(), host, "443").expect("the account is there");
        assert_eq!(
            (config.cluster_url.to_string().as_str(), config.default_namespace.as_str()),
            (url, "team-a")
        );
        assert_eq!(config.root_cert, Some(vec![authority.der().to_vec()]));
        assert_eq!(config.root_cert_file, Some(directory.path().join("ca.crt")));
        assert_eq!(config.auth_info.token_file, Some(directory.path().join("token").display().to_string()));
        assert!(!config.accept_invalid_certs);
    }
    assert!(in_pod(directory.path(), "a b", "443").is_err());
}

#[tokio::test]
async fn reads_the_context_that_is_configured() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let path = directory.path().join("config");
    let text = "
apiVersion: v1
kind: Config
current-context: one
clusters:
- {name: a, cluster: {server: 'https://a:6443'}}
- {name: b, cluster: {server: 'https://b:6443', proxy-url: 'http://proxy:3128'}}
users: [{name: u, user: {token: t}}]
contexts:
- {name: one, context: {cluster: a, user: u, namespace: team-a}}
- {name: two, context: {cluster: b, user: u}}
";
    std::fs::write(&path, text).expect("can be written");
    let with = |context: Option<&str>| KubernetesService {
        kubeconfig: Some(path.clone()),
        context: context.map(String::from),
        ..KubernetesService::new("vllm")
    };
    let first = settings(&with(None)).await.expect("is valid");
    assert_eq!(
        (first.cluster_url.to_string().as_str(), first.default_namespace.as_str()),
        ("https://a:6443/", "team-a")
    );
    let second = settings(&with(Some("two"))).await.expect("is valid");
    assert_eq!(second.cluster_url.to_string(), "https://b:6443/");
    assert_eq!(second.default_namespace, "default");
    assert_eq!(second.proxy_url.map(|url| url.to_string()), Some("http://proxy:3128/".into()));
    assert!(settings(&with(Some("three"))).await.is_err_and(|why| why.contains("three")));
}

/// Regression: a variable of the environment named the proxy where any cluster of the file had one.
#[test]
fn only_the_cluster_of_the_context_decides_on_a_proxy() {
    let text = "
apiVersion: v1
kind: Config
current-context: one
clusters:
- {name: a, cluster: {server: 'https://a:6443'}}
- {name: b, cluster: {server: 'https://b:6443', proxy-url: 'http://proxy:3128'}}
- {name: c, cluster: {server: 'https://c:6443', proxy-url: ''}}
contexts:
- {name: one, context: {cluster: a}}
- {name: two, context: {cluster: b}}
- {name: three, context: {cluster: c}}
- {name: four, context: {cluster: none}}
";
    let mut file = Kubeconfig::from_yaml(text).expect("is valid");
    let table = [(Some("one"), false), (Some("two"), true), (Some("three"), false), (Some("four"), false)];
    for (context, wanted) in table.into_iter().chain([(Some("five"), false), (None, false)]) {
        assert_eq!(has_proxy(&file, context), wanted, "{context:?}");
    }
    file.current_context = Some("two".into());
    assert!(has_proxy(&file, None) && !has_proxy(&file, Some("one")));
}

#[tokio::test]
async fn a_kubeconfig_that_is_no_file_is_not_opened() {
    let service =
        KubernetesService { kubeconfig: Some("/dev/zero".into()), ..KubernetesService::new("vllm") };
    let why = settings(&service).await.expect_err("it is a device");
    assert_eq!(why, "kubeconfig /dev/zero: it is no file");
}

#[tokio::test]
async fn a_kubeconfig_has_a_limit() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let path = directory.path().join("config");
    let text = "current-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n\
         clusters: [{name: k, cluster: {server: 'https://a:6443'}}]\nusers: [{name: u, user: {token: t}}]\n";
    let service = KubernetesService { kubeconfig: Some(path.clone()), ..KubernetesService::new("vllm") };
    let limit = 1 << 20;
    for length in [limit, limit + 1] {
        std::fs::write(&path, format!("{text}#{}", "x".repeat(length - text.len() - 1))).expect("is written");
        let wanted =
            format!("kubeconfig {}: it has {length} bytes, which is more than {limit}", path.display());
        match settings(&service).await {
            Ok(_) => assert_eq!(length, limit),
            Err(why) => assert_eq!((length, why), (limit + 1, wanted)),
        }
    }
}

/// What a kubeconfig or a credential plugin says goes to the log only where it can hold no secret.
#[tokio::test]
async fn the_reason_of_a_failure_quotes_no_secret() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let path = directory.path().join("config");
    let service = KubernetesService { kubeconfig: Some(path.clone()), ..KubernetesService::new("vllm") };
    let plugin = |script: &str| {
        format!(
            "exec: {{apiVersion: client.authentication.k8s.io/v1, command: sh, args: [-c, '{script}'], \
             env: [{{name: SECRET, value: hunter2}}]}}"
        )
    };
    for (user, wanted) in [
        ("{token: hunter2, username: [x]}".to_string(), "the kubeconfig cannot be parsed, see line 5"),
        ("{token: {hunter2: 1}}".to_string(), "the kubeconfig cannot be parsed"),
        (format!("{{{}}}", plugin("echo hunter2; exit 3")), "the credential plugin failed: exit status: 3"),
        (format!("{{{}}}", plugin("echo [hunter2")), "the credential plugin printed no valid ExecCredential"),
    ] {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nusers:\n- {{name: u, user: {user}}}\n\
             clusters: [{{name: a, cluster: {{server: 'http://127.0.0.1:9'}}}}]\n\
             contexts: [{{name: c, context: {{cluster: a, user: u}}}}]\n"
        );
        std::fs::write(&path, text).expect("can be written");
        let Err(ApiFailure::Unreached(why)) = SliceApi::open(&service, &mut || {}).await else {
            panic!("{user} is accepted");
        };
        assert!(why.starts_with(wanted) && !why.contains("hunter2"), "{why}");
    }
}

/// Regression: a file of a kubeconfig that could not be opened at once stopped all requests of its thread.
#[tokio::test]
async fn a_file_that_waits_stops_nothing_else() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let (path, pipe) = (directory.path().join("config"), directory.path().join("pipe"));
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("it can be run");
    assert!(made.success());
    let cluster = format!("{{server: \"https://127.0.0.1:1\", certificate-authority: {}}}", pipe.display());
    let text = format!(
        "current-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
         clusters: [{{name: k, cluster: {cluster}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n"
    );
    std::fs::write(&path, text).expect("can be written");
    let service = KubernetesService { kubeconfig: Some(path), ..KubernetesService::new("vllm") };
    // Ends the wait, also of a test that fails.
    let (done, waits) = std::sync::mpsc::channel::<()>();
    let writer = std::thread::spawn(move || {
        let _ = waits.recv_timeout(Duration::from_secs(20));
        std::fs::OpenOptions::new().write(true).open(pipe)
    });
    // A thread that waits for the pipe polls no timer, and comes back with what it has read.
    let opened = tokio::time::timeout(Duration::from_millis(100), SliceApi::open(&service, &mut || {})).await;
    assert!(opened.is_err());
    drop(done);
    writer.join().expect("it ends").expect("can be opened");
}
