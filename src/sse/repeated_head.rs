//! The part of an event's data that all events of a chat's or a completion's stream repeat.
//!
//! vLLM begins each event of a stream with the same `id`, `object`, `created` and `model`. A reader that has
//! read them once skips them in the events that begin with the same bytes.
//!
//! Never: a head of which a byte differs, a head above [`MAX_HEAD_BYTES`].

use memchr::memmem;

/// The longest head that is remembered.
const MAX_HEAD_BYTES: usize = 1 << 10;

/// The end of a head.
const CHOICES: &[u8] = b",\"choices\":[";

/// The data of the last read event, from its brace to the bracket of its choices.
#[derive(Debug, Default)]
pub struct RepeatedHead {
    /// Empty: none is known.
    head: Vec<u8>,
}

impl RepeatedHead {
    /// Returns the position of the comma before `"choices"`, if the data begins with the remembered head.
    pub fn comma_in(&self, data: &[u8]) -> Option<usize> {
        let is_same = !self.head.is_empty() && data.starts_with(&self.head);
        is_same.then(|| self.head.len() - CHOICES.len())
    }

    /// The number of bytes of the head, with the bracket of the choices.
    pub fn bytes(&self) -> usize {
        self.head.len()
    }

    /// Remembers the head of an event that was read to its end. Its members before the choices are strings,
    /// numbers and literals.
    pub fn remember(&mut self, data: &[u8]) {
        self.head.clear();
        let Some(comma) = memmem::find(&data[..data.len().min(MAX_HEAD_BYTES)], CHOICES) else { return };
        // A bracket of any kind may be an object around these choices.
        let is_flat = |members: &[u8]| !members.iter().any(|byte| matches!(byte, b'{' | b'}' | b'[' | b']'));
        if data.first() == Some(&b'{') && is_flat(&data[1..comma]) {
            self.head.extend_from_slice(&data[..comma + CHOICES.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(data: &str) -> RepeatedHead {
        let mut head = RepeatedHead::default();
        head.remember(data.as_bytes());
        head
    }

    #[test]
    fn finds_the_choices_behind_an_equal_head() {
        let head = of(r#"{"id":"a","created":1,"choices":[{"index":0}]}"#);
        assert_eq!(head.comma_in(br#"{"id":"a","created":1,"choices":[]}"#), Some(21));
        for other in [
            r#"{"id":"b","created":1,"choices":[]}"#,
            r#"{"id":"a","created":1,"choices":null}"#,
            r#"{"id":"a""#,
            "",
        ] {
            assert_eq!(head.comma_in(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn remembers_no_head_with_an_object_or_a_list() {
        for data in [
            r#"{"meta":{"x":1,"choices":[]}}"#,
            r#"{"ids":[1],"choices":[]}"#,
            r#"{"choices":[]}"#,
            r#"[{"id":1,"choices":[]}]"#,
            r#"{"id":"a"}"#,
            "",
        ] {
            assert_eq!(of(data).comma_in(data.as_bytes()), None, "{data}");
        }
        let long = format!(r#"{{"id":"{}","choices":[]}}"#, "a".repeat(MAX_HEAD_BYTES));
        assert_eq!(of(&long).comma_in(long.as_bytes()), None);
    }
}
