//! Reads a file with a list of upstreams, in the form of `upstreams`, again and again.
//!
//! The file is read as a whole at every interval and compared by its content. A notice of the kernel
//! (inotify) would be quicker by a second, and misses what happens on NFS; modification times miss a second
//! change within a tick of the clock, and the swapped symlinks of a mounted ConfigMap. A megabyte costs a
//! millisecond.
//!
//! Renaming a new file over the old one is the way to change the list: every read finds the old list or the
//! new one. A program that writes in place may be half done, and half a list can be a valid one. So other
//! content counts once it was the same in two reads, `SETTLE_TIME` apart. Of a file that changes for longer
//! than `MAX_SETTLE_TIME` the next list counts, since every read of it may be another one.

use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use xxhash_rust::xxh3::{xxh3_128, xxh3_128_with_seed};

use super::UNANSWERED_POLL_INTERVAL;
use super::engine::DiscoveredEngine;
use super::source::{FailureReason, SourceFailure, SourceReporter};
use crate::config::check;
use crate::config::problem::{ConfigProblem, seen};
use crate::config::types::ListedFile;
use crate::fleet::now;
use crate::fleet::regular_file::open_regular;

/// The time for which other content must stay the same before it counts.
const SETTLE_TIME: Duration = Duration::from_millis(200);

/// The time after which a file counts although it is other content at every read.
const MAX_SETTLE_TIME: Duration = Duration::from_secs(10);

/// The largest file that is read, as of the configuration itself.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The largest number of problems in one record of the log.
const MAX_SHOWN_PROBLEMS: usize = 5;

/// Makes the hash of an error differ from that of a file with the same text.
const ERROR_SEED: u64 = 1;

/// The list of a file, or why there is none.
type ReadList = Result<Vec<DiscoveredEngine>, SourceFailure>;

/// A read of the file.
struct FileReading {
    /// The hash of the content, or of the error without one.
    content: u128,
    list: ReadList,
}

/// Reads the file until dropped.
pub(super) async fn follow(file: &ListedFile, every: Duration, mut reporter: SourceReporter) {
    let mut accepted: Option<FileReading> = None;
    loop {
        let known = accepted.as_ref().map(|accepted| accepted.content);
        if let Some(other) = read_settled(file, known).await {
            if let Ok(engines) = &other.list
                && !reporter.listed(engines.clone()).await
            {
                return;
            }
            accepted = Some(other);
        }
        let interval = match accepted.as_ref().map(|accepted| &accepted.list) {
            Some(Ok(engines)) => {
                reporter.confirmed(engines.len());
                every
            }
            Some(Err(failure)) => {
                reporter.failed(failure);
                every.min(UNANSWERED_POLL_INTERVAL)
            }
            None => every,
        };
        tokio::time::sleep(interval).await;
    }
}

/// Reads the file once.
pub(super) async fn poll(file: &ListedFile) -> ReadList {
    match read(file, None).await {
        Some(reading) => reading.list,
        None => Err(SourceFailure::new(FailureReason::Empty, "the file lists no upstream")),
    }
}

/// Reads the file until two reads in a row find the same, or one finds a list after `MAX_SETTLE_TIME`, or
/// twice that time has passed; `None` where the first finds what is known.
async fn read_settled(file: &ListedFile, known: Option<u128>) -> Option<FileReading> {
    let mut found = read(file, known).await?;
    let began = now();
    loop {
        tokio::time::sleep(SETTLE_TIME).await;
        let Some(other) = read(file, Some(found.content)).await else { return Some(found) };
        let limit = if other.list.is_ok() { MAX_SETTLE_TIME } else { 2 * MAX_SETTLE_TIME };
        found = other;
        if now().saturating_duration_since(began) >= limit {
            return Some(found);
        }
    }
}

/// Reads the file; `None` where its content has the hash `known`.
async fn read(file: &ListedFile, known: Option<u128>) -> Option<FileReading> {
    let path = file.path.clone();
    let reading = tokio::task::spawn_blocking(move || read_blocking(&path, known)).await;
    reading.unwrap_or_else(|error| failed(known, FailureReason::Unreachable, error.to_string()))
}

fn read_blocking(path: &Path, known: Option<u128>) -> Option<FileReading> {
    match read_text(path) {
        Ok(text) => {
            let content = xxh3_128(text.as_bytes());
            (known != Some(content)).then(|| FileReading { content, list: parse(&text) })
        }
        Err(error) => {
            let reason = match error.kind() {
                io::ErrorKind::NotFound => FailureReason::Unreachable,
                io::ErrorKind::InvalidData => FailureReason::Invalid,
                _ => FailureReason::Refused,
            };
            failed(known, reason, format!("cannot read {}: {error}", seen(&path.display().to_string())))
        }
    }
}

/// Returns the failure of a read, unless its text has the hash `known`.
fn failed(known: Option<u128>, reason: FailureReason, text: String) -> Option<FileReading> {
    let content = xxh3_128_with_seed(text.as_bytes(), ERROR_SEED);
    (known != Some(content)).then(|| FileReading { content, list: Err(SourceFailure::new(reason, text)) })
}

/// Reads a regular file of at most `MAX_FILE_BYTES`.
fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open_regular(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    Ok(text)
}

/// Parses the content of the file.
fn parse(text: &str) -> ReadList {
    match check::upstream_list(text) {
        Ok(listed) if listed.is_empty() => {
            Err(SourceFailure::new(FailureReason::Empty, "the file lists no upstream"))
        }
        Ok(listed) => Ok(listed.into_iter().map(DiscoveredEngine::from).collect()),
        Err(problems) => Err(SourceFailure::new(FailureReason::Invalid, joined(&problems))),
    }
}

/// Returns the first problems in one line.
fn joined(problems: &[ConfigProblem]) -> String {
    let mut shown: Vec<String> =
        problems.iter().take(MAX_SHOWN_PROBLEMS).map(ConfigProblem::to_string).collect();
    if problems.len() > MAX_SHOWN_PROBLEMS {
        shown.push(format!("and {} more", problems.len() - MAX_SHOWN_PROBLEMS));
    }
    shown.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn list(text: &str) -> ReadList {
        let directory = tempfile::tempdir().expect("a directory is made");
        let path = directory.path().join("upstreams.yaml");
        std::fs::write(&path, text).expect("it is written");
        poll(&ListedFile::new(path)).await
    }

    #[tokio::test]
    async fn reads_a_list_or_gives_the_reason() {
        assert_eq!(list("- http://a:1\n- http://b:1\n").await.expect("is valid").len(), 2);
        let many: String = (0..9).map(|number| format!("- http://a:1/{number} x\n")).collect();
        let huge = format!("# {}\n- http://a:1\n", "x".repeat(2 << 20));
        for (text, reason, wanted) in [
            ("", FailureReason::Empty, "the file lists no upstream"),
            ("[]\n", FailureReason::Empty, "the file lists no upstream"),
            ("- http://a:1\n- {url: http", FailureReason::Invalid, "(line "),
            (
                "- http://a:1\n- {url: http://b:1, weight: 0}\n",
                FailureReason::Invalid,
                "[1].weight: \"0\" is",
            ),
            (&many, FailureReason::Invalid, "; and 4 more"),
            (&huge, FailureReason::Invalid, "the file is larger than 1048576 bytes"),
        ] {
            let failure = list(text).await.expect_err(text);
            assert_eq!(failure.reason, reason, "{failure}");
            assert!(failure.text.contains(wanted) && !failure.text.contains('\n'), "{failure}");
        }
    }

    #[tokio::test]
    async fn reads_regular_files_alone() {
        for (path, reason) in
            [("/nowhere/upstreams.yaml", FailureReason::Unreachable), ("/dev/zero", FailureReason::Refused)]
        {
            let failure = poll(&ListedFile::new(path.into())).await.expect_err(path);
            assert!(failure.reason == reason && failure.text.contains(path), "{failure}");
        }
    }

    /// A program that writes in place: no piece is taken for the list, although each of them is a valid one.
    #[tokio::test(start_paused = true)]
    async fn waits_until_a_file_is_written() {
        let directory = tempfile::tempdir().expect("a directory is made");
        let file = ListedFile::new(directory.path().join("upstreams.yaml"));
        let whole = "- http://a:1\n- http://b:1\n- http://c:1\n- http://d:1\n";
        let write = |count: usize| {
            let pieces: String = whole.split_inclusive('\n').take(count).collect();
            std::fs::write(&file.path, pieces).expect("it is written");
        };
        write(1);
        let writing = async {
            for count in 2..=4 {
                tokio::time::sleep(SETTLE_TIME * 3 / 4).await;
                write(count);
            }
        };
        let (found, ()) = tokio::join!(read_settled(&file, None), writing);
        let found = found.expect("it is other content");
        assert_eq!(found.list.expect("is valid").len(), 4);
        assert!(read_settled(&file, Some(found.content)).await.is_none());
    }

    /// Regression: no list counted while the file was another one at every read.
    #[tokio::test(start_paused = true)]
    async fn takes_a_file_that_never_settles() {
        let directory = tempfile::tempdir().expect("a directory is made");
        let file = ListedFile::new(directory.path().join("upstreams.yaml"));
        let writing = async {
            for port in 1_u16.. {
                // Every fifth content is no list.
                let text = if port % 5 == 0 { format!("- {port}\n") } else { format!("- http://a:{port}\n") };
                std::fs::write(directory.path().join("next"), text).expect("it is written");
                std::fs::rename(directory.path().join("next"), &file.path).expect("it is renamed");
                tokio::time::sleep(SETTLE_TIME / 2).await;
            }
        };
        let began = now();
        let found = tokio::select! {
            found = read_settled(&file, None) => found,
            () = writing => None,
        };
        assert_eq!(found.expect("it is other content").list.expect("is valid").len(), 1);
        let took = now() - began;
        assert!(MAX_SETTLE_TIME <= took && took < MAX_SETTLE_TIME * 2, "{took:?}");
    }

    /// Regression: a pipe that came in the place of the file after the look at it was waited for, for ever.
    #[test]
    fn a_pipe_that_replaces_the_file_is_not_waited_for() {
        let directory = tempfile::tempdir().expect("a directory is made");
        let at = |name: &str| directory.path().join(name);
        let made = std::process::Command::new("mkfifo").arg(at("pipe")).status().expect("it can be run");
        assert!(made.success());
        std::fs::write(at("file"), "- http://a:1\n").expect("it is written");
        std::fs::write(at("list"), "").expect("it is written");
        let (done, ended) = std::sync::mpsc::channel();
        let path = at("list");
        std::thread::spawn(move || {
            let opened = (0..20_000).filter(|_| open_regular(&path).is_ok()).count();
            done.send(opened).expect("the test waits");
        });
        let replace = |name: &str| {
            std::fs::hard_link(at(name), at("next"))?;
            std::fs::rename(at("next"), at("list"))
        };
        let began = std::time::Instant::now();
        let opened = loop {
            replace("pipe").and_then(|()| replace("file")).expect("it is replaced");
            match ended.try_recv() {
                Ok(opened) => break opened,
                Err(_) => assert!(began.elapsed() < Duration::from_secs(30), "a pipe is waited for"),
            }
        };
        assert!(opened > 0);
    }
}
