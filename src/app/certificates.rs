//! Replaces the certificates of listeners once their files have changed: a certificate manager renews a
//! certificate shortly before it expires, and requests no reload.
//!
//! Never: end a connection, give up after files that cannot be read; the listener keeps its certificate.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use crate::observe::process;
use crate::proxy::server::certificate::ListenerCertificate;

/// How often the files are read.
const READ_INTERVAL: Duration = Duration::from_secs(60);

/// The index of a certificate, and why its files cannot be used.
type Problems = HashMap<usize, String>;

/// Reads the files once a minute until `stopped`.
pub(super) async fn follow(certificates: Vec<Arc<ListenerCertificate>>, mut stopped: watch::Receiver<bool>) {
    let mut problems = Problems::new();
    while !certificates.is_empty() {
        tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => return,
            () = sleep(READ_INTERVAL) => {}
        }
        let certificates = certificates.clone();
        // Reading files may block.
        let read = tokio::task::spawn_blocking(move || renew(&certificates, problems));
        problems = read.await.unwrap_or_default();
    }
}

/// Replaces the certificates whose files have changed. Logs each renewal, and each problem once.
fn renew(certificates: &[Arc<ListenerCertificate>], known: Problems) -> Problems {
    let mut problems = Problems::new();
    for (index, certificate) in certificates.iter().enumerate() {
        match certificate.read_changed() {
            Ok(Some(pair)) => {
                certificate.replace(pair);
                process::certificate_renewed(certificate.path());
            }
            Ok(None) => {}
            Err(problem) => {
                if known.get(&index) != Some(&problem) {
                    process::certificate_unusable(&problem);
                }
                problems.insert(index, problem);
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::types::ListenTls;

    fn write_pair(directory: &Path) {
        let pair = rcgen::generate_simple_self_signed(vec!["localhost".into()]).expect("rcgen makes one");
        std::fs::write(directory.join("tls.crt"), pair.cert.pem()).expect("it can be written");
        std::fs::write(directory.join("tls.key"), pair.signing_key.serialize_pem()).expect("as well");
    }

    async fn passes(interval: Duration, certificate: &ListenerCertificate) -> bool {
        sleep(interval).await;
        matches!(certificate.read_changed(), Ok(None))
    }

    #[tokio::test(start_paused = true)]
    async fn uses_new_files_within_a_minute_and_keeps_the_old_pair_while_they_are_broken() {
        let directory = tempfile::tempdir().expect("a directory can be made");
        write_pair(directory.path());
        let files = ListenTls {
            certificate: directory.path().join("tls.crt"),
            key: directory.path().join("tls.key"),
        };
        let certificate = ListenerCertificate::new(&files).expect("the files are good");
        let (stop, stopped) = watch::channel(false);
        let following = tokio::spawn(follow(vec![certificate.clone()], stopped));
        std::fs::write(&files.key, "half of a key").expect("it can be written");
        sleep(READ_INTERVAL * 2).await;
        assert!(!following.is_finished(), "broken files do not end it");
        write_pair(directory.path());
        assert!(certificate.read_changed().expect("the files are good").is_some(), "not read yet");
        assert!(passes(READ_INTERVAL * 2, &certificate).await, "the new pair is in use");
        stop.send_replace(true);
        following.await.expect("it ends without a panic");
    }
}
