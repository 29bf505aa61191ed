//! Tests of the hand-over of members and chains between two processes.

use super::*;
use crate::config::check;

fn members(records: &[(&str, &str)], upstreams: &[UpstreamConfig]) -> TransferredMembers {
    let records = records.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect();
    let entries = upstreams.iter().map(|entry| (entry.name.clone(), keyed_entry_hash(entry))).collect();
    TransferredMembers { records, entries }
}

fn upstream(text: &str) -> UpstreamConfig {
    check::upstream_alone(text).expect(text)
}

#[test]
fn a_record_ends_where_its_entry_in_the_file_is_another() {
    let before = [upstream(r#"{"url": "http://a:1"}"#), upstream(r#"{"url": "http://b:1"}"#)];
    let after = [
        upstream(r#"{"url": "http://a:1"}"#),
        upstream(r#"{"url": "http://b:1", "weight": 2}"#),
        upstream(r#"{"url": "http://c:1"}"#),
    ];
    let all = ["a:1", "b:1", "c:1", "d:1"].map(|name| (name, "7 {}"));
    let mut names: Vec<String> =
        members(&all, &before).lasting(&after).into_iter().map(|(name, _)| name).collect();
    names.sort();
    assert_eq!(names, ["a:1", "d:1"]);
    let drained = all.map(|(name, _)| (name, r#"7 {"drain": true}"#));
    for (records, ended) in [(all, &[][..]), (drained, &["b:1"][..])] {
        let transferred = members(&records, &before);
        // Another balancer may have drained what is new in this file.
        assert_eq!(transferred.ended(&after).collect::<Vec<_>>(), ended);
    }
}

/// As with a reload: a changed key ends what was changed before, but for what was changed under this entry.
#[test]
fn a_changed_key_ends_the_records_of_other_entries() {
    let [before, after] = ["one", "two"].map(|key| {
        ["a", "b"].map(|host| upstream(&format!(r#"{{"url": "http://{host}:1", "api_key": "{key}"}}"#)))
    });
    let own = format!(r#"7 {{"drain": true, "entry": "{:016x}"}}"#, entry_hash(&before[0]));
    let transferred = members(&[("a:1", &own), ("b:1", r#"7 {"drain": true}"#)], &before);
    let names: Vec<String> = transferred.lasting(&after).into_iter().map(|(name, _)| name).collect();
    assert_eq!((names, transferred.ended(&after).collect()), (vec!["a:1".to_string()], vec!["b:1"]));
}

#[tokio::test]
async fn takes_what_arrived_when_the_peer_ends_or_sends_nonsense() {
    let known = members(&[("a", "7 {}")], &[]);
    let first = serde_json::to_vec(&known).expect("is JSON");
    for (rest, is_whole) in [(&[0u8; 4][..], true), (&[][..], false), (&[255; 9][..], false)] {
        let (mut there, here) = UnixStream::pair().expect("a pair");
        send_frame(&mut there, &first).await.expect("sent");
        send_frame(&mut there, b"a chain").await.expect("sent");
        there.write_all(rest).await.expect("sent");
        let receiving = tokio::spawn(receive(here));
        assert_eq!(there.read_u8().await.expect("a request"), 1);
        drop(there);
        let received = receiving.await.expect("no panic").expect("the records came");
        assert_eq!((received.members.records.len(), received.frames.len()), (1, 1));
        assert_eq!(received.is_whole, is_whole);
    }
    let (mut there, here) = UnixStream::pair().expect("a pair");
    there.write_all(b"\0\0\0\x02no").await.expect("sent");
    assert!(receive(here).await.is_err(), "without records there is no state");
}

#[tokio::test]
async fn takes_records_that_are_longer_than_a_frame_of_chains() {
    let text = format!("7 {}", "x".repeat(MAX_FRAME_BYTES));
    let known = members(&[("a", &text)], &[]);
    let (mut there, here) = UnixStream::pair().expect("a pair");
    let receiving = tokio::spawn(receive(here));
    send_frame(&mut there, &serde_json::to_vec(&known).expect("is JSON")).await.expect("sent");
    send_frame(&mut there, &[]).await.expect("sent");
    let received = receiving.await.expect("no panic").expect("the records came");
    assert_eq!((received.members == known, received.is_whole), (true, true));
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_does_not_delay_the_start() {
    let (there, here) = UnixStream::pair().expect("a pair");
    let start = Instant::now();
    assert!(receive(here).await.is_err());
    assert!(start.elapsed() <= MAX_RECEIVE_TIME + Duration::from_millis(10));
    drop(there);
}
