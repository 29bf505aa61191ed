//! The trace of a request by the fields `traceparent` and `tracestate` (W3C Trace Context, version 00).
//!
//! ```text
//! traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01
//!              version, trace id, parent id, flags
//! ```
//!
//! A request joins the trace of its client if the client has sampled it; the span of the request then becomes
//! the parent of what the engine records. A trace that the client has not sampled passes unchanged. Without a
//! valid field the request begins a trace, which the configured share samples; a `tracestate` that belongs to
//! no valid `traceparent` is dropped.
//!
//! Never: a random number of its own, a field of a header map.

/// The length of a `traceparent` of version 00, in bytes.
const PARENT_BYTES: usize = 55;

/// The flag of a sampled trace.
const SAMPLED_FLAG: u8 = 1;

/// The flags that are passed on: sampled, and that the trace id is random (level 2). Others are unknown.
const KNOWN_FLAGS: u8 = SAMPLED_FLAG | 2;

/// The bits of a trace id that decide whether a new trace is sampled: as many as a float holds.
const DRAW_BITS: u32 = 53;

/// The id of a trace; not 0.
pub type TraceId = [u8; 16];

/// The id of a span within its trace; not 0.
pub type SpanId = [u8; 8];

/// A valid `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    pub trace_id: TraceId,
    pub parent_id: SpanId,
    pub flags: u8,
}

/// The trace of one request, and its span in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestTrace {
    pub trace_id: TraceId,
    /// The span of the request, which is the parent of the engine's spans.
    pub span_id: SpanId,
    /// The client's span; `None` where the trace begins here.
    pub parent_id: Option<SpanId>,
    pub flags: u8,
}

// === impl TraceParent ===

impl TraceParent {
    /// Parses the value of a field. A later version is read as far as version 00 goes.
    pub fn parse(field: &[u8]) -> Option<Self> {
        let field = field.trim_ascii();
        let (known, rest) = field.split_at_checked(PARENT_BYTES)?;
        let version = hex::<1>(&known[..2])?[0];
        let ends = if version == 0 { rest.is_empty() } else { rest.is_empty() || rest[0] == b'-' };
        let dashes = [2, 35, 52].iter().all(|at| known[*at] == b'-');
        if version == u8::MAX || !ends || !dashes {
            return None;
        }
        let (trace_id, parent_id) = (hex(&known[3..35])?, hex(&known[36..52])?);
        let [flags] = hex(&known[53..])?;
        let is_set = trace_id != TraceId::default() && parent_id != SpanId::default();
        is_set.then_some(TraceParent { trace_id, parent_id, flags: flags & KNOWN_FLAGS })
    }

    /// Whether the client records the trace.
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED_FLAG != 0
    }

    /// The value of the field in version 00.
    pub fn render(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = String::with_capacity(PARENT_BYTES);
        let mut push = |bytes: &[u8]| {
            for byte in bytes {
                text.push(char::from(DIGITS[usize::from(byte >> 4)]));
                text.push(char::from(DIGITS[usize::from(byte & 15)]));
            }
            if text.len() < PARENT_BYTES {
                text.push('-');
            }
        };
        push(&[0]);
        push(&self.trace_id);
        push(&self.parent_id);
        push(&[self.flags]);
        text
    }
}

/// Parses lower-case hexadecimal digits, two a byte.
fn hex<const BYTES: usize>(digits: &[u8]) -> Option<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

// === impl RequestTrace ===

impl RequestTrace {
    /// The trace of a request with these `traceparent` fields. `share` of the new traces is sampled; `seed`
    /// is three random numbers. `None`: the client's trace is not sampled and passes unchanged.
    pub fn begin<'a>(fields: impl IntoIterator<Item = &'a [u8]>, share: f64, seed: [u64; 3]) -> Option<Self> {
        let mut fields = fields.into_iter();
        let parent = fields.next().and_then(TraceParent::parse).filter(|_| fields.next().is_none());
        let span_id = seed[2].max(1).to_be_bytes();
        if let Some(parent) = parent {
            let joined = RequestTrace {
                trace_id: parent.trace_id,
                span_id,
                parent_id: Some(parent.parent_id),
                flags: parent.flags,
            };
            return parent.is_sampled().then_some(joined);
        }
        let mut trace_id = TraceId::default();
        trace_id[..8].copy_from_slice(&seed[0].max(1).to_be_bytes());
        trace_id[8..].copy_from_slice(&seed[1].to_be_bytes());
        let flags = if draws(seed[1], share) { SAMPLED_FLAG } else { 0 };
        Some(RequestTrace { trace_id, span_id, parent_id: None, flags })
    }

    /// Whether the request's spans are recorded.
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED_FLAG != 0
    }

    /// Whether the trace begins with this request, so that the client's fields are dropped.
    pub fn is_root(&self) -> bool {
        self.parent_id.is_none()
    }

    /// The `traceparent` for the engine.
    pub fn towards_upstream(&self) -> String {
        let RequestTrace { trace_id, span_id: parent_id, flags, .. } = *self;
        TraceParent { trace_id, parent_id, flags }.render()
    }
}

/// Whether a random number falls into this share of all numbers.
fn draws(random: u64, share: f64) -> bool {
    let limit = share * (1u64 << DRAW_BITS) as f64;
    ((random & ((1 << DRAW_BITS) - 1)) as f64) < limit
}

#[cfg(test)]
mod tests {
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
}
