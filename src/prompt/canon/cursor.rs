//! Walks over a piece of JSON that may be cut at any byte, and hands out its values as they stand.
//!
//! An object is read into one slot for each name that is asked for, so that the order of its keys does
//! not matter and the last of two equal keys counts. Nothing is decoded, copied or allocated.
//!
//! Never: recursion, a panic. What is no JSON is the same as what is cut: from there on no value is returned.

use super::super::scan::bytes::string_end;
use super::super::work::spend;
use super::text::{ShortText, decode};

/// The bytes end here, or they are no JSON from here on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndOfJson;

/// A value as it stands in the body, brackets and quotes included.
#[derive(Clone, Copy, Debug)]
pub struct RawValue<'a> {
    pub bytes: &'a [u8],
    /// Its end has been seen.
    pub whole: bool,
}

/// The values of the requested keys, in the order of the names.
pub struct ObjectSlots<'a, const N: usize> {
    values: [Option<RawValue<'a>>; N],
    pub whole: bool,
}

pub struct JsonCursor<'a> {
    bytes: &'a [u8],
    pub at: usize,
}

/// The elements of an array; the caller reads each one from the cursor.
pub struct JsonList<'a> {
    pub cursor: JsonCursor<'a>,
    begun: bool,
}

// === impl Raw ===

impl<'a> RawValue<'a> {
    pub fn first(self) -> u8 {
        self.bytes.first().copied().unwrap_or(0)
    }

    /// The bytes between the quotes of a string, as far as they are there.
    pub fn string(self) -> Option<&'a [u8]> {
        let inner = self.bytes.strip_prefix(b"\"")?;
        if self.whole { inner.strip_suffix(b"\"") } else { Some(inner) }
    }

    /// What was cut ends what can be said, however much of it has been used.
    pub fn end(self) -> Result<(), EndOfJson> {
        if self.whole { Ok(()) } else { Err(EndOfJson) }
    }
}

// === impl Object ===

impl<'a, const N: usize> ObjectSlots<'a, N> {
    /// The value in a slot; none where it is null, or where the object is over and had none.
    pub fn get(&self, slot: usize) -> Result<Option<RawValue<'a>>, EndOfJson> {
        match self.values[slot] {
            None if self.whole => Ok(None),
            None => Err(EndOfJson),
            Some(raw) if raw.whole && raw.bytes == b"null" => Ok(None),
            Some(raw) if raw.whole || matches!(raw.first(), b'"' | b'{' | b'[') => Ok(Some(raw)),
            Some(_) => Err(EndOfJson),
        }
    }

    /// The first of several slots that has a value.
    pub fn first_of(&self, slots: &[usize]) -> Result<Option<RawValue<'a>>, EndOfJson> {
        let present = slots.iter().find_map(|slot| self.get(*slot).ok().flatten());
        if present.is_some() || self.whole { Ok(present) } else { Err(EndOfJson) }
    }
}

// === impl Cursor ===

impl<'a> JsonCursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        JsonCursor { bytes, at: 0 }
    }

    /// The next byte that is no white space, at which the cursor then stands.
    #[inline]
    pub fn byte(&mut self) -> Result<u8, EndOfJson> {
        while let Some(&byte) = self.bytes.get(self.at) {
            spend(1);
            if !byte.is_ascii_whitespace() {
                return Ok(byte);
            }
            self.at += 1;
        }
        Err(EndOfJson)
    }

    fn eat(&mut self, expected: u8) -> Result<(), EndOfJson> {
        if self.byte()? != expected {
            return Err(EndOfJson);
        }
        self.at += 1;
        Ok(())
    }

    /// The next value; an error where nothing of one is there.
    pub fn value(&mut self) -> Result<RawValue<'a>, EndOfJson> {
        let first = self.byte()?;
        let start = self.at;
        let end = match first {
            b'"' => string_end(self.bytes, start + 1, start + 1).map(|quote| quote + 1),
            b'{' | b'[' => self.container_end(),
            b',' | b':' | b']' | b'}' => return Err(EndOfJson),
            _ => self.scalar_end(),
        };
        self.at = end.unwrap_or(self.bytes.len());
        Ok(RawValue { bytes: &self.bytes[start..self.at], whole: end.is_some() })
    }

    fn scalar_end(&self) -> Option<usize> {
        let ends = |byte: &u8| byte.is_ascii_whitespace() || matches!(byte, b',' | b']' | b'}' | b'"');
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(ends);
        spend(length.unwrap_or(rest.len()));
        Some(self.at + length?)
    }

    fn container_end(&self) -> Option<usize> {
        let mut depth = 0_u64;
        let mut at = self.at;
        loop {
            spend(1);
            match self.bytes.get(at)? {
                b'"' => at = string_end(self.bytes, at + 1, at + 1)?,
                b'{' | b'[' => depth += 1,
                b'}' | b']' if depth == 1 => return Some(at + 1),
                b'}' | b']' => depth -= 1,
                _ => {}
            }
            at += 1;
        }
    }

    /// Reads an object, as far as it is there.
    pub fn object<const N: usize>(&mut self, names: &[&str; N]) -> ObjectSlots<'a, N> {
        let mut values = [None; N];
        let whole = self.entries(names, &mut values).is_ok();
        ObjectSlots { values, whole }
    }

    fn entries(&mut self, names: &[&str], values: &mut [Option<RawValue<'a>>]) -> Result<(), EndOfJson> {
        self.eat(b'{')?;
        if self.byte()? == b'}' {
            self.at += 1;
            return Ok(());
        }
        loop {
            let key = self.value()?;
            let slot = slot_of(key.string().filter(|_| key.whole).ok_or(EndOfJson)?, names);
            self.eat(b':')?;
            let value = self.value()?;
            if let Some(slot) = slot {
                values[slot] = Some(value);
            }
            value.end()?;
            match self.byte()? {
                b',' => self.at += 1,
                b'}' => break,
                _ => return Err(EndOfJson),
            }
        }
        self.at += 1;
        Ok(())
    }
}

/// Which of the names a key is, given the bytes between its quotes.
fn slot_of(key: &[u8], names: &[&str]) -> Option<usize> {
    spend(key.len());
    let position = |key: &[u8]| names.iter().position(|name| name.as_bytes() == key);
    // No name has an escape.
    let plain = position(key);
    if plain.is_some() || memchr::memchr(b'\\', key).is_none() {
        return plain;
    }
    let mut short = ShortText::default();
    decode(key, true, &mut short);
    position(short.text()?)
}

// === impl List ===

impl<'a> JsonList<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        JsonList { cursor: JsonCursor::new(bytes), begun: false }
    }

    /// Whether the cursor now stands before an element; false at the end of the array.
    pub fn next(&mut self) -> Result<bool, EndOfJson> {
        let cursor = &mut self.cursor;
        if !self.begun {
            cursor.eat(b'[')?;
            let byte = cursor.byte()?;
            self.begun = true;
            cursor.at += usize::from(byte == b']');
            return Ok(byte != b']');
        }
        let byte = cursor.byte()?;
        cursor.at += 1;
        match byte {
            b',' => Ok(true),
            b']' => Ok(false),
            _ => Err(EndOfJson),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(text: &str, names: &[&str; N]) -> (Vec<Result<Option<String>, EndOfJson>>, bool) {
        let object = JsonCursor::new(text.as_bytes()).object(names);
        let value =
            |slot| object.get(slot).map(|raw| raw.map(|raw| String::from_utf8_lossy(raw.bytes).into_owned()));
        ((0..N).map(value).collect(), object.whole)
    }

    #[test]
    fn slots_are_filled_in_whatever_order_the_keys_come() {
        let some = |text: &str| Ok(Some(text.to_owned()));
        for (text, role, content, whole) in [
            (r#"{"role":"a","content":"b"}"#, some(r#""a""#), some(r#""b""#), true),
            (
                r#" { "content" : [1, {"]":"\"}"}] , "role" : 7 } "#,
                some("7"),
                some(r#"[1, {"]":"\"}"}]"#),
                true,
            ),
            (r#"{"r\u006fle":"a","x":{"role":"no"}}"#, some(r#""a""#), Ok(None), true),
            (r#"{"role":"a","role":"b","content":null}"#, some(r#""b""#), Ok(None), true),
            (r#"{"role":"a","cont"#, some(r#""a""#), Err(EndOfJson), false),
            (r#"{"role":"a","content":["b","#, some(r#""a""#), some(r#"["b","#), false),
            (r#"{"role":"a","content":nu"#, some(r#""a""#), Err(EndOfJson), false),
            (r#"{"role":"a" "content":"b"}"#, some(r#""a""#), Err(EndOfJson), false),
            (r#"{}"#, Ok(None), Ok(None), true),
            ("", Err(EndOfJson), Err(EndOfJson), false),
            ("]", Err(EndOfJson), Err(EndOfJson), false),
        ] {
            let (values, is_whole) = read(text, &["role", "content"]);
            assert_eq!((values, is_whole), (vec![role, content], whole), "{text}");
        }
    }

    #[test]
    fn the_elements_of_a_list_come_one_after_the_other() {
        for (text, elements, end) in [
            ("[]", vec![], Ok(false)),
            (" [ ] ", vec![], Ok(false)),
            (r#"[1 ,"a]", [2,[3]],{"b":[]}]"#, vec!["1", r#""a]""#, "[2,[3]]", r#"{"b":[]}"#], Ok(false)),
            ("[1,2", vec!["1", "2"], Err(EndOfJson)),
            ("[1;2]", vec!["1;2"], Ok(false)),
            ("[[1],", vec!["[1]"], Err(EndOfJson)),
            ("{}", vec![], Err(EndOfJson)),
        ] {
            let mut list = JsonList::new(text.as_bytes());
            let mut found = Vec::new();
            let last = loop {
                match list.next() {
                    Ok(true) => {}
                    end => break end,
                }
                match list.cursor.value() {
                    Ok(raw) => found.push(std::str::from_utf8(raw.bytes).unwrap()),
                    Err(cut) => break Err(cut),
                }
            };
            assert_eq!((found, last), (elements, end), "{text}");
        }
    }
}
