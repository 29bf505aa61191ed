//! Changes the name of the model in JSON that flows by in pieces: `model`, `response.model` and
//! `message.model`, where they are texts, and `model` in the objects of a list, as prompts come rendered.
//!
//! Keys are known as every engine writes them: without escapes.
//!
//! Never: hold a byte back.

use crate::route::json;

/// The longest key that is compared: `response`.
const MAX_COMPARED_KEY_BYTES: usize = 8;

/// Puts the client's name of the model in place of the served one, in an answer that arrives in pieces.
#[derive(Debug)]
pub struct ModelRenamer {
    /// With its quotes; without a name everything stays.
    name: Option<Vec<u8>>,
    place: RenamerState,
    depth: u64,
    /// The members at this depth are looked at: those of the document, and those of the two inner objects.
    watched: u64,
    /// The document is a list.
    list: bool,
    key: RenamerKey,
    behind_colon: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RenamerState {
    Outside,
    /// `escaped`: the next byte means nothing by itself.
    Key {
        escaped: bool,
    },
    Text {
        escaped: bool,
    },
    /// In the text that is replaced.
    Name {
        escaped: bool,
    },
}

/// The beginning of a key; longer keys match none of the names.
#[derive(Clone, Copy, Debug, Default)]
struct RenamerKey {
    bytes: [u8; MAX_COMPARED_KEY_BYTES],
    length: usize,
}

impl RenamerKey {
    fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.length) {
            *slot = byte;
        }
        self.length += 1;
    }

    fn is(&self, name: &[u8]) -> bool {
        self.bytes.get(..self.length) == Some(name)
    }
}

impl ModelRenamer {
    pub fn new(name: Option<Vec<u8>>) -> Self {
        ModelRenamer {
            name,
            place: RenamerState::Outside,
            depth: 0,
            watched: 1,
            list: false,
            key: RenamerKey::default(),
            behind_colon: false,
        }
    }

    /// Takes the next piece, and writes what it became.
    pub fn feed(&mut self, piece: &[u8], out: &mut Vec<u8>) {
        let Some(name) = self.name.take() else {
            out.extend_from_slice(piece);
            return;
        };
        let mut at = 0;
        while at < piece.len() {
            at = match self.place {
                RenamerState::Outside => self.outside(piece, at, &name, out),
                _ => self.inside(piece, at, out),
            };
        }
        self.name = Some(name);
    }

    /// One byte between texts, or many in which there is nothing to see.
    fn outside(&mut self, piece: &[u8], at: usize, name: &[u8], out: &mut Vec<u8>) -> usize {
        let byte = piece[at];
        let here = self.depth == self.watched;
        match byte {
            b'"' if here && self.behind_colon && self.key.is(b"model") => {
                self.place = RenamerState::Name { escaped: false };
                out.extend_from_slice(name);
                return at + 1;
            }
            b'"' if here && !self.behind_colon => {
                self.key = RenamerKey::default();
                self.place = RenamerState::Key { escaped: false };
            }
            b'"' => self.place = RenamerState::Text { escaped: false },
            // An embedding is long, and has nothing in it but numbers.
            b'0'..=b'9' if !here => {
                let numbers = at + 1 + json::plain_run(&piece[at + 1..]);
                out.extend_from_slice(&piece[at..numbers]);
                return numbers;
            }
            b'{' | b'[' => self.open(byte == b'{'),
            b'}' | b']' => self.close(),
            b':' if here => self.behind_colon = true,
            b',' if here => self.behind_colon = false,
            _ => {}
        }
        out.push(byte);
        at + 1
    }

    fn open(&mut self, object: bool) {
        let carries = self.depth == 1 && self.watched == 1 && self.behind_colon;
        self.depth += 1;
        if self.depth == 1 && !object {
            (self.list, self.watched) = (true, 2);
        } else if self.list && self.depth == 2 {
            self.behind_colon = false;
        } else if carries && object && (self.key.is(b"response") || self.key.is(b"message")) {
            self.watched = 2;
            self.behind_colon = false;
        }
    }

    fn close(&mut self) {
        self.depth = self.depth.saturating_sub(1);
        if self.watched == 2 && self.depth == 1 && !self.list {
            self.watched = 1;
            self.behind_colon = true;
            self.key = RenamerKey::default();
        }
    }

    /// The rest of a text, or of what is there of it.
    fn inside(&mut self, piece: &[u8], from: usize, out: &mut Vec<u8>) -> usize {
        use RenamerState::{Key, Name, Text};
        let (Key { escaped } | Text { escaped } | Name { escaped }) = self.place else {
            return from;
        };
        let mut at = from;
        let mut escaped = escaped;
        let mut over = false;
        while at < piece.len() && !over {
            if escaped {
                escaped = false;
                at += 1;
                continue;
            }
            match memchr::memchr2(b'"', b'\\', &piece[at..]) {
                None => at = piece.len(),
                Some(found) => {
                    at += found + 1;
                    over = piece[at - 1] == b'"';
                    escaped = !over;
                }
            }
        }
        if !matches!(self.place, RenamerState::Name { .. }) {
            out.extend_from_slice(&piece[from..at]);
        }
        if let RenamerState::Key { .. } = self.place {
            piece[from..at - usize::from(over)]
                .iter()
                .take(MAX_COMPARED_KEY_BYTES + 1)
                .for_each(|byte| self.key.push(*byte));
        }
        self.place = match self.place {
            _ if over => RenamerState::Outside,
            RenamerState::Key { .. } => RenamerState::Key { escaped },
            RenamerState::Name { .. } => RenamerState::Name { escaped },
            _ => RenamerState::Text { escaped },
        };
        at
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn renamed(text: &[u8], cuts: &[usize]) -> String {
        let mut renamer = ModelRenamer::new(Some(b"\"new\"".to_vec()));
        let (mut out, mut at) = (Vec::new(), 0);
        for cut in cuts.iter().copied().chain([text.len()]) {
            renamer.feed(&text[at..cut.max(at)], &mut out);
            at = cut.max(at);
        }
        String::from_utf8_lossy(&out).into_owned()
    }

    #[test]
    fn names_are_changed_where_they_stand() {
        for (text, wanted) in [
            (r#"{"model":"old"}"#, r#"{"model":"new"}"#),
            (r#"{ "model" : "o\"l\\" , "a":1}"#, r#"{ "model" : "new" , "a":1}"#),
            (r#"{"model":null,"models":"old","mod":"old"}"#, r#"{"model":null,"models":"old","mod":"old"}"#),
            (
                r#"{"a":{"model":"old"},"b":[{"model":"old"}],"model":"old"}"#,
                r#"{"a":{"model":"old"},"b":[{"model":"old"}],"model":"new"}"#,
            ),
            (
                r#"{"response":{"a":{"model":"old"},"model":"old"},"model":"old"}"#,
                r#"{"response":{"a":{"model":"old"},"model":"new"},"model":"new"}"#,
            ),
            (
                r#"{"message":{"model":"old"},"x":"model","response":[{"model":"old"}]}"#,
                r#"{"message":{"model":"new"},"x":"model","response":[{"model":"old"}]}"#,
            ),
            (
                r#"[ {"a":{"model":"old"},"model":"old"},{"model":"old"},"model","old",{"model":null}]"#,
                r#"[ {"a":{"model":"old"},"model":"new"},{"model":"new"},"model","old",{"model":null}]"#,
            ),
            (
                r#"[[{"model":"old"}],["a","old"],{"b":"model","model":"old"},{"message":{"model":"old"}}]"#,
                r#"[[{"model":"old"}],["a","old"],{"b":"model","model":"new"},{"message":{"model":"old"}}]"#,
            ),
            (r#"{"a":"\"model\":\"old\""}"#, r#"{"a":"\"model\":\"old\""}"#),
            (
                r#"{"data":[0.25,-1e-5,0.75,0.25,-1e-5,0.75,0.25,-1e-5,0.75],"model":"old"}"#,
                r#"{"data":[0.25,-1e-5,0.75,0.25,-1e-5,0.75,0.25,-1e-5,0.75],"model":"new"}"#,
            ),
        ] {
            assert_eq!(renamed(text.as_bytes(), &[]), wanted, "{text}");
            for cut in 0..text.len() {
                assert_eq!(renamed(text.as_bytes(), &[cut]), wanted, "{text} cut at {cut}");
            }
            let every: Vec<usize> = (0..text.len()).collect();
            assert_eq!(renamed(text.as_bytes(), &every), wanted, "{text} byte by byte");
        }
        let mut nobody = Vec::new();
        ModelRenamer::new(None).feed(br#"{"model":"old"}"#, &mut nobody);
        assert_eq!(nobody, br#"{"model":"old"}"#);
    }

    proptest! {
        #[test]
        fn any_cuts_give_the_same(
            text in r#"\{("model"|"response"|"message"|[{}\[\]":,\\ax ]|(1,){20,40}){0,40}"#,
            mut cuts in prop::collection::vec(0..60_usize, 0..6),
        ) {
            cuts.iter_mut().for_each(|cut| *cut = (*cut).min(text.len()));
            cuts.sort_unstable();
            prop_assert_eq!(renamed(text.as_bytes(), &cuts), renamed(text.as_bytes(), &[]));
        }
    }
}
