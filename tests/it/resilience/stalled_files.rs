//! Files that do not answer: a pipe stands for a disk that hangs. Only what needs the file waits.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use rustix::fs::OFlags;
use rustix::process::Signal;
use serde_json::json;

use super::upgrade::Supervisor;
use crate::common::process::Setup;
use crate::common::wire::{JSON, Wire, request, with_host};
use crate::common::{engine, eventually};

/// Puts a pipe, which has no writer, in the place of a file.
fn put_pipe(path: &str) {
    // A process may still read the file that was there.
    std::fs::remove_file(path).ok();
    let made = Command::new("mkfifo").arg(path).status().expect("it can be run");
    assert!(made.success(), "mkfifo {path}: {made}");
}

/// Waits until a process reads the pipe. The process reads until the pipe that is returned is dropped.
async fn until_read(path: &str) -> File {
    let flags = OFlags::NONBLOCK.bits() as i32;
    let open = async || OpenOptions::new().write(true).custom_flags(flags).open(path).ok();
    eventually("a process reads the pipe", open).await
}

/// Regression: a reload whose file could not be read stopped the loop that waits for signals: SIGTERM, the
/// handover and the watchdog waited for the disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_reload_delays_neither_the_watchdog_nor_the_end() {
    let engine = engine(Default::default()).await;
    let mut setup = Setup::over([&engine], "");
    let supervisor = Supervisor::of(&mut setup);
    let mut process = setup.start().await;
    supervisor.hears("READY=1").await;
    put_pipe(&setup.path("lb.yaml"));
    process.signal(Signal::HUP);
    supervisor.hears("RELOADING=1").await;
    let _reads = until_read(&setup.path("lb.yaml")).await;
    // The first may have been sent before the reload.
    supervisor.hears_a_sign_of_life().await;
    supervisor.hears_a_sign_of_life().await;
    process.signal(Signal::TERM);
    supervisor.hears("STOPPING=1").await;
    assert_eq!(process.ended().await, Some(0));
    assert!(process.has_said("stopped"));
}

/// Regression: the process that runs could not be replaced while its reload hung.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_reload_does_not_prevent_a_handover() {
    let engine = engine(Default::default()).await;
    let setup = Setup::over([&engine], "");
    let mut former = setup.start().await;
    let text = std::fs::read(setup.path("lb.yaml")).expect("the file is there");
    put_pipe(&setup.path("lb.yaml"));
    former.signal(Signal::HUP);
    let _reads = until_read(&setup.path("lb.yaml")).await;
    std::fs::remove_file(setup.path("lb.yaml")).expect("the pipe is there");
    std::fs::write(setup.path("lb.yaml"), text).expect("the folder can be written");
    let _running = setup.upgrade().await;
    assert_eq!(former.ended().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_during_a_reload_leads_to_one_more_after_it() {
    let engine = engine(Default::default()).await;
    let mut setup = Setup::over([&engine], "");
    let supervisor = Supervisor::of(&mut setup);
    let mut process = setup.start().await;
    supervisor.hears("READY=1").await;
    let text = std::fs::read(setup.path("lb.yaml")).expect("the file is there");
    put_pipe(&setup.path("lb.yaml"));
    process.signal(Signal::HUP);
    supervisor.hears("RELOADING=1").await;
    let reads = until_read(&setup.path("lb.yaml")).await;
    process.signal(Signal::HUP);
    process.signal(Signal::HUP);
    std::fs::remove_file(setup.path("lb.yaml")).expect("the pipe is there");
    std::fs::write(setup.path("lb.yaml"), text).expect("the folder can be written");
    // The first reload reads an empty file, which is no configuration.
    drop(reads);
    for words in ["READY=1", "RELOADING=1", "READY=1"] {
        supervisor.hears(words).await;
    }
    process.signal(Signal::TERM);
    supervisor.hears("STOPPING=1").await;
    assert_eq!(process.ended().await, Some(0));
}

/// Regression: the keeper read `tls.ca` itself. While the read hung, no probe and no change was handled, and
/// one thread did nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn authorities_that_cannot_be_read_do_not_stop_the_keeper() {
    let engine = engine(Default::default()).await;
    let setup = Setup::over([&engine], "");
    let process = setup.start().await;
    let path = setup.path("ca.pem");
    put_pipe(&path);
    let ask = async |method: &str, target: &str, body: serde_json::Value| {
        let request = request(method, target, &[JSON], body.to_string().as_bytes());
        Wire::connect(&process.admin).await.ask(with_host(&request, &process.admin)).await
    };
    let added = json!({"url": "https://127.0.0.1:9", "name": "new", "tls": {"ca": path}});
    let refused = ask("POST", "/admin/upstreams", added).await.expect(400);
    let text = refused.json().to_string();
    assert!(text.contains("ca.pem: it is no file"), "{text}");
    // A reload and a change of another upstream get their answers.
    let entry = format!("{{url: 'https://127.0.0.1:9', tls: {{ca: '{path}'}}}}");
    setup.write(&format!("'{}', {entry}", engine.url()), "");
    let refused = ask("POST", "/admin/reload", json!(null)).await.expect(422);
    assert!(refused.json().to_string().contains("ca.pem: it is no file"));
    let drained = format!("/admin/upstreams/{}", engine.address());
    ask("PATCH", &drained, json!({"state": "drain"})).await.expect(200);
}
