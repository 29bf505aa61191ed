//! The cores agree with serde_json and with one another, in whatever pieces the bytes come.
//!
//! Where a core is laxer on purpose is said by [`outline`]: it writes a text again with the inside of each
//! skipped value left out, byte by byte and without the code of the room. A core takes a text exactly if
//! serde_json takes its outline.

mod reference;

use proptest::prelude::*;
use proptest::sample::Index;

use self::reference::{
    cuts, every_byte, is_object, outline, serde_members, serde_takes, text, valid, without_space,
};
use super::growing::GrowingState;
use super::slice::{ValueEnd, find_end};
use super::space::BYTE_ORDER_MARK;
use super::work::WORK;
use super::*;

// === the cores ===

/// Collects members.
#[derive(Default)]
struct Collected {
    keys: Vec<String>,
    spans: Vec<Span>,
}

impl MemberSink<()> for Collected {
    fn key(&mut self, raw: &[u8]) {
        self.keys.push(unescape(raw).into_owned());
    }

    fn value(&mut self, _body: &[u8], value: GrownValue<()>) {
        self.spans.push(value.span);
    }
}

/// The members that the first core finds when the buffer ends at each of the cuts, and how far it comes.
fn grown(text: &[u8], cuts: &[usize]) -> (Vec<(String, Span)>, ScanProgress) {
    let (mut reader, mut found) = (GrowingObject::<()>::new(), Collected::default());
    for end in cuts.iter().copied().chain([text.len()]) {
        reader.read(&text[..end], &mut found);
    }
    (found.keys.into_iter().zip(found.spans).collect(), reader.progress())
}

/// The members that the second core finds.
fn sliced(text: &[u8]) -> Option<Vec<(String, Span)>> {
    let object = document(text)?;
    Some(object.members.into_iter().map(|member| (member.key.into_owned(), member.value)).collect())
}

/// Whether the second core takes a text for a list.
fn is_list(text: &[u8]) -> bool {
    let end = each(text, skip_space(text, 0), |at| read_value(text, at));
    end.is_ok_and(|end| skip_space(text, end) == text.len())
}

/// Enters and reads all down to a depth, and writes it again without white space.
#[derive(Default)]
struct Rewriter {
    most: usize,
    open: Vec<u8>,
    out: Vec<u8>,
    /// A value of the innermost container has been written.
    is_behind: bool,
    is_behind_key: bool,
    in_key: bool,
}

impl Rewriter {
    fn comma(&mut self) {
        let comma = self.is_behind && !std::mem::take(&mut self.is_behind_key);
        self.out.extend_from_slice(if comma { b"," } else { b"" });
        self.is_behind = true;
    }
}

impl ChunkVisitor for Rewriter {
    fn key(&mut self, part: &[u8]) {
        if !std::mem::replace(&mut self.in_key, true) {
            self.comma();
            self.out.push(b'"');
        }
        self.out.extend_from_slice(part);
    }

    fn key_end(&mut self) {
        self.in_key = false;
        self.is_behind_key = true;
        self.out.extend_from_slice(b"\":");
    }

    fn value(&mut self, first: u8, _at: usize) -> bool {
        self.comma();
        self.is_behind_key = false;
        match first {
            b'{' | b'[' if self.open.len() >= self.most => {
                self.out.extend_from_slice(b"[]");
                return false;
            }
            b'{' | b'[' => {
                self.out.push(first);
                self.open.push(first + 2);
                self.is_behind = false;
            }
            b'"' => self.out.push(first),
            _ => {}
        }
        true
    }

    fn text(&mut self, part: &[u8]) {
        self.out.extend_from_slice(part);
    }

    fn text_end(&mut self, _at: usize) {
        self.out.push(b'"');
    }

    fn scalar(&mut self, part: &[u8]) {
        self.out.extend_from_slice(part);
    }

    fn leave(&mut self) {
        self.out.extend(self.open.pop());
        self.is_behind = true;
    }
}

/// What the third core reads in these chunks, and whether it takes the text.
fn chunked(text: &[u8], cuts: &[usize], most: usize) -> (Vec<u8>, bool) {
    let (mut walker, mut out) = (ChunkWalker::new(), Rewriter { most, ..Rewriter::default() });
    let mut at = 0;
    for end in cuts.iter().copied().chain([text.len()]) {
        walker.read(&text[at..end], &mut out);
        at = end;
    }
    (out.out, walker.is_whole())
}

// === properties ===

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// What serde_json reads, all cores read, with the same members at the same places.
    #[test]
    fn what_serde_json_reads_the_cores_read_alike(text in text()) {
        if !serde_takes(&text) {
            return Ok(());
        }
        let end = text.iter().rposition(|byte| !is_space(*byte)).map_or(0, |last| last + 1);
        prop_assert_eq!(value_end(&text, skip_space(&text, 0)), Some(end));
        prop_assert_eq!(chunked(&text, &[], 30), (without_space(&text), true));
        prop_assert!(chunked(&text, &[], 1).1);
        prop_assert_eq!(is_list(&text), text.get(skip_space(&text, 0)) == Some(&b'['));
        prop_assert_eq!(sliced(&text).is_some(), is_object(&text));
        prop_assert_eq!(grown(&text, &[]).1, ScanProgress::Complete);
        if let Some(members) = serde_members(&text) {
            prop_assert_eq!(grown(&text, &[]).0, members.clone());
            prop_assert_eq!(sliced(&text), Some(members));
        }
    }

    /// A core takes exactly the texts of which serde_json takes the outline.
    #[test]
    fn a_core_takes_what_serde_json_takes_the_outline_of(text in text()) {
        let outlined = serde_takes(&outline(&text, 1));
        prop_assert_eq!(chunked(&text, &[], 1).1, outlined, "chunks, first level");
        prop_assert_eq!(chunked(&text, &[], 0).1, serde_takes(&outline(&text, 0)), "chunks, skipped");
        prop_assert_eq!(chunked(&text, &[], 30).1, serde_takes(&outline(&text, 30)), "chunks, all levels");
        let skipped = match find_end(&text, skip_space(&text, 0)) {
            ValueEnd::At(end) => skip_space(&text, end) == text.len(),
            ValueEnd::WithSlice => true,
            ValueEnd::Cut | ValueEnd::Malformed => false,
        };
        prop_assert_eq!(skipped, serde_takes(&outline(&text, 0)), "slice, skipped");
        let is = |bracket| text.get(skip_space(&text, 0)) == Some(&bracket);
        prop_assert_eq!(is_list(&text), outlined && is(b'['), "slice, list");
        prop_assert_eq!(sliced(&text).is_some(), outlined && is(b'{'), "slice, object");
        let marked = text.strip_prefix(BYTE_ORDER_MARK);
        let takes = |text: &[u8]| is_object(text) && serde_takes(&outline(text, 1));
        if let Some(text) = marked {
            prop_assert_eq!(sliced(&[BYTE_ORDER_MARK, text].concat()).is_some(), takes(text), "a mark");
        }
        let plain = marked.unwrap_or(&text);
        if is_object(plain) {
            let is_taken = grown(&text, &[]).1 == ScanProgress::Complete;
            prop_assert_eq!(is_taken, takes(plain), "a buffer");
        }
    }

    /// Pieces change nothing, and a core knows of a beginning what is sure of it.
    #[test]
    fn any_pieces_are_read_as_the_whole(
        text in text(), places in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        let whole = grown(&text, &[]);
        for cuts in [cuts(&text, &places), every_byte(&text)] {
            prop_assert_eq!(&grown(&text, &cuts), &whole, "cut at {:?}", cuts);
            for most in [0, 1, 30] {
                prop_assert_eq!(chunked(&text, &cuts, most), chunked(&text, &[], most), "cut at {:?}", cuts);
            }
            for cut in cuts {
                let (members, progress) = grown(&text[..cut], &[]);
                prop_assert_eq!(&whole.0[..members.len()], &members[..]);
                if let ScanProgress::Malformed(_) = progress {
                    prop_assert_eq!(progress, whole.1);
                }
                // The third core reads on where the first one stopped.
                let mut reader = GrowingObject::<()>::new();
                reader.read(&text[..cut], &mut Collected::default());
                let (mut behind, key) = ChunkWalker::behind(&reader, &text[..cut]);
                let mut keys = Rewriter::default();
                key.into_iter().for_each(|part| keys.key(part));
                for piece in text[cut..].chunks(3) {
                    behind.read(piece, &mut keys);
                }
                let is_begun = !matches!(reader.state, GrowingState::Start | GrowingState::NotAnObject);
                let is_taken = is_begun && whole.1 == ScanProgress::Complete;
                prop_assert_eq!(behind.is_whole(), is_taken, "behind {}", cut);
            }
        }
    }

    /// A cursor over a slice that is cut has the values that stand before the cut.
    #[test]
    fn a_cut_object_has_what_stands_before_the_cut(text in valid(), cut: Index) {
        let Some(members) = serde_members(&text) else { return Ok(()) };
        let cut = cut.index(text.len() + 1);
        let object = JsonCursor::new(&text[..cut]).object(&["a", "b"]);
        let end = text.iter().rposition(|byte| *byte == b'}').unwrap_or(0);
        prop_assert_eq!(object.whole, cut > end);
        for (slot, name) in ["a", "b"].into_iter().enumerate() {
            let last = members.iter().rfind(|(key, span)| key == name && span.start < cut);
            let expected = match last {
                None if object.whole => Ok(None),
                None => Err(EndOfJson),
                Some((_, span)) => {
                    let is_scalar = !matches!(text[span.start], b'"' | b'{' | b'[');
                    let is_whole = span.end < cut || span.end == cut && !is_scalar;
                    match &text[span.start..span.end.min(cut)] {
                        b"null" if is_whole => Ok(None),
                        _ if is_scalar && !is_whole => Err(EndOfJson),
                        bytes => Ok(Some((bytes, is_whole))),
                    }
                }
            };
            let found = object.get(slot).map(|raw| raw.map(|raw| (raw.bytes, raw.whole)));
            prop_assert_eq!(found, expected, "{} cut at {}", name, cut);
        }
    }

    #[test]
    fn a_text_is_decoded_as_serde_json_decodes_it(
        raw in r#"([a-c"é😀/]|\\[bfnrt/"\\u]|\\ud83d|\\ude00|\\u00[eE]9){0,12}"#,
    ) {
        if let Ok(text) = serde_json::from_str::<String>(&format!("\"{raw}\"")) {
            prop_assert_eq!(unescape(raw.as_bytes()), text);
        }
    }
}

#[test]
fn what_is_taken_and_what_is_not() {
    for (text, takes) in [
        ("{\"a\":\x0c1}", false),
        ("\x0b{\"a\":1}", false),
        ("{\"a\":1;2}", false),
        ("{\"a\":1a}", false),
        ("{\"a\":01}", false),
        ("{\"a\":-}", false),
        ("{\"a\":1.}", false),
        ("{\"a\":nulll}", false),
        ("{\"a\":1,}", false),
        ("{\"a\":NaN,\"b\":-Infinity}", true),
        // Nothing is examined in there but quotes and brackets.
        ("{\"a\":[1;2,\x0c}}", true),
        ("{\"a\":\"\\x \n\"}", true),
    ] {
        let bytes = text.as_bytes();
        assert_eq!(sliced(bytes).is_some(), takes, "{text}");
        assert_eq!(grown(bytes, &[]).1 == ScanProgress::Complete, takes, "{text}");
        assert_eq!(chunked(bytes, &[], 1).1, takes, "{text}");
        assert_eq!(JsonCursor::new(bytes).object(&["a"]).whole, takes, "{text}");
    }
}

#[test]
fn what_is_entered_has_a_depth() {
    let deep = |levels: usize| [vec![b'['; levels], vec![b']'; levels]].concat();
    for levels in [1, 31, 32, 33, 100, 100_000] {
        let (_, is_whole) = chunked(&deep(levels), &[], usize::MAX);
        assert!(is_whole, "{levels}");
        assert_eq!(value_end(&deep(levels), 0), Some(2 * levels));
    }
}

#[test]
fn work_is_linear_in_any_pieces() {
    let shapes = [
        ("{\"a\":\"", "\\\""),
        ("{\"a\":\"", "\\\\"),
        ("{\"a\":", "["),
        ("{\"a\":[", "1,"),
        ("{", "\"a\":1,"),
        ("{\"a\":", "1"),
        ("[", "1,"),
        ("[", "\"\","),
        ("[", "{},"),
        ("{\"", "a"),
        ("", " "),
        ("{\"a\":[", "\"a\","),
    ];
    for (before, again) in shapes {
        let text = [before, &again.repeat(4000)].concat().into_bytes();
        let most = 8 * text.len() as u64;
        for cuts in [Vec::new(), every_byte(&text), (0..text.len()).step_by(100).collect()] {
            let work = |run: &dyn Fn()| {
                WORK.set(0);
                run();
                WORK.get()
            };
            let grown = work(&|| drop(grown(&text, &cuts)));
            assert!(grown <= most, "{grown} of {most}: a buffer with {before}{again}");
            let chunks = work(&|| drop(chunked(&text, &cuts, 1)));
            assert!(chunks <= most, "{chunks} of {most}: chunks of {before}{again}");
        }
        WORK.set(0);
        drop((sliced(&text), is_list(&text), JsonCursor::new(&text).object(&["a"]).whole));
        assert!(WORK.get() <= 2 * most, "{} of {most}: a slice of {before}{again}", WORK.get());
    }
}
