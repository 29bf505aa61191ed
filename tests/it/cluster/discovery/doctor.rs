//! `vllm-lb doctor` over the sources `file` and `dns`: what they list is examined, and what fails is named.

use super::files::{ListFolder, list};
use super::names::{NAME, engines_at};
use super::*;
use crate::common::dns::{DnsAnswer, DnsServer, RecordData};
use crate::common::doctor::{Visit, file, visit};

/// Examines a configuration with one source.
async fn examine(source: &str) -> Visit {
    let file = file(&format!("upstreams: [{source}]"));
    visit(&["-c", &file.path().display().to_string(), "--json"]).await
}

/// The names of the upstreams that were examined.
fn examined(visit: &Visit) -> Vec<String> {
    let report = visit.json();
    let rows = report["upstreams"].as_array().expect("a list").iter();
    let mut names: Vec<String> = rows.map(|row| row["name"].as_str().expect("a name").to_string()).collect();
    names.sort();
    names
}

/// Checks that the source cannot be read, for this reason.
#[track_caller]
fn check_unreadable(visit: &Visit, label: &str, why: &str) {
    let wanted = vec![(label.to_string(), "source_unreadable".to_string())];
    assert_eq!((visit.findings(), visit.code), (wanted, Some(1)), "{}", visit.text);
    assert!(visit.text.contains(why), "{why} is not in {}", visit.text);
    assert_eq!(examined(visit), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_examines_what_a_file_lists_or_says_what_is_wrong() {
    let (folder, engines) = (ListFolder::new(), engines(2).await);
    let path = folder.path("upstreams.yaml").display().to_string();
    let (source, label) = (format!("{{file: '{path}'}}"), format!("file {path}"));
    check_unreadable(&examine(&source).await, &label, "No such file");
    folder.write(&list(&engines));
    let found = examine(&source).await;
    assert_eq!((found.findings(), found.code), (vec![], Some(0)), "{}", found.text);
    let mut wanted = engines.iter().map(name).collect::<Vec<_>>();
    wanted.sort();
    assert_eq!(examined(&found), wanted);
    for (text, why) in [
        ("[]\n", "the file lists no upstream"),
        ("- http://a:1\n- url: http://b:1\n  wieght: 2\n", "[1].wieght: unknown key"),
        ("- http://a:1\n- {url: http", "(line "),
    ] {
        folder.write(text);
        check_unreadable(&examine(&source).await, &label, why);
    }
    // Neither a device nor a pipe is opened, which might never end.
    check_unreadable(&examine("{file: /dev/zero}").await, "file /dev/zero", "it is no file");
    let pipe = folder.path("pipe").display().to_string();
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("it can be run");
    assert!(made.success());
    let source = format!("{{file: '{pipe}'}}");
    check_unreadable(&examine(&source).await, &format!("file {pipe}"), "it is no file");
    // So does the test of a configuration.
    let config = file(&format!("upstreams: [{source}]"));
    let test = std::process::Command::new(env!("CARGO_BIN_EXE_vllm-lb"))
        .args(["-t", "-c", &config.path().display().to_string()])
        .env_clear()
        .output()
        .expect("the binary can be started");
    let errors = String::from_utf8_lossy(&test.stderr);
    assert!(!test.status.success() && errors.contains("it is no file"), "{errors}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_examines_what_a_name_has_or_says_what_is_wrong() {
    let (server, (port, engines)) = (DnsServer::start().await, engines_at(18, 1).await);
    let url = format!("http://{NAME}.:{port}");
    let (source, label) =
        (format!("{{dns: '{url}', resolver: ['{}']}}", server.address), format!("dns {url}"));
    check_unreadable(&examine(&source).await, &label, "NXDOMAIN");
    server.set_addresses(NAME, 1, ["127.0.18.1"]);
    let found = examine(&source).await;
    assert_eq!((found.findings(), found.code), (vec![], Some(0)), "{}", found.text);
    assert_eq!(examined(&found), [name(&engines[0])]);
    for (answer, why) in [
        (DnsAnswer::Code(2), "the DNS server answered"),
        (DnsAnswer::Records(1, Vec::new()), "the name has no address"),
        (DnsAnswer::Records(1, RecordData::addresses(["0.0.0.0"])), "the resolver blocks it"),
        (DnsAnswer::Silence, "answer"),
    ] {
        server.set_both(NAME, &answer);
        check_unreadable(&examine(&source).await, &label, why);
    }
    // An address where no engine listens.
    server.set_addresses(NAME, 1, ["127.0.18.1", "127.0.18.2"]);
    let found = examine(&source).await;
    let wanted = vec![(format!("127.0.18.2:{port}"), "unreachable".to_string())];
    assert_eq!((found.findings(), found.code), (wanted, Some(1)), "{}", found.text);
}
