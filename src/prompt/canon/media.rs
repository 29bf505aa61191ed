//! Images, sounds and the like in the canonical text: a hash of their identity, with their weight for a
//! model.
//!
//! The engine distinguishes pictures by their content; the balancer by the URL, the data or the id in the
//! request. The same picture as a URL and as data therefore counts as two pictures.

use super::super::chain::{MEDIA_WEIGHT_BYTES, TextDigest, TextSink};
use super::text::{after, begins_with};
use crate::json::work::spend;
use crate::json::{ByteSink, JsonCursor, Minifier, RawValue, decode};

/// Begins a picture: its kind and its hash follow.
const MEDIA: u8 = 3;

/// The keys of a payload that is an object, in the order in which they count.
const INNER: [&str; 6] = ["url", "data", "file_data", "file_url", "file_id", "content"];

/// Writes a picture, given the type of its part and the value that identifies it.
pub(super) fn write<S: TextSink>(kind: &[u8], payload: RawValue<'_>, out: &mut S) {
    if out.skip(MEDIA_WEIGHT_BYTES) {
        return;
    }
    spend(MEDIA_WEIGHT_BYTES);
    let mut filler = [0; MEDIA_WEIGHT_BYTES];
    let hash = hash(payload).to_le_bytes();
    for word in filler.chunks_exact_mut(hash.len()) {
        word.copy_from_slice(&hash);
    }
    filler[..2].copy_from_slice(&[MEDIA, letter(kind)]);
    out.write(&filler);
}

/// The interfaces call the same thing `image`, `image_url`, `input_image`.
fn letter(kind: &[u8]) -> u8 {
    let has = |word: &str| memchr::memmem::find(kind, word.as_bytes()).is_some();
    match () {
        () if has("image") => b'i',
        () if has("audio") => b'a',
        () if has("video") => b'v',
        () => b'f',
    }
}

fn hash(payload: RawValue<'_>) -> u64 {
    let mut digest = TextDigest::default();
    let inside = JsonCursor::new(payload.bytes).object(&INNER);
    let value = (0..INNER.len()).find_map(|slot| inside.get(slot).ok().flatten()).unwrap_or(payload);
    match value.string() {
        Some(text) => {
            decode(content(text), true, &mut digest);
        }
        // No engine accepts such a payload, but its chain must not depend on how the client writes it.
        None => Minifier::new(&mut digest).write(value.bytes),
    }
    digest.hash()
}

/// A data URL without its head, which other interfaces have in a separate field.
fn content(text: &[u8]) -> &[u8] {
    match begins_with(text, true, "data:") {
        Some(true) => after(text, b',').map_or(text, |head| &text[head..]),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(kind: &str, payload: &str) -> Vec<u8> {
        let mut text = Vec::new();
        write(kind.as_bytes(), RawValue { bytes: payload.as_bytes(), whole: true }, &mut text);
        text
    }

    #[test]
    fn a_payload_without_an_identity_does_not_depend_on_how_it_is_written() {
        let plain = written("image_url", r#"{"uri":"data:,a","sizes":[1,2]}"#);
        for payload in
            ["{ \"uri\": \"data:,a\",\n\t\"sizes\": [1, 2] }", r#"{"\u0075ri":"d\u0061ta:,a","sizes":[1,2]}"#]
        {
            assert_eq!(written("image_url", payload), plain, "{payload}");
        }
        assert_ne!(written("image_url", r#"{"uri":"data:,a","sizes":[12]}"#), plain);
    }

    #[test]
    fn identifies_a_picture_alike_in_every_interface() {
        let picture = written("image_url", r#"{"url":"data:image/png;base64,aGVsbG8=","detail":"low"}"#);
        assert_eq!(picture.len(), MEDIA_WEIGHT_BYTES);
        for (kind, payload) in [
            ("input_image", r#""data:image/png;base64,aGVsbG8=""#),
            ("image", r#"{"type":"base64","media_type":"image/png","data":"aGVsbG8="}"#),
            ("image", r#"{"data":"\u0061GVsbG8="}"#),
            ("image_url", r#"{"url":"d\u0061ta:image\/png;base64\u002caGVsbG8="}"#),
        ] {
            assert_eq!(written(kind, payload), picture, "{payload}");
        }
        for (kind, payload) in [
            ("image", r#"{"data":"aGVsbG9="}"#),
            ("audio", r#"{"data":"aGVsbG8="}"#),
            ("image", r#"{"url":"https://host/aGVsbG8="}"#),
            ("image", r#"{"else":1}"#),
            ("image", "7"),
        ] {
            assert_ne!(written(kind, payload), picture, "{payload}");
        }
        assert_ne!(written("image", r#"{"else":1}"#), written("image", r#"{"else":2}"#));
    }
}
