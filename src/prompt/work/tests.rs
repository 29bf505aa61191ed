//! Tests that the work of reading a body is linear in the bytes received, whatever their shape and in
//! whatever pieces they come. Work is counted in bytes examined, copied or hashed, so the result is the same
//! on every machine.

use http::HeaderMap;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::super::canon::{PromptDialect, PromptReader, PromptSource};
use super::super::chain::{BlockLayout, MEDIA_WEIGHT_BYTES};
use super::super::multipart::FormScanner;
use super::super::scan::Scanner;
use super::super::session;
use crate::config::types::SessionConfig;
use crate::json::work::WORK;

/// The most work for a byte of a body. An object in an object in a list is looked at once for each level
/// that has a meaning, so it takes several looks; windows of 33 bytes are looked at for numbers.
const MAX_WORK_PER_BYTE: u64 = 48;

/// The most work of a call of `facts`, however long the body is: that of the longest name of a model, if
/// the client writes each byte of it as an escape of six, and 4096 for all else.
const MAX_WORK_PER_FACTS: u64 = 6 * crate::names::MAX_MODEL_BYTES as u64 + 4096;

/// The longest chain of these tests: bytes that are hashed beyond those of the body, as media are.
const BLOCKS: BlockLayout = BlockLayout { bytes: 512, max_blocks: 64 };

const CHAIN_BYTES: u64 = (BLOCKS.bytes * BLOCKS.max_blocks) as u64;

const FORM: &str = "multipart/form-data; boundary=AbC";

fn work_of(run: impl FnOnce()) -> u64 {
    let before = WORK.get();
    run();
    WORK.get() - before
}

/// Asserts the bound, and says how much of it was used.
fn assert_linear(what: &str, body: &[u8], spent: u64) {
    let most = MAX_WORK_PER_BYTE * body.len() as u64 + 2 * CHAIN_BYTES;
    let shown = String::from_utf8_lossy(&body[..body.len().min(120)]).into_owned();
    assert!(spent <= most, "{what}: {spent} for {} bytes, which may take {most}: {shown}", body.len());
}

/// Where the contents of a body begin, and how its prompt is read.
const BEGINNINGS: [(PromptDialect, &str); 27] = [
    (PromptDialect::Chat, ""),
    (PromptDialect::Chat, "{"),
    (PromptDialect::Chat, r#"{""#),
    (PromptDialect::Chat, r#"{"messages":"#),
    (PromptDialect::Chat, r#"{"messages":["#),
    (PromptDialect::Chat, r#"{"messages":[{"role":"user","content":""#),
    (PromptDialect::Chat, r#"{"messages":[{"role":"user","content":["#),
    (PromptDialect::Chat, r#"{"messages":[{"role":"user","content":[{"type":"text","text":""#),
    (PromptDialect::Chat, r#"{"messages":[{"role":"user","#),
    (PromptDialect::Chat, r#"{"messages":[{"role":"user","content":"a"},"#),
    (PromptDialect::Chat, r#"{"messages":[{"role":"assistant","tool_calls":["#),
    (PromptDialect::Chat, r#"{"messages":[{"role":"assistant","tool_calls":[{"function":{"arguments":""#),
    (PromptDialect::Chat, r#"{"messages":[],"tools":["#),
    (PromptDialect::Chat, r#"{"messages":[],"documents":["#),
    (PromptDialect::Chat, r#"{"model":""#),
    (PromptDialect::Chat, r#"{"stream":"#),
    (PromptDialect::Chat, r#"{"metadata":{"user_id":""#),
    (PromptDialect::Responses, r#"{"input":""#),
    (PromptDialect::Responses, r#"{"input":["#),
    (PromptDialect::Responses, r#"{"instructions":["#),
    (PromptDialect::Responses, r#"{"previous_response_id":""#),
    (PromptDialect::Messages, r#"{"messages":[],"system":"x-anthropic-billing-header"#),
    (PromptDialect::Messages, r#"{"messages":[{"role":"user","content":[{"type":"tool_result","content":["#),
    (PromptDialect::Completions, r#"{"prompt":""#),
    (PromptDialect::Completions, r#"{"prompt":["#),
    (PromptDialect::Completions, r#"{"prompt_embeds":""#),
    (PromptDialect::Generate, r#"{"token_ids":["#),
];

/// What the contents repeat.
#[rustfmt::skip]
const UNITS: [&str; 45] = [
    "1", "0", "1,", "12345678901234567890,", "-", "1.5e3,", "a", "\u{e9}", " ", ",", "\"", "\\", "\\\\",
    "\\n", "\\\"", "\\u00e9", "\\ud83d", "\\ud83d\\ude00", "\\u", "[", "]", "{", "}", "{}", "{},",
    "[],", "\"\",",
    "{\"a\":", "{\"a\":1},", "\"a\":1,", "\"content\":\"a\",", "\"content\":[],", "\"messages\":[],",
    "1[", "1\"", "a\\/",
    "{\"type\":\"file\",\"file\":1},", "{\"type\":\"image_url\",\"image_url\":{\"url\":\"u\"}},",
    "{\"role\":\"user\",\"content\":\"a\"},",
    "{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"uuid\":1}]},",
    "{\"type\":\"tool_result\",\"content\":[", "{\"function\":", "x-anthropic-billing-header",
    "\"model\":\"a\",", "\"stream\":1.0,",
];

const ENDS: [&str; 6] = ["", "\"", "]}", "\"}]}", "\"]}]}", "}"];

fn body(beginning: &str, units: &[&str], end: &str, bytes: usize) -> Vec<u8> {
    let unit = units.concat();
    let times = bytes.saturating_sub(beginning.len()) / unit.len().max(1);
    [beginning, &unit.repeat(times), end].concat().into_bytes()
}

/// The ends of the pieces in which a body comes; a piece may be empty.
fn ends(body: &[u8], piece: usize) -> Vec<usize> {
    (piece..body.len()).step_by(piece).chain([body.len(), body.len()]).collect()
}

fn scan_in_pieces(body: &[u8], ends: &[usize]) {
    let mut scanner = Scanner::new();
    let spent = work_of(|| ends.iter().for_each(|end| scanner.scan(&body[..*end])));
    assert_linear("scan", body, spent);
    let spent = work_of(|| drop(scanner.facts(body)));
    assert!(spent <= MAX_WORK_PER_FACTS, "facts of a body of {} bytes: {spent}", body.len());
    let headers = HeaderMap::new();
    let places = session::SessionPlaces::new(&SessionConfig::default());
    let request =
        session::SessionLookup { path: None, headers: &headers, body: Some((body, &scanner)), model: "m" };
    assert_linear("session", body, work_of(|| drop(request.session(&places))));
}

/// Reads what is behind the first of the pieces without what is in it.
fn follow_in_pieces(body: &[u8], ends: &[usize]) {
    let Some((first, rest)) = ends.split_first() else { return };
    let mut scanner = Scanner::new();
    scanner.scan(&body[..*first]);
    let spent = work_of(|| {
        let (mut tail, mut at) = (scanner.tail(&body[..*first]), *first);
        for end in rest {
            tail.read(&body[at..*end]);
            at = *end;
        }
    });
    assert_linear("tail", body, spent);
}

fn read_in_pieces(dialect: PromptDialect, body: &[u8], peeked: usize, ends: &[usize]) {
    let (mut scanner, mut reader) = (Scanner::new(), PromptReader::default());
    scanner.scan(&body[..peeked]);
    let spent = work_of(|| {
        let request = PromptSource { dialect, model: "llama", body: &body[..peeked], scanner: &scanner };
        reader.read(&request, BLOCKS);
        let Some(mut at) = reader.resume_offset() else { return };
        for end in ends {
            // The held bytes come again, as they do on their way to the upstream.
            reader.resume(&body[at..at.max(*end)]);
            at = at.max(*end);
        }
    });
    assert_linear(&format!("{dialect:?} behind {peeked} bytes"), body, spent);
}

fn read_form_in_pieces(body: &[u8], ends: &[usize]) {
    let Some(mut scanner) = FormScanner::new(FORM) else { panic!("no form: {FORM}") };
    let spent = work_of(|| ends.iter().for_each(|end| scanner.scan(&body[..*end])));
    assert_linear("form", body, spent);
    let mut tail = FormScanner::new(FORM).map(|scanner| scanner.tail(b""));
    let mut at = 0;
    let spent = work_of(|| {
        for end in ends {
            tail.iter_mut().for_each(|tail| tail.read(&body[at..*end]));
            at = *end;
        }
    });
    assert_linear("tail of a form", body, spent);
    let spent = work_of(|| drop(scanner.facts(body)));
    assert!(spent <= MAX_WORK_PER_FACTS, "facts of a form of {} bytes: {spent}", body.len());
}

#[test]
fn every_shape_costs_linear_work_in_single_bytes_and_as_a_whole() {
    for (dialect, beginning) in BEGINNINGS {
        for unit in UNITS {
            let body = body(beginning, &[unit], "", 8 << 10);
            for piece in [1, body.len()] {
                scan_in_pieces(&body, &ends(&body, piece));
                follow_in_pieces(&body, &ends(&body, piece));
                follow_in_pieces(&body, &[beginning.len(), body.len()]);
                for peeked in [beginning.len() + 1, body.len()] {
                    read_in_pieces(dialect, &body, peeked.min(body.len()), &ends(&body, piece));
                }
            }
        }
    }
}

#[test]
fn one_long_token_id_costs_linear_work_in_single_bytes() {
    for field in ["prompt", "token_ids"] {
        let body = body(&format!("{{\"{field}\":[7,"), &["1"], "]}", 64 << 10);
        for dialect in [PromptDialect::Completions, PromptDialect::Generate] {
            read_in_pieces(dialect, &body, 20, &ends(&body, 1));
        }
    }
}

#[test]
fn many_tiny_media_parts_cost_linear_work() {
    const PARTS: usize = 90_000;
    for part in [r#"{"type":"file","file":1}"#, r#"{"type":"image_url","image_url":{"url":"u"}}"#] {
        let parts = vec![part; PARTS].join(",");
        let body = format!(r#"{{"messages":[{{"role":"user","content":[{parts}]}}]}}"#).into_bytes();
        read_in_pieces(PromptDialect::Chat, &body, body.len(), &[]);
        read_in_pieces(PromptDialect::Chat, &body, 100, &ends(&body, 1000));
        let mut scanner = Scanner::new();
        scanner.scan(&body);
        let mut reader = PromptReader::default();
        let request =
            PromptSource { dialect: PromptDialect::Chat, model: "llama", body: &body, scanner: &scanner };
        let chain = reader.read(&request, BLOCKS);
        let turn = "\u{1}user\u{2}".len();
        assert_eq!(
            (chain.blocks.len(), chain.bytes),
            (BLOCKS.max_blocks, (turn + PARTS * MEDIA_WEIGHT_BYTES) as u64)
        );
    }
}

#[test]
fn facts_cost_the_same_however_long_the_values_are() {
    for field in ["model", "stream", "previous_response_id", "background"] {
        for (value, end) in [("\"a", "\""), ("\"\\u0061", "\""), ("1.0", "")] {
            let body = body(&format!("{{\"{field}\":{}", &value[..1]), &[&value[1..]], end, 1 << 20);
            scan_in_pieces(&[&body[..], b"}"].concat(), &[body.len() + 1]);
        }
        let head = format!("--AbC\r\nContent-Disposition: form-data; name=\"{field}\"\r\n\r\n");
        let form = body(&head, &["a"], "\r\n--AbC--\r\n", 1 << 20);
        read_form_in_pieces(&form, &[form.len()]);
    }
}

#[test]
fn every_form_costs_linear_work() {
    #[rustfmt::skip]
    let units = [
        "-", "\r\n", "\r\n--Ab", "\r\n--AbC", "\r\n--AbCx", "\r\n--AbC\r\n\r\n", "a", "\r", ";", "name=a;",
        "\"",         "\r\n--AbC\r\nContent-Disposition: form-data; name=model\r\n\r\na", "x: y\r\n",
        "\r\n\r", ";filename=\"\\\";",
    ];
    for beginning in ["", "--AbC\r\n", "--AbC\r\n\r\n", "--AbC\r\nContent-Disposition: form-data; name=model"]
    {
        for unit in units {
            let body = body(beginning, &[unit], "", 16 << 10);
            for piece in [1, body.len()] {
                read_form_in_pieces(&body, &ends(&body, piece));
            }
        }
    }
}

proptest! {
    #[test]
    fn any_mixture_costs_linear_work_in_any_pieces(
        (dialect, beginning) in select(BEGINNINGS.to_vec()),
        units in prop::collection::vec(select(UNITS.to_vec()), 1..5),
        end in select(ENDS.to_vec()), piece in select(vec![1, 2, 7, 64, 1000]),
        cuts in prop::collection::vec(any::<Index>(), 0..8), peeked: Index,
    ) {
        let body = body(beginning, &units, end, 4 << 10);
        let mut ends: Vec<usize> = ends(&body, piece);
        ends.extend(cuts.iter().map(|cut| cut.index(body.len() + 1)));
        ends.sort_unstable();
        scan_in_pieces(&body, &ends);
        follow_in_pieces(&body, &ends);
        read_in_pieces(dialect, &body, peeked.index(body.len() + 1), &ends);
        read_form_in_pieces(&body, &ends);
    }
}
