//! Reads the files of `tls.ca` for changes of the fleet, before the keeper gets the changes.
//!
//! A file may be on a disk that does not answer. A read of it cannot be ended, only left behind: it keeps a
//! thread that serves no requests. So a file whose read hangs is not read again until that read has ended.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use rustls::pki_types::CertificateDer;

use super::tls;
use crate::config::types::UpstreamConfig;

/// The time limit for reading one file.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// The authorities of one file, or why there are none.
type FoundAuthorities = Result<Vec<CertificateDer<'static>>, String>;

/// The files that changes name, each read once.
#[derive(Default)]
pub(super) struct ReadAuthorities(HashMap<PathBuf, FoundAuthorities>);

/// The files whose reads have not ended within their limit.
#[derive(Default)]
struct HangingFiles(Mutex<HashSet<PathBuf>>);

static HANGING: LazyLock<Arc<HangingFiles>> = LazyLock::new(Arc::default);

// === impl ReadAuthorities ===

impl ReadAuthorities {
    /// Reads these files.
    pub(super) async fn read(files: BTreeSet<PathBuf>) -> Self {
        let reads = files.into_iter().map(|path| async {
            let found = HANGING.read(&path, READ_TIMEOUT, tls::read_authorities).await;
            (path, found)
        });
        ReadAuthorities(join_all(reads).await.into_iter().collect())
    }

    /// Reads the files that these settings name, for as long as it takes: before the start of a balancer.
    pub(super) fn read_blocking<'a>(configs: impl IntoIterator<Item = &'a UpstreamConfig>) -> Self {
        let read = |path: PathBuf| {
            let found = tls::read_authorities(&path);
            (path, found)
        };
        ReadAuthorities(files(configs).into_iter().map(read).collect())
    }

    /// Returns the authorities for these settings; none without TLS or without a file.
    pub(super) fn of(&self, config: &UpstreamConfig) -> FoundAuthorities {
        let Some(path) = tls::authorities_file(config) else { return Ok(Vec::new()) };
        let found = self.0.get(path).cloned().unwrap_or_else(|| Err(unusable(path, "it was not read")));
        found.map_err(|why| format!("upstream {}: {why}", config.name))
    }
}

/// Returns the files that these settings name.
pub(super) fn files<'a>(configs: impl IntoIterator<Item = &'a UpstreamConfig>) -> BTreeSet<PathBuf> {
    configs.into_iter().filter_map(tls::authorities_file).map(Path::to_path_buf).collect()
}

/// Returns why the authorities of these upstreams cannot be used. May wait for a disk.
pub(crate) fn authority_problems(configs: &[UpstreamConfig]) -> Vec<String> {
    let read = ReadAuthorities::read_blocking(configs);
    let problem = |config| {
        let authorities = read.of(config);
        authorities.and_then(|found| tls::secure(config, &found)).err()
    };
    configs.iter().filter_map(problem).collect()
}

fn unusable(path: &Path, why: &str) -> String {
    format!("tls.ca {}: {why}", path.display())
}

// === impl HangingFiles ===

impl HangingFiles {
    /// Reads a file on a thread of its own, for at most `limit`.
    async fn read(
        self: &Arc<Self>,
        path: &Path,
        limit: Duration,
        read: impl FnOnce(&Path) -> FoundAuthorities + Send + 'static,
    ) -> FoundAuthorities {
        if self.paths().contains(path) {
            return Err(unusable(path, "an earlier read of it has not ended; check its disk"));
        }
        let has_ended = Arc::new(AtomicBool::new(false));
        let (hanging, ended, read_path) = (self.clone(), has_ended.clone(), path.to_path_buf());
        let reading = tokio::task::spawn_blocking(move || {
            let found = read(&read_path);
            let mut paths = hanging.paths();
            ended.store(true, Relaxed);
            paths.remove(&read_path);
            found
        });
        if let Ok(read) = tokio::time::timeout(limit, reading).await {
            return read.unwrap_or_else(|error| Err(unusable(path, &error.to_string())));
        }
        // The lock orders this with the end of the read.
        let mut paths = self.paths();
        if !has_ended.load(Relaxed) {
            paths.insert(path.to_path_buf());
        }
        drop(paths);
        Err(unusable(path, &format!("it could not be read within {limit:?}; check its disk")))
    }

    fn paths(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn a_read_that_hangs_is_left_behind_and_not_repeated_until_it_ends() {
        let (files, path) = (Arc::new(HangingFiles::default()), Path::new("/disk/ca.pem"));
        let (end, ended) = channel::<()>();
        let hangs = move |_: &Path| {
            ended.recv().ok();
            Ok(Vec::new())
        };
        let found = files.read(path, Duration::from_millis(1), hangs).await;
        assert_eq!(found, Err("tls.ca /disk/ca.pem: it could not be read within 1ms; check its disk".into()));
        let found = files.read(path, READ_TIMEOUT, |_| Ok(Vec::new())).await;
        assert_eq!(
            found,
            Err("tls.ca /disk/ca.pem: an earlier read of it has not ended; check its disk".into())
        );
        let other = files.read(Path::new("/other"), READ_TIMEOUT, |_| Ok(Vec::new())).await;
        assert_eq!(other, Ok(Vec::new()));
        drop(end);
        while !files.paths().is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(files.read(path, READ_TIMEOUT, |_| Ok(Vec::new())).await, Ok(Vec::new()));
    }
}
