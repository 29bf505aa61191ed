//! A body that was edited: what is in it as it was before is not read again.

use super::{ScannedKind, ScannedValue, Scanner};

/// What a scanner has found in another body.
pub(super) struct KnownValues<'a> {
    body: &'a [u8],
    values: &'a [Option<ScannedValue>],
}

impl KnownValues<'_> {
    pub(super) const NOTHING: KnownValues<'static> = KnownValues { body: &[], values: &[] };
}

impl Scanner {
    /// The scanner of what `old`, which this one has read, became.
    pub fn of_edited(&self, old: &[u8], edited: &[u8]) -> Scanner {
        let mut scanner = Scanner::new();
        scanner.scan_with(edited, &KnownValues { body: old, values: &self.values });
        scanner
    }

    /// Where the value that begins at this byte ends, if it is a field's.
    pub fn end_of(&self, start: usize) -> Option<usize> {
        self.values.iter().flatten().find(|value| value.start == start).map(|value| value.end)
    }

    /// Takes a value that is, byte for byte, the one that the field had before. It ends where that ended:
    /// what has quotes or brackets around it says itself where it ends.
    pub(super) fn copy_known(&mut self, body: &[u8], known: &KnownValues<'_>) -> bool {
        let value = self.field.and_then(|field| *known.values.get(field.index())?);
        let closed =
            |value: &ScannedValue| matches!(value.kind, ScannedKind::String | ScannedKind::Container);
        let Some(value) = value.filter(closed) else { return false };
        let end = self.at + (value.end - value.start);
        let same =
            body.get(self.at..end).filter(|here| Some(*here) == known.body.get(value.start..value.end));
        if same.is_none() {
            return false;
        }
        self.prompt = value.prompt;
        self.finish(value.kind, self.at, end)
    }
}
