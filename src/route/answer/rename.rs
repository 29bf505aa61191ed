//! Changes the name of the model in JSON that streams by in pieces: the strings at `model`, `response.model`
//! and `message.model`, and at `model` in the objects of a list, the form of rendered prompts.
//!
//! Keys are recognised as every engine writes them: without escapes.
//!
//! Never: delay a byte.

use crate::json::{ChunkVisitor, ChunkWalker};

/// The longest key that is compared: `response`.
const MAX_COMPARED_KEY_BYTES: usize = 8;

/// Puts the client's name of the model in place of the served one, in an answer that arrives in pieces.
#[derive(Debug)]
pub(super) struct ModelRenamer {
    /// The client's name with its quotes; `None`: nothing is changed.
    name: Option<Vec<u8>>,
    walker: ChunkWalker,
    names: ModelNames,
}

/// Finds the names in a document.
#[derive(Debug, Default)]
struct ModelNames {
    /// The entered containers, from the document inwards.
    depth: usize,
    is_list: bool,
    key: ComparedKey,
    /// Whether the string in progress is a name.
    in_name: bool,
    /// The begins and ends of names in the current piece, alternating.
    bounds: Vec<usize>,
}

/// The beginning of a key; longer keys match none of the names.
#[derive(Clone, Copy, Debug, Default)]
struct ComparedKey {
    bytes: [u8; MAX_COMPARED_KEY_BYTES],
    length: usize,
    is_whole: bool,
}

// === impl ModelRenamer ===

impl ModelRenamer {
    pub(super) fn new(name: Option<Vec<u8>>) -> Self {
        ModelRenamer { name, walker: ChunkWalker::new(), names: ModelNames::default() }
    }

    /// Edits the next piece and appends the result to `out`.
    pub(super) fn feed(&mut self, piece: &[u8], out: &mut Vec<u8>) {
        let Some(name) = &self.name else {
            out.extend_from_slice(piece);
            return;
        };
        let mut in_name = self.names.in_name;
        self.walker.read(piece, &mut self.names);
        let mut at = 0;
        for bound in self.names.bounds.drain(..).chain([piece.len()]) {
            if !in_name {
                out.extend_from_slice(&piece[at..bound]);
                out.extend_from_slice(if bound < piece.len() { name } else { b"" });
            }
            in_name = !in_name;
            at = bound;
        }
    }
}

// === impl ModelNames ===

impl ModelNames {
    /// Whether the members at this depth may name the model: those of the document, of an inner object, and
    /// of the objects of a list.
    fn is_watched(&self) -> bool {
        self.depth == if self.is_list { 2 } else { self.depth.clamp(1, 2) }
    }
}

impl ChunkVisitor for ModelNames {
    fn key(&mut self, part: &[u8]) {
        self.key.push(part);
    }

    fn key_end(&mut self) {
        self.key.is_whole = true;
    }

    fn value(&mut self, first: u8, at: usize) -> bool {
        let is_entered = match first {
            b'"' => {
                self.in_name = self.is_watched() && self.key.is(b"model");
                self.bounds.extend(self.in_name.then_some(at));
                return self.in_name;
            }
            b'{' | b'[' if self.depth == 0 => {
                self.is_list = first == b'[';
                true
            }
            b'{' if self.depth == 1 => self.is_list || self.key.is(b"response") || self.key.is(b"message"),
            _ => false,
        };
        self.depth += usize::from(is_entered);
        is_entered
    }

    fn text_end(&mut self, at: usize) {
        self.in_name = false;
        self.bounds.push(at);
    }

    fn leave(&mut self) {
        self.depth -= 1;
    }
}

// === impl ComparedKey ===

impl ComparedKey {
    fn push(&mut self, part: &[u8]) {
        if self.is_whole {
            *self = ComparedKey::default();
        }
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        for (slot, byte) in room.iter_mut().zip(part) {
            *slot = *byte;
        }
        self.length += part.len();
    }

    fn is(&self, name: &[u8]) -> bool {
        self.bytes.get(..self.length) == Some(name)
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
    fn renames_in_all_places_of_the_name() {
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
        fn result_does_not_depend_on_the_cuts(
            text in r#"\{("model"|"response"|"message"|[{}\[\]":,\\ax ]|(1,){20,40}){0,40}"#,
            mut cuts in prop::collection::vec(0..60_usize, 0..6),
        ) {
            cuts.iter_mut().for_each(|cut| *cut = (*cut).min(text.len()));
            cuts.sort_unstable();
            prop_assert_eq!(renamed(text.as_bytes(), &cuts), renamed(text.as_bytes(), &[]));
        }
    }
}
