//! Scans an edited body without reading its unchanged values again.

use super::{FieldValues, PromptWeight, ScannedValue, Scanner};
use crate::json::{GrownValue, MemberKind, MemberSink};

/// The values found in the original body and those found in the edited one.
struct KnownValues<'a> {
    body: &'a [u8],
    values: &'a [Option<ScannedValue>],
    found: &'a mut FieldValues,
}

impl Scanner {
    /// The scanner of what `old`, which this one has read, became.
    pub fn of_edited(&self, old: &[u8], edited: &[u8]) -> Scanner {
        let mut scanner = Scanner::new();
        let mut known = KnownValues { body: old, values: &self.found.values, found: &mut scanner.found };
        scanner.object.read(edited, &mut known);
        scanner
    }

    /// The end of the value that begins at this byte, if it is the value of a field.
    pub fn end_of(&self, start: usize) -> Option<usize> {
        let mut values = self.found.values.iter().flatten();
        values.find(|value| value.start == start).map(|value| value.end)
    }
}

// === impl KnownValues ===

impl KnownValues<'_> {
    /// The value that the field in progress had before.
    fn before(&self) -> Option<ScannedValue> {
        self.found.field.and_then(|field| *self.values.get(field.index())?)
    }
}

impl MemberSink<PromptWeight> for KnownValues<'_> {
    fn key(&mut self, raw: &[u8]) {
        self.found.key(raw);
    }

    /// The end of a value that equals, byte for byte, the field's original value. Only values in quotes or
    /// brackets are recognised, since their bytes contain their end.
    fn known_end(&mut self, body: &[u8], at: usize) -> Option<usize> {
        let value = self.before()?;
        let is_closed = matches!(value.kind, MemberKind::String | MemberKind::Container);
        let end = at + (value.end - value.start);
        let is_same = body.get(at..end)? == self.body.get(value.start..value.end)?;
        (is_closed && is_same).then_some(end)
    }

    fn value(&mut self, body: &[u8], value: GrownValue<PromptWeight>) {
        let read = value.read.or_else(|| {
            let before = self.before()?;
            Some((before.kind, PromptWeight(before.prompt)))
        });
        self.found.value(body, GrownValue { read, ..value });
    }
}
