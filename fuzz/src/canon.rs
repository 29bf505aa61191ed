//! `prompt::canon`: a chain does not depend on how a body is written or in which pieces it passes.

use vllm_lb::prompt::canon::{Dialect, Reader, Request};
use vllm_lb::prompt::chain::{Blocks, Chain};
use vllm_lb::prompt::scan::Scanner;

use super::{cuts, json};

const DIALECTS: [Dialect; 5] =
    [Dialect::Chat, Dialect::Responses, Dialect::Messages, Dialect::Completions, Dialect::Generate];

/// Small, so that small inputs have several.
const BLOCKS: Blocks = Blocks { bytes: 16, most: 64 };

pub fn run(data: &[u8]) {
    for dialect in DIALECTS {
        let whole = read(&mut Reader::default(), data, dialect);
        assert!(whole.blocks.len() <= BLOCKS.most);
        assert!(whole.blocks.len() as u64 * BLOCKS.bytes as u64 <= whole.bytes);
        rest_in_pieces(data, dialect);
        if let Ok(json::Plain(document)) = serde_json::from_slice(data) {
            let mut escaped = String::new();
            json::escaped(&document, &mut escaped);
            for written in [document.to_string(), format!("{document:#}"), escaped] {
                let again = read(&mut Reader::default(), written.as_bytes(), dialect);
                assert_eq!(again, whole, "{dialect:?} of {written}");
            }
        }
    }
}

fn read(reader: &mut Reader, body: &[u8], dialect: Dialect) -> Chain {
    let mut scanner = Scanner::new();
    scanner.scan(body);
    reader.read(&Request { dialect, model: "m", body, scanner: &scanner }, BLOCKS).clone()
}

/// What follows a cut may come in any pieces, and a reader that has read another body reads as a fresh one.
fn rest_in_pieces(data: &[u8], dialect: Dialect) {
    let (seen, _) = data.split_at(cuts::one(data));
    let mut at_once = Reader::default();
    read(&mut at_once, data, dialect);
    let begun = read(&mut at_once, seen, dialect);
    assert_eq!(begun, read(&mut Reader::default(), seen, dialect));
    let Some(from) = at_once.resume_at() else { return };
    assert!(from <= seen.len(), "it wants bytes that it has not seen");
    let rest = &data[from..];
    at_once.go_on(rest);
    for way in cuts::ways(rest) {
        let mut pieces = Reader::default();
        read(&mut pieces, seen, dialect);
        for piece in way {
            pieces.go_on(&rest[piece]);
        }
        assert_eq!(pieces.chain(), at_once.chain(), "{dialect:?}");
    }
}
