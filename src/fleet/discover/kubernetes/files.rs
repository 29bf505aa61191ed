//! Reads kubeconfigs and the files that they name, of limited size, and reports a read that takes long.
//!
//! A file may be on a disk that does not answer, and `kube` opens some files itself, which waits where one is
//! a pipe. Such a read cannot be ended, only noticed.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::fleet::regular_file::open_regular;

/// The largest kubeconfig.
const MAX_KUBECONFIG_BYTES: u64 = 1 << 20;

/// The time after which a read of the kubeconfig, or of a file that it names, is reported to take long.
pub(super) const FILE_PATIENCE: Duration = Duration::from_secs(5);

/// What is called, at most once for each read, when a read of files takes longer than `FILE_PATIENCE`.
pub(super) type OnSlow<'a> = &'a mut (dyn FnMut() + Send);

/// Reads files on a thread of its own, since a read that hangs must not stop a thread that serves requests. A
/// read that takes long is waited for: a second one would take a second thread.
pub(super) async fn read_files<T: Send + 'static>(
    read: impl FnOnce() -> T + Send + 'static,
    on_slow: OnSlow<'_>,
) -> Result<T, String> {
    let mut reading = tokio::task::spawn_blocking(read);
    let read = match tokio::time::timeout(FILE_PATIENCE, &mut reading).await {
        Ok(read) => read,
        Err(_) => {
            on_slow();
            reading.await
        }
    };
    read.map_err(|error| error.to_string())
}

/// Reads a regular file of at most so many bytes.
pub(super) fn read_file(path: &Path, max_bytes: u64) -> io::Result<String> {
    let mut text = String::new();
    open_regular(path)?.take(max_bytes + 1).read_to_string(&mut text)?;
    if text.len() as u64 > max_bytes {
        return Err(io::Error::other(format!("it has more than {max_bytes} bytes")));
    }
    Ok(text)
}

/// The files that `kube` reads: those of `$KUBECONFIG`, or the user's own.
pub(super) fn kubeconfig_paths(named: Option<&str>) -> Vec<PathBuf> {
    let named = named.map(std::env::split_paths).into_iter().flatten();
    let named: Vec<PathBuf> = named.filter(|path| !path.as_os_str().is_empty()).collect();
    let of_user = || std::env::home_dir().map(|home| home.join(".kube/config")).into_iter().collect();
    if named.is_empty() { of_user() } else { named }
}

/// Checks what `kube` does not, which reads a file as a whole: that a kubeconfig is a regular file and not
/// too large. Opening a pipe would wait for a writer. A file that is missing is left to `kube`.
pub(super) fn check_kubeconfig(path: &Path) -> Result<(), String> {
    let Ok(found) = path.metadata() else { return Ok(()) };
    let why = match found.len() {
        _ if !found.is_file() => "it is no file".to_string(),
        length if length > MAX_KUBECONFIG_BYTES => {
            format!("it has {length} bytes, which is more than {MAX_KUBECONFIG_BYTES}")
        }
        _ => return Ok(()),
    };
    Err(format!("kubeconfig {}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubeconfigs_are_those_of_the_variable_or_the_users_own() {
        let paths = |named| kubeconfig_paths(named).into_iter().map(|path| path.display().to_string());
        assert_eq!(paths(Some("/a:/b c::")).collect::<Vec<_>>(), ["/a", "/b c"]);
        for named in [None, Some(""), Some(":")] {
            assert!(paths(named).all(|path| path.ends_with("/.kube/config")), "{named:?}");
        }
    }

    #[test]
    fn a_pipe_is_no_kubeconfig() {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let pipe = directory.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("it can be run");
        assert!(made.success());
        let why = check_kubeconfig(&pipe).expect_err("it is a pipe");
        assert_eq!(why, format!("kubeconfig {}: it is no file", pipe.display()));
        // `kube` says what is wrong with it.
        assert_eq!(check_kubeconfig(Path::new("/nowhere/config")), Ok(()));
    }
}
