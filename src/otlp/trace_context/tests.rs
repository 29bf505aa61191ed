//! Tests of the trace context: valid and malformed fields, and the sampled share.

use proptest::prelude::*;

use super::*;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

fn parent(version: &str, trace: &str, span: &str, flags: &str, rest: &str) -> Option<TraceParent> {
    TraceParent::parse(format!("{version}-{trace}-{span}-{flags}{rest}").as_bytes())
}

#[test]
fn parses_valid_fields() {
    let table = [
        ("00", "00", "", 0),
        ("00", "01", "", 1),
        ("00", "02", "", 2),
        ("00", "03", "", 3),
        // Unknown flags are not passed on.
        ("00", "ff", "", 3),
        ("00", "fc", "", 0),
        // A later version may have further parts.
        ("01", "01", "", 1),
        ("cc", "01", "-what-the-future-will-be-like", 1),
        ("fe", "01", "-", 1),
    ];
    for (version, flags, rest, read) in table {
        let found = parent(version, TRACE, SPAN, flags, rest).expect(rest);
        assert_eq!(found.render(), format!("00-{TRACE}-{SPAN}-{read:02x}"), "{version} {flags}");
        assert_eq!(found.is_sampled(), read & 1 == 1);
    }
    let blanks = format!(" \t00-{TRACE}-{SPAN}-01 ");
    assert!(TraceParent::parse(blanks.as_bytes()).is_some(), "blanks around a value are not part of it");
}

#[test]
fn rejects_malformed_fields() {
    let upper = TRACE.to_uppercase();
    let table = [
        ("ff", TRACE, SPAN, "01", ""),
        ("ff", TRACE, SPAN, "01", "-more"),
        ("00", "00000000000000000000000000000000", SPAN, "01", ""),
        ("00", TRACE, "0000000000000000", "01", ""),
        ("cc", TRACE, "0000000000000000", "01", ""),
        ("00", &upper, SPAN, "01", ""),
        ("00", TRACE, "B7AD6B7169203331", "01", ""),
        ("00", TRACE, SPAN, "0A", ""),
        ("0A", TRACE, SPAN, "01", ""),
        ("00", &TRACE[1..], SPAN, "01", ""),
        ("00", TRACE, &SPAN[1..], "01", ""),
        ("00", TRACE, SPAN, "1", ""),
        ("0", TRACE, SPAN, "01", ""),
        ("000", TRACE, SPAN, "01", ""),
        ("00", TRACE, SPAN, "001", ""),
        ("00", TRACE, SPAN, "01", "-more"),
        ("00", TRACE, SPAN, "01", "-"),
        ("00", TRACE, SPAN, "01", "."),
        ("cc", TRACE, SPAN, "01", ".what-the-future-will-be-like"),
        ("..", TRACE, SPAN, "01", ""),
        ("00", "0af7651916cd43dd8448eb211c80319.", SPAN, "01", ""),
        ("00", TRACE, "b7ad6b716920333g", "01", ""),
        ("00", TRACE, SPAN, ".1", ""),
        ("00", TRACE, SPAN, "é", ""),
    ];
    for (version, trace, span, flags, rest) in table {
        assert_eq!(
            parent(version, trace, span, flags, rest),
            None,
            "{version} {trace} {span} {flags} {rest}"
        );
    }
    for text in ["", "00", "-", &format!("00_{TRACE}-{SPAN}-01"), &format!("00-{TRACE}-{SPAN}_01")] {
        assert_eq!(TraceParent::parse(text.as_bytes()), None, "{text}");
    }
    assert_eq!(TraceParent::parse(&[0xff; PARENT_BYTES]), None);
}

const SEED: [u64; 3] = [0x0102_0304_0506_0708, 0x1112_1314_1516_1718, 0x2122_2324_2526_2728];

fn begin(fields: &[&str], share: f64) -> Option<RequestTrace> {
    RequestTrace::begin(fields.iter().map(|field| field.as_bytes()), share, SEED)
}

#[test]
fn joins_the_trace_of_a_client_that_records_it() {
    let field = format!("00-{TRACE}-{SPAN}-01");
    for share in [0.0, 1.0] {
        let trace = begin(&[&field], share).expect("is recorded, whatever the share");
        assert!(trace.is_sampled() && !trace.is_root());
        assert_eq!(trace.towards_upstream(), format!("00-{TRACE}-2122232425262728-01"));
        assert_eq!(trace.parent_id, Some([0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]));
    }
}

#[test]
fn passes_a_trace_that_the_client_does_not_record() {
    assert_eq!(begin(&[&format!("00-{TRACE}-{SPAN}-00")], 1.0), None);
    assert_eq!(begin(&[&format!("00-{TRACE}-{SPAN}-02")], 1.0), None);
}

#[test]
fn begins_a_trace_without_one_valid_field() {
    let field = format!("00-{TRACE}-{SPAN}-01");
    let wrong = format!("ff-{TRACE}-{SPAN}-01");
    for fields in [&[][..], &[&*wrong], &[&*field, &*field], &[&*field, &*wrong], &[""]] {
        for (share, flags) in [(0.0, "00"), (1.0, "01")] {
            let trace = begin(fields, share).expect("a trace begins");
            assert!(trace.is_root());
            let wanted = format!("00-01020304050607081112131415161718-2122232425262728-{flags}");
            assert_eq!(trace.towards_upstream(), wanted, "{fields:?}");
        }
    }
}

#[test]
fn ids_are_never_zero() {
    let trace = RequestTrace::begin([], 0.0, [0; 3]).expect("a trace begins");
    assert!(TraceParent::parse(trace.towards_upstream().as_bytes()).is_some());
}

#[test]
fn a_share_of_the_traces_is_sampled() {
    for (random, share, sampled) in [
        (0, 0.0, false),
        (u64::MAX, 1.0, true),
        (0, 1.0, true),
        (0, f64::MIN_POSITIVE, true),
        (u64::MAX, 0.999_999, false),
        (1 << (DRAW_BITS - 1), 0.5, false),
        ((1 << (DRAW_BITS - 1)) - 1, 0.5, true),
    ] {
        assert_eq!(draws(random, share), sampled, "{random} {share}");
    }
}

proptest! {
    #[test]
    fn parses_what_it_renders(
        trace_id in any::<TraceId>(),
        parent_id in any::<SpanId>(),
        flags in 0u8..4,
    ) {
        let parent = TraceParent { trace_id, parent_id, flags };
        let valid = trace_id != [0; 16] && parent_id != [0; 8];
        prop_assert_eq!(TraceParent::parse(parent.render().as_bytes()), valid.then_some(parent));
    }

    #[test]
    fn never_panics(
        field in any::<Vec<u8>>(),
        text in "[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\\PC{0,3}",
    ) {
        let _ = (TraceParent::parse(&field), TraceParent::parse(text.as_bytes()));
    }
}
