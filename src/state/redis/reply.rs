//! Parses answers of Redis; unexpected values parse as absent.

use std::time::Duration;

use redis::Value;

/// The id of an entry in the stream: milliseconds and a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct StreamId {
    pub millis: u64,
    pub number: u64,
}

/// One entry of the stream.
pub(super) struct StreamEntry<'v> {
    pub id: StreamId,
    pub bytes: &'v [u8],
}

/// The name of the one field of an entry.
pub(super) const FIELD: &str = "d";

/// Parses a string.
pub(super) fn text(value: &Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes.clone()).ok(),
        Value::SimpleString(text) => Some(text.clone()),
        Value::Int(number) => Some(number.to_string()),
        _ => None,
    }
}

fn items(value: &Value) -> &[Value] {
    match value {
        Value::Array(items) => items,
        _ => &[],
    }
}

/// Parses names with their values.
fn pairs(value: &Value) -> Vec<(String, String)> {
    let pair = |name: &Value, value: &Value| Some((text(name)?, text(value)?));
    match value {
        Value::Map(pairs) => pairs.iter().filter_map(|(name, value)| pair(name, value)).collect(),
        _ => items(value).chunks_exact(2).filter_map(|both| pair(&both[0], &both[1])).collect(),
    }
}

/// Parses the answer of `HSCAN`: the cursor of the next page, and the pairs of this one.
pub(super) fn scan_page(value: &Value) -> Option<(String, Vec<(String, String)>)> {
    let [cursor, page] = items(value) else { return None };
    Some((text(cursor)?, pairs(page)))
}

/// Parses the answer of `XREAD`: the entries of each stream with its key.
pub(super) fn read(value: &Value) -> Vec<(String, Vec<StreamEntry<'_>>)> {
    let stream = |key: &Value, list| Some((text(key)?, entries(list)));
    match value {
        Value::Map(streams) => streams.iter().filter_map(|(key, list)| stream(key, list)).collect(),
        _ => {
            items(value).iter().filter_map(|both| stream(items(both).first()?, items(both).get(1)?)).collect()
        }
    }
}

/// Parses the answer of `XRANGE` and `XREVRANGE`; foreign entries have no bytes.
pub(super) fn entries(value: &Value) -> Vec<StreamEntry<'_>> {
    items(value).iter().filter_map(entry).collect()
}

fn entry(value: &Value) -> Option<StreamEntry<'_>> {
    let [id, fields] = items(value) else { return None };
    let id = StreamId::parse(&text(id)?)?;
    let mut fields = items(fields).chunks_exact(2);
    let ours = fields.find(|field| matches!(&field[0], Value::BulkString(name) if name == FIELD.as_bytes()));
    let bytes: &[u8] = match ours {
        Some([_, Value::BulkString(bytes)]) => bytes,
        _ => &[],
    };
    Some(StreamEntry { id, bytes })
}

/// Parses the answer of `TIME`.
pub(super) fn time(value: &Value) -> Option<Duration> {
    let [seconds, micros] = items(value) else { return None };
    // What is later than any clock would overflow where times are added to it.
    let number = |value: &Value| text(value)?.parse::<u32>().ok().map(u64::from);
    Some(Duration::from_secs(number(seconds)?) + Duration::from_micros(number(micros)?))
}

/// Parses a number of entries; an unexpected value is none.
pub(super) fn count(value: &Value) -> usize {
    text(value).and_then(|text| text.parse().ok()).unwrap_or(0)
}

// === impl StreamId ===

impl StreamId {
    fn parse(text: &str) -> Option<Self> {
        let (millis, number) = text.split_once('-')?;
        Some(StreamId { millis: millis.parse().ok()?, number: number.parse().ok()? })
    }

    /// Returns the id after this one.
    pub(super) fn after(self) -> Self {
        match self.number.checked_add(1) {
            Some(number) => StreamId { number, ..self },
            None => StreamId { millis: self.millis.saturating_add(1), number: 0 },
        }
    }

    /// Returns the id before this one.
    pub(super) fn before(self) -> Option<Self> {
        match (self.millis, self.number) {
            (0, 0) => None,
            (millis, 0) => Some(StreamId { millis: millis - 1, number: u64::MAX }),
            (millis, number) => Some(StreamId { millis, number: number - 1 }),
        }
    }
}

impl std::fmt::Display for StreamId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.millis, self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    fn list(items: &[Value]) -> Value {
        Value::Array(items.to_vec())
    }

    #[test]
    fn parses_entries_of_both_protocols_and_foreign_ones() {
        let ours = list(&[bulk("12-3"), list(&[bulk("x"), bulk("?"), bulk("d"), bulk("bytes")])]);
        let stranger = list(&[bulk("12-4"), list(&[bulk("x"), bulk("d")])]);
        let wrong =
            [Value::Nil, list(&[bulk("12"), list(&[])]), list(&[bulk("a-b"), Value::Nil]), Value::Int(3)];
        let all = list(&[&[ours, stranger][..], &wrong].concat());
        let two = list(&[list(&[bulk("key"), all.clone()])]);
        let three = Value::Map(vec![(bulk("key"), all)]);
        for answer in [two, three] {
            let [(key, entries)] = &read(&answer)[..] else { panic!("one stream") };
            let found: Vec<(String, &[u8])> =
                entries.iter().map(|entry| (entry.id.to_string(), entry.bytes)).collect();
            assert_eq!(found, [("12-3".into(), &b"bytes"[..]), ("12-4".into(), &[])]);
            assert_eq!(key, "key");
        }
        assert!(read(&Value::Nil).is_empty());
    }

    #[test]
    fn orders_ids() {
        let id = |text: &str| StreamId::parse(text).expect(text);
        assert!(id("9-9") < id("10-0") && id("10-0") < id("10-1"));
        assert_eq!(id("10-0").before(), Some(StreamId { millis: 9, number: u64::MAX }));
        assert_eq!((id("10-2").before(), id("0-0").before()), (Some(id("10-1")), None));
        assert_eq!((id("9-9").after(), id("9-18446744073709551615").after()), (id("9-10"), id("10-0")));
    }

    #[test]
    fn parses_times_and_pairs() {
        assert_eq!(time(&list(&[bulk("12"), bulk("345678")])), Some(Duration::from_micros(12_345_678)));
        assert_eq!((time(&Value::Nil), time(&list(&[bulk("x"), bulk("1")]))), (None, None));
        assert_eq!((count(&Value::Int(3)), count(&bulk("4")), count(&Value::Nil)), (3, 4, 0));
        let wanted = vec![("a".to_string(), "1".to_string())];
        assert_eq!(pairs(&list(&[bulk("a"), bulk("1"), bulk("odd")])), wanted);
        assert_eq!(pairs(&Value::Map(vec![(bulk("a"), bulk("1")), (bulk("b"), Value::Nil)])), wanted);
    }
}
