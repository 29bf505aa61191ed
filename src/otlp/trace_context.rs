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
pub(crate) type TraceId = [u8; 16];

/// The id of a span within its trace; not 0.
pub(crate) type SpanId = [u8; 8];

/// A valid `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TraceParent {
    pub trace_id: TraceId,
    pub parent_id: SpanId,
    pub flags: u8,
}

/// The trace of one request, and its span in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestTrace {
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
    pub(crate) fn parse(field: &[u8]) -> Option<Self> {
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
    pub(crate) fn is_sampled(&self) -> bool {
        self.flags & SAMPLED_FLAG != 0
    }

    /// The value of the field in version 00.
    pub(crate) fn render(&self) -> String {
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
    pub(crate) fn begin<'a>(
        fields: impl IntoIterator<Item = &'a [u8]>,
        share: f64,
        seed: [u64; 3],
    ) -> Option<Self> {
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
    pub(crate) fn is_sampled(&self) -> bool {
        self.flags & SAMPLED_FLAG != 0
    }

    /// Whether the trace begins with this request, so that the client's fields are dropped.
    pub(crate) fn is_root(&self) -> bool {
        self.parent_id.is_none()
    }

    /// The `traceparent` for the engine.
    pub(crate) fn towards_upstream(&self) -> String {
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
mod tests;
