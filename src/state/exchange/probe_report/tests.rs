//! Tests of probe reports: absent, implausible and damaged parts.

use proptest::prelude::*;

use super::super::{Message, MessageError};
use super::*;

fn whole() -> UpstreamReport {
    let second = Duration::from_secs(1);
    UpstreamReport {
        upstream: "gpu:1".into(),
        server: u64::MAX,
        probe: Some(ProbeFinding { age: second, good: true, models: 7 }),
        cards: Some(r#"{"data":[]}"#.into()),
        version: Some("0.32.0".into()),
        engine: Some(EngineFinding {
            age: second,
            running: Some(3),
            waiting: Some(0),
            kv_usage: Some(0.25),
            cache_tokens: Some(1 << 20),
            started: Some(1_800_000_000.123_456_7),
            foreign: Some((2, 2000)),
            prefix_caching: Some(false),
        }),
        busy: Some(second),
        tripped: Some(5 * second),
    }
}

fn carried(reports: &[UpstreamReport]) -> Vec<UpstreamReport> {
    let message = Message { reports: reports.to_vec(), ..Message::new(1, 2) };
    Message::decode(&message.encode()).expect("it was just written").reports
}

#[test]
fn carries_reports_with_any_of_their_parts() {
    let bare = UpstreamReport { upstream: "b".into(), server: 1, ..UpstreamReport::default() };
    let engine = EngineFinding { waiting: Some(9), ..EngineFinding::default() };
    let some = UpstreamReport { engine: Some(engine), ..bare.clone() };
    let all = [whole(), bare, some];
    assert_eq!(carried(&all), all);
}

#[test]
fn treats_implausible_values_as_absent() {
    let long = |count: usize| Some("x".repeat(count).into_boxed_str());
    let hostile = UpstreamReport {
        cards: long(MAX_CARDS_BYTES + 1),
        version: long(MAX_VERSION_BYTES + 1),
        engine: Some(EngineFinding {
            running: Some(u64::MAX),
            kv_usage: Some(7.0),
            started: Some(f64::INFINITY),
            foreign: Some((u64::MAX, 1)),
            ..EngineFinding::default()
        }),
        ..UpstreamReport::default()
    };
    let engine = Some(EngineFinding::default());
    assert_eq!(carried(&[hostile]), [UpstreamReport { engine, ..UpstreamReport::default() }]);
    let name = "n".repeat(MAX_NAME_BYTES + 1).into();
    assert_eq!(carried(&[UpstreamReport { upstream: name, ..whole() }, whole()]), [whole()]);
    assert_eq!(carried(&vec![whole(); MAX_REPORTS + 9]).len(), MAX_REPORTS);
    // A time is limited where it is written, and refused where another program wrote it.
    let busy = |busy| UpstreamReport { busy: Some(busy), ..UpstreamReport::default() };
    assert_eq!(carried(&[busy(Duration::MAX)]), [busy(MAX_TIME)]);
    let mut long = Vec::new();
    put_number(&mut long, u64::MAX);
    assert_eq!(read_time(&mut WireReader::new(&long)), None);
}

#[test]
fn skips_a_damaged_report_and_unknown_fields() {
    let mut part = Vec::new();
    put_bytes(&mut part, b"\x05gpu");
    let mut newer = Vec::new();
    put_bytes(&mut newer, b"a");
    put_hash(&mut newer, 9);
    put_number(&mut newer, 1000);
    put_bytes(&mut newer, b"later");
    put_number(&mut newer, field::BUSY);
    put_bytes(&mut newer, &time(Duration::from_secs(1)));
    put_bytes(&mut part, &newer);
    whole().write(&mut part);
    let reports = UpstreamReport::read_all(&mut WireReader::new(&part)).expect("the frame is intact");
    assert_eq!((reports.len(), &*reports[0].upstream, &reports[1]), (2, "a", &whole()));
    assert_eq!(reports[0].busy, Some(Duration::from_secs(1)));
    part.truncate(part.len() - 1);
    assert_eq!(UpstreamReport::read_all(&mut WireReader::new(&part)), None);
}

proptest! {
    #[test]
    fn reads_any_bytes_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        drop(UpstreamReport::read_all(&mut WireReader::new(&bytes)));
        let mut message = Message { reports: vec![whole()], ..Message::new(1, 2) }.encode();
        for (at, byte) in bytes.iter().enumerate() {
            let at = (at * 31 + usize::from(*byte)) % message.len();
            message[at] ^= byte;
        }
        let read: Result<Message<'_>, MessageError> = Message::decode(&message);
        drop(read);
    }
}
