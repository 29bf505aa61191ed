//! Writes JSON without the white space between its tokens, and without escapes in its strings.

use super::text::{ByteSink, MAX_ESCAPE_BYTES, escape, is_undecided};
use super::work::spend;

/// Takes JSON in whatever pieces it comes, so that it can stand behind [`decode`](super::text::decode): the
/// arguments of a call are JSON in one interface and a string that holds JSON in others. What is no JSON
/// comes out as something, and always as the same.
pub(crate) struct Minifier<'s, S> {
    out: &'s mut S,
    place: MinifierState,
}

#[derive(Clone, Copy)]
enum MinifierState {
    Between,
    InString,
    InEscape { held: [u8; MAX_ESCAPE_BYTES], length: usize },
}

impl<'s, S: ByteSink> Minifier<'s, S> {
    pub(crate) fn new(out: &'s mut S) -> Self {
        Minifier { out, place: MinifierState::Between }
    }

    fn between<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let stops = |byte: &u8| matches!(byte, b'"' | b' ' | b'\n' | b'\r' | b'\t');
        let run = bytes.iter().position(stops).unwrap_or(bytes.len());
        match bytes.get(run) {
            Some(b'"') => {
                self.out.write(&bytes[..=run]);
                self.place = MinifierState::InString;
            }
            _ => self.out.write(&bytes[..run]),
        }
        bytes.get(run + 1..).unwrap_or_default()
    }

    fn in_string<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let run = memchr::memchr2(b'"', b'\\', bytes).unwrap_or(bytes.len());
        match bytes.get(run) {
            Some(b'"') => {
                self.out.write(&bytes[..=run]);
                self.place = MinifierState::Between;
            }
            Some(_) => {
                self.out.write(&bytes[..run]);
                let mut held = [0; MAX_ESCAPE_BYTES];
                held[0] = b'\\';
                self.place = MinifierState::InEscape { held, length: 1 };
            }
            None => self.out.write(bytes),
        }
        bytes.get(run + 1..).unwrap_or_default()
    }

    /// Takes one byte, or none when it does not belong to the escape that it decides.
    fn in_escape<'b>(
        &mut self,
        mut held: [u8; MAX_ESCAPE_BYTES],
        length: usize,
        bytes: &'b [u8],
    ) -> &'b [u8] {
        held[length] = bytes[0];
        let seen = &held[..=length];
        if is_undecided(seen) {
            self.place = MinifierState::InEscape { held, length: length + 1 };
            return &bytes[1..];
        }
        let (character, used) = escape(seen);
        self.out.write(character.encode_utf8(&mut [0; 4]).as_bytes());
        self.place = MinifierState::InString;
        if used > length {
            return &bytes[1..];
        }
        if used < length {
            // A lone half of a pair, with the beginning of another escape behind it.
            held.copy_within(used..length, 0);
            self.place = MinifierState::InEscape { held, length: length - used };
        }
        bytes
    }
}

impl<S: ByteSink> ByteSink for Minifier<'_, S> {
    #[inline]
    fn write(&mut self, mut bytes: &[u8]) {
        spend(bytes.len());
        while !bytes.is_empty() {
            bytes = match self.place {
                MinifierState::Between => self.between(bytes),
                MinifierState::InString => self.in_string(bytes),
                MinifierState::InEscape { held, length } => self.in_escape(held, length, bytes),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    fn minified(pieces: &[&[u8]]) -> String {
        let mut text = Vec::new();
        let mut minifier = Minifier::new(&mut text);
        for piece in pieces {
            minifier.write(piece);
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    #[test]
    fn the_shortest_form_keeps_the_order_and_the_strings() {
        for (json, short) in [
            (r#" { "b" : [ 1 , 2.50 ] , "a" : "x  y" } "#, r#"{"b":[1,2.50],"a":"x  y"}"#),
            (r#"["\u00e9\n\ud83d\ude00"]"#, "[\"é\n😀\"]"),
            (r#"["\ud83d", "\ud83d\u0041\ud83dx"]"#, "[\"\u{fffd}\",\"\u{fffd}A\u{fffd}x\"]"),
            (r#"["\ud83d\\ "]"#, "[\"\u{fffd}\\ \"]"),
            (r#"["\x\ud83d\x"]"#, "[\"\u{fffd}x\u{fffd}\u{fffd}x\"]"),
            ("no json at all", "nojsonatall"),
            ("", ""),
        ] {
            assert_eq!(minified(&[json.as_bytes()]), short, "{json}");
        }
    }

    proptest! {
        #[test]
        fn any_pieces_give_the_shortest_form_of_the_whole(
            json in r#"([ab,: {}]|"|\\[nu"x\\]|\\ud83d|\\ude00|\\u00e9){0,16}"#, cut: Index, other: Index,
        ) {
            let json = json.as_bytes();
            let (head, tail) = json.split_at(cut.index(json.len() + 1));
            let (middle, tail) = tail.split_at(other.index(tail.len() + 1));
            prop_assert_eq!(minified(&[head, middle, tail]), minified(&[json]));
            prop_assert!(minified(&[json]).starts_with(&minified(&[head])));
        }

        #[test]
        fn any_bytes_are_taken(raw: Vec<u8>) {
            minified(&[&raw]);
        }
    }
}
