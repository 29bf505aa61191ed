//! A request's prompt, read in the peeked bytes of its body and continued behind them.
//!
//! Never: an await. The buffer for reading is the thread's, used and left within one call.

use std::cell::RefCell;

use crate::json;
use crate::prompt::canon::{PromptDialect, PromptReader, PromptSource};
use crate::prompt::chain::BlockLayout;
use crate::prompt::scan::{BodyField, ScanFacts, ScanProgress, Scanner};
use crate::route::api_paths::Api;
use crate::state::PromptLookup;

thread_local! {
    static READER: RefCell<PromptReader> = RefCell::default();
}

/// Continues reading the prompt behind the peek.
pub(super) struct PromptTail {
    reader: PromptReader,
    /// The offset in the body from which it continues.
    at: u64,
    /// Blocks that were known before the choice.
    known: usize,
}

impl PromptTail {
    /// Reads a piece of the body that follows `before` bytes, as far as it is new.
    pub(super) fn read(&mut self, before: u64, piece: &[u8]) {
        let skip = self.at.saturating_sub(before);
        if let Some(fresh) = usize::try_from(skip).ok().and_then(|skip| piece.get(skip..)) {
            self.at = before + piece.len() as u64;
            self.reader.resume(fresh);
        }
    }

    /// Completes the prompt at the end of the body.
    pub(super) fn complete(&self, prompt: &mut PromptLookup) {
        let chain = self.reader.chain();
        (prompt.chain, prompt.end) = (chain.blocks.clone(), chain.end());
        (prompt.seen, prompt.unseen) = (chain.bytes, 0);
    }

    /// The number of blocks that were known before the choice.
    pub(super) fn known_blocks(&self) -> usize {
        self.known
    }
}

/// The form of the interface's prompt; `None` where no cache holds it.
pub(super) fn dialect(api: Api, facts: &ScanFacts<'_>) -> Option<PromptDialect> {
    match api {
        Api::Chat | Api::ChatBatch => Some(PromptDialect::Chat),
        Api::Responses => Some(PromptDialect::Responses),
        Api::Messages => Some(PromptDialect::Messages),
        Api::Completions => Some(PromptDialect::Completions),
        Api::Generate => Some(PromptDialect::Generate),
        Api::Invocations if facts.has(BodyField::Messages) => Some(PromptDialect::Chat),
        Api::Invocations if facts.has(BodyField::Prompt) => Some(PromptDialect::Completions),
        _ => None,
    }
}

/// Reads the prompt in the peeked bytes. `unread`: bytes of the body that are declared beyond them.
pub(super) fn read(
    dialect: Option<PromptDialect>,
    blocks: Option<BlockLayout>,
    facts: &ScanFacts<'_>,
    (body, scanner): (&[u8], &Scanner),
    unread: u64,
) -> (PromptLookup, Option<Box<PromptTail>>) {
    let model = facts.model.name().map(str::to_string);
    let is_cut = facts.state == ScanProgress::Cut;
    let unseen = match &facts.previous_response_id {
        // The bytes after the peek count as prompt.
        _ if is_cut => unread.max(1),
        // The prompt begins with the previous response, which only the engine has.
        Some(id) if !id.is_empty() => 1,
        _ => 0,
    };
    let (Some(dialect), Some(blocks)) = (dialect, blocks) else {
        return (PromptLookup { model, seen: facts.prompt_bytes, unseen, ..PromptLookup::default() }, None);
    };
    READER.with_borrow_mut(|reader| {
        let request = PromptSource { dialect, model: model.as_deref().unwrap_or_default(), body, scanner };
        let chain = reader.read(&request, blocks);
        // The chain is of the first prompt; the others have to be read as well.
        let others = if is_batch(&request) { facts.prompt_bytes.saturating_sub(chain.bytes) } else { 0 };
        let asked = PromptLookup {
            chain: chain.blocks.clone(),
            end: if is_cut { None } else { chain.end() },
            family: chain.family,
            seen: chain.bytes,
            unseen: unseen.max(others),
            model,
            session: None,
        };
        let at = reader.resume_offset().filter(|_| is_cut);
        let known = asked.chain.len();
        let rest = at.map(|at| Box::new(PromptTail { reader: std::mem::take(reader), at: at as u64, known }));
        (asked, rest)
    })
}

/// Whether the body asks for several prompts at once.
fn is_batch(request: &PromptSource<'_>) -> bool {
    let field = match request.dialect {
        PromptDialect::Completions => BodyField::Prompt,
        PromptDialect::Chat => BodyField::Messages,
        PromptDialect::Responses | PromptDialect::Messages | PromptDialect::Generate => return false,
    };
    let list = request.scanner.span(field).and_then(|span| request.body.get(span)?.strip_prefix(b"["));
    let first = list.and_then(|list| list.get(json::skip_space(list, 0)));
    match request.dialect {
        PromptDialect::Completions => matches!(first, Some(b'"' | b'[')),
        _ => first == Some(&b'['),
    }
}
