//! The pace of rounds, and a source whose credentials cannot be read.

use std::path::PathBuf;

use tokio::sync::mpsc;

use super::super::Fleet;
use super::*;
use crate::config::types::{Config, DiscoveryMethod, DiscoverySource};
use crate::observe::{ExpositionFormat, Observer};

/// A kubeconfig that names a pipe, so that a read of it waits until this is dropped.
struct HungKubeconfig {
    directory: tempfile::TempDir,
}

// === impl HungKubeconfig ===

impl HungKubeconfig {
    fn new() -> Self {
        let hung = HungKubeconfig { directory: tempfile::tempdir().expect("a directory can be made") };
        let made = std::process::Command::new("mkfifo").arg(hung.pipe()).status().expect("it can be run");
        assert!(made.success());
        let authority = hung.pipe().display().to_string();
        let text = format!(
            "current-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
             clusters: [{{name: k, cluster: {{server: 'https://127.0.0.1:1', certificate-authority: \
             {authority}}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n"
        );
        std::fs::write(hung.directory.path().join("config"), text).expect("can be written");
        hung
    }

    fn pipe(&self) -> PathBuf {
        self.directory.path().join("pipe")
    }

    fn service(&self) -> KubernetesService {
        let kubeconfig = Some(self.directory.path().join("config"));
        KubernetesService { kubeconfig, ..KubernetesService::new("vllm") }
    }
}

impl Drop for HungKubeconfig {
    fn drop(&mut self) {
        // The runtime waits for its threads. Each read that waits for the pipe finds its end, and one that is
        // about to begin finds no pipe.
        let end = std::fs::OpenOptions::new().read(true).write(true).open(self.pipe());
        std::fs::remove_file(self.pipe()).ok();
        drop(end);
    }
}

#[test]
fn pauses_double_up_to_a_limit_and_differ() {
    assert_eq!(pause(0, 1.0), MIN_PAUSE);
    assert_eq!(pause(1, 1.0), MIN_PAUSE);
    assert_eq!(pause(2, 1.0), MIN_PAUSE * 2);
    assert_eq!(pause(3, 0.0), MIN_PAUSE * 2);
    for fruitless in [8, 100, u32::MAX] {
        assert_eq!((pause(fruitless, 1.0), pause(fruitless, 0.0)), (MAX_PAUSE, MAX_PAUSE / 2));
    }
}

/// Regression: a source whose kubeconfig could not be read was silent.
#[tokio::test(start_paused = true)]
async fn credentials_that_hang_are_one_failure() {
    let hung = HungKubeconfig::new();
    let service = hung.service();
    let source = DiscoverySource::new(DiscoveryMethod::Kubernetes(service.clone()));
    let observer = Observer::default();
    let config = Config { sources: vec![source], ..Config::default() };
    let (fleet, _keeper) = Fleet::new(&config, observer.clone()).expect("it needs no file");
    let source = fleet.plan.borrow().sources[0].clone();
    let label = source.label.clone();
    let (sender, _answers) = mpsc::channel(1);
    let reporter = SourceReporter::new(fleet.clone(), source, sender);
    let failures = || {
        let page = String::from_utf8(observer.render(ExpositionFormat::Text, &[])).expect("is text");
        let lines = page.lines().filter(|line| line.starts_with("vllm_lb_discovery_failures_total{"));
        lines.map(String::from).collect::<Vec<_>>()
    };
    let following = follow(&service, reporter);
    let looking = async {
        // The clock stands while a thread reads.
        let mut counts = Vec::new();
        for passed in [FILE_PATIENCE / 2, FILE_PATIENCE, FILE_PATIENCE * 100] {
            tokio::time::advance(passed).await;
            tokio::task::yield_now().await;
            counts.push(failures());
        }
        counts
    };
    let counts = tokio::select! {
        biased;
        () = following => panic!("a source is followed without end"),
        counts = looking => counts,
    };
    let failure = format!(r#"vllm_lb_discovery_failures_total{{reason="timeout",source="{label}"}} 1"#);
    assert_eq!(counts, [vec![], vec![failure.clone()], vec![failure]]);
    // A single question has its own limit, and names what was waited for.
    let limit = Duration::from_secs(1);
    let asking = poll(&service, limit);
    let passing = async {
        tokio::time::advance(limit).await;
        std::future::pending::<()>().await
    };
    let failure = tokio::select! {
        biased;
        answer = asking => answer.expect_err("it cannot be read"),
        () = passing => unreachable!("it does not end"),
    };
    assert_eq!(failure.reason, FailureReason::Timeout);
    assert!(failure.text.starts_with("the kubeconfig, a file that it names"), "{failure}");
}
