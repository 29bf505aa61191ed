//! `prompt::canon`: a chain does not depend on how a body is written or in which pieces it passes.

use vllm_lb::prompt::canon::{PromptDialect, PromptReader, PromptSource};
use vllm_lb::prompt::chain::{BlockLayout, Chain};
use vllm_lb::prompt::scan::Scanner;

use super::{cuts, json};

const DIALECTS: [PromptDialect; 5] = [
    PromptDialect::Chat,
    PromptDialect::Responses,
    PromptDialect::Messages,
    PromptDialect::Completions,
    PromptDialect::Generate,
];

/// Small, so that small inputs have several.
const BLOCKS: BlockLayout = BlockLayout { bytes: 16, max_blocks: 64 };

pub fn run(data: &[u8]) {
    for dialect in DIALECTS {
        let whole = read(&mut PromptReader::default(), data, dialect);
        assert!(whole.blocks.len() <= BLOCKS.max_blocks);
        assert!(whole.blocks.len() as u64 * BLOCKS.bytes as u64 <= whole.bytes);
        rest_in_pieces(data, dialect);
        if let Ok(json::Plain(document)) = serde_json::from_slice(data) {
            let mut escaped = String::new();
            json::escaped(&document, &mut escaped);
            for written in [document.to_string(), format!("{document:#}"), escaped] {
                let again = read(&mut PromptReader::default(), written.as_bytes(), dialect);
                assert_eq!(again, whole, "{dialect:?} of {written}");
            }
        }
    }
}

fn read(reader: &mut PromptReader, body: &[u8], dialect: PromptDialect) -> Chain {
    let mut scanner = Scanner::new();
    scanner.scan(body);
    reader.read(&PromptSource { dialect, model: "m", body, scanner: &scanner }, BLOCKS).clone()
}

/// What follows a cut may come in any pieces, and a reader that has read another body reads as a fresh one.
fn rest_in_pieces(data: &[u8], dialect: PromptDialect) {
    let (seen, _) = data.split_at(cuts::one(data));
    let mut at_once = PromptReader::default();
    read(&mut at_once, data, dialect);
    let begun = read(&mut at_once, seen, dialect);
    assert_eq!(begun, read(&mut PromptReader::default(), seen, dialect));
    let Some(from) = at_once.resume_offset() else { return };
    assert!(from <= seen.len(), "it wants bytes that it has not seen");
    let rest = &data[from..];
    at_once.resume(rest);
    for way in cuts::ways(rest) {
        let mut pieces = PromptReader::default();
        read(&mut pieces, seen, dialect);
        for piece in way {
            pieces.resume(&rest[piece]);
        }
        assert_eq!(pieces.chain(), at_once.chain(), "{dialect:?}");
    }
}
