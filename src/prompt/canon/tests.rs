//! Tests of `canon`: equal prompts have equal chains, chains of different prompts part at the difference, and
//! a cut body has a prefix of the whole body's chain.

mod pinned;
mod properties;
mod render;

use proptest::prelude::*;
use proptest::sample::{Index, select};

use self::render::{Luck, Piece, RenderedApi, Talk, Turn};
use super::super::chain::MEDIA_WEIGHT_BYTES;
use super::*;

/// So small that nearly all of the text is in the chain.
const SMALL: BlockLayout = BlockLayout { bytes: 4, max_blocks: usize::MAX };

const DIALECTS: [PromptDialect; 5] = [
    PromptDialect::Chat,
    PromptDialect::Responses,
    PromptDialect::Messages,
    PromptDialect::Completions,
    PromptDialect::Generate,
];

fn scanned(body: &[u8]) -> Scanner {
    let mut scanner = Scanner::new();
    scanner.scan(body);
    scanner
}

fn text(dialect: PromptDialect, body: &[u8]) -> Vec<u8> {
    let scanner = scanned(body);
    let mut out = Vec::new();
    PromptSource { dialect, model: "llama", body, scanner: &scanner }.write(&mut out);
    out
}

fn read(reader: &mut PromptReader, dialect: PromptDialect, model: &str, body: &[u8]) -> Chain {
    let scanner = scanned(body);
    reader.read(&PromptSource { dialect, model, body, scanner: &scanner }, SMALL).clone()
}

fn chain(dialect: PromptDialect, body: &[u8]) -> Chain {
    read(&mut PromptReader::default(), dialect, "llama", body)
}

fn dialect(api: RenderedApi) -> PromptDialect {
    match api {
        RenderedApi::Chat => PromptDialect::Chat,
        RenderedApi::Responses => PromptDialect::Responses,
        RenderedApi::Messages => PromptDialect::Messages,
    }
}

fn rendered(talk: &Talk, api: RenderedApi, talk_last: bool, seed: u64) -> String {
    let mut luck = Luck(seed);
    let body = render::body(talk, api, talk_last, &mut luck);
    render::written(&body, &mut luck)
}

/// The control bytes in a form that can be read, pictures by their kind.
fn shown(text: &[u8]) -> String {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        match byte {
            1 => out.extend(b"<turn>"),
            2 => out.push(b'|'),
            3 => {
                out.extend([b'<', text[at + 1], b'>']);
                at += MEDIA_WEIGHT_BYTES - 1;
            }
            4 => out.extend(b"<call>"),
            5 => out.extend(b"<tool>"),
            6 => out.extend(b"<name>"),
            7 => out.extend(b"<documents>"),
            _ => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8(out).unwrap()
}

// === by table ===

#[test]
fn a_message_in_the_usual_form_has_the_text_of_any_other_form() {
    let chat =
        |messages: &str| text(PromptDialect::Chat, format!("{{\"messages\":[{messages}]}}").as_bytes());
    for role in ["user", "assistant", "system", "tool", r"us\u0065r", "critic"] {
        for content in [
            "",
            "a",
            r#"said \"no\"\n"#,
            r"\u00e9\/",
            r"ends with \\",
            "x-anthropic-billing-header: 1",
            r"x-anthropic-billing-header: 1\nyou are",
        ] {
            let turned = format!(r#"{{"content":"{content}","role":"{role}"}}"#);
            let expected = chat(&format!(r#"{turned},{{"content":"next","role":"user"}}"#));
            for usual in [
                format!(r#"{{"role":"{role}","content":"{content}"}}"#),
                format!(r#"{{"role": "{role}", "content": "{content}"}}"#),
                format!(r#"{{ "role" : "{role}" ,"content":"{content}" }}"#),
                format!(r#"{{"role":"{role}","content":"{content}","id":7}}"#),
                format!(r#"{{"role":"{role}","content":"other","content":"{content}"}}"#),
            ] {
                let found = chat(&format!(r#"{usual}, {{"role":"user","content":"next"}}"#));
                assert_eq!(shown(&found), shown(&expected), "{usual}");
            }
        }
    }
}

#[test]
fn writes_conversations_in_canonical_form() {
    for (dialect, body, expected) in [
        (
            PromptDialect::Chat,
            r#"{"messages":[{"content":"Hi","role":"user","name":"Ann"},
                {"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function",
                 "function":{"arguments":"{\"a\": \"x y\"}","name":"look"}}]},
                {"role":"tool","tool_call_id":"c1","content":[{"type":"text","text":"1"},
                 {"type":"text","text":"2"}]}],
                "tools":[{"type":"function","function":{"name":"look","description":"Looks",
                 "parameters":{"type": "object"}}}]}"#,
            "<tool>look|Looks|{\"type\":\"object\"}<turn>user|Hi<name>Ann|\
             <call>look|{\"a\":\"x y\"}<turn>tool|1\\n2",
        ),
        (
            PromptDialect::Chat,
            r#"{"documents":[{"title": "t"}],"messages":[{"role":"developer","content":"Be brief"},
                {"role":"critic","content":[{"type":"input_audio","input_audio":{"data":"AA"}},"and"]},
                {"role":"system","content":"Briefer"},{"role":"user","content":""}, 7, "x"]}"#,
            "<turn>system|Be brief<documents>[{\"title\":\"t\"}]<turn>critic|<a>and<turn>system|Briefer",
        ),
        (
            PromptDialect::Chat,
            r#"{"messages":[[{"role":"user","content":"one"}],[{"role":"user","content":"two"}]]}"#,
            "<turn>user|one",
        ),
        (
            PromptDialect::Responses,
            r#"{"input":"Hi","instructions":"Be brief","tools":[{"type":"web_search"}]}"#,
            "<turn>system|Be brief<tool>web_search||<turn>user|Hi",
        ),
        (
            PromptDialect::Responses,
            r#"{"input":[{"type":"item_reference","id":"x"},{"type":"custom_tool_call","name":"run",
                "input":"ls"},{"type":"custom_tool_call_output","output":"a.rs"},{"role":"assistant",
                "type":"message","content":[{"type":"refusal","refusal":"No."}]}]}"#,
            "<call>run|ls<turn>tool|a.rs<turn>assistant|No.",
        ),
        (
            PromptDialect::Messages,
            r#"{"messages":[{"role":"user","content":[{"type":"tool_result","content":[{"type":"image",
                "source":{"type":"url","url":"u"}}, {"type":"tool_result","content":"deep"}]},
                {"type":"text","text":"So?"}, {"type":"document","source":{"data":"AA"}}]}],
                "system":[{"type":"text","text":"Be"},{"type":"text","text":" brief"}]}"#,
            "<turn>system|Be brief<turn>tool|<i><turn>user|So?<f>",
        ),
        (
            PromptDialect::Messages,
            r#"{"messages":[{"role":"assistant","content":[{"type":"text","text":"a"},
                {"type":"tool_use","name":"look","input":{}},{"type":"text","text":"b"}]},
                {"role":"user","content":[{"type":"text","text":"c"},
                {"type":"tool_result","content":"d"},{"type":"text","text":"e"}]}]}"#,
            "<turn>assistant|a<call>look|{}<turn>assistant|b<turn>user|c<turn>tool|d<turn>user|e",
        ),
        (PromptDialect::Messages, r#"{"system":"Be brief","tools":[]}"#, "<turn>system|Be brief"),
        (PromptDialect::Chat, r#"{"messages":{},"system":"none here"}"#, ""),
        (PromptDialect::Chat, "[]", ""),
        (PromptDialect::Completions, r#"{"prompt":"a\nb"}"#, r"a\nb"),
        (PromptDialect::Completions, r#"{"prompt":[ "a\nb","c"]}"#, r"a\nb"),
        (PromptDialect::Completions, r#"{"prompt":[97,98]}"#, "a\0\0\0b\0\0\0"),
        (PromptDialect::Completions, r#"{"prompt":[ [ 97],[98]]}"#, "a\0\0\0"),
        (PromptDialect::Completions, r#"{"prompt_embeds":"AAAA","prompt":"and"}"#, "<f>and"),
        (PromptDialect::Completions, r#"{"prompt":[]}"#, ""),
        (PromptDialect::Completions, r#"{"prompt":[[[97]]]}"#, ""),
        (PromptDialect::Generate, r#"{"token_ids":[97]}"#, "a\0\0\0"),
        (PromptDialect::Generate, r#"{"token_ids":"97"}"#, ""),
    ] {
        assert_eq!(shown(&text(dialect, body.as_bytes())), expected, "{body}");
    }
}

#[test]
fn omits_the_line_that_changes_with_every_request() {
    let line = "x-anthropic-billing-header: cch=1;";
    for (system, expected) in [
        (format!(r#""{line}\nBe brief""#), "<turn>system|Be brief"),
        (format!(r#""{line}\u000aBe brief""#), "<turn>system|Be brief"),
        (format!(r#""{line}""#), ""),
        (format!(r#"[{{"type":"text","text":"{line}"}},{{"type":"text","text":"Be"}}]"#), "<turn>system|Be"),
        (r#""\u0078-anthropic-billing-header""#.to_owned(), ""),
        (r#""x-anthropic-bill""#.to_owned(), "<turn>system|x-anthropic-bill"),
    ] {
        let body = format!(r#"{{"system":{system},"messages":[]}}"#);
        assert_eq!(shown(&text(PromptDialect::Messages, body.as_bytes())), expected, "{body}");
    }
    let body = format!(r#"{{"messages":[{{"role":"user","content":"{line}"}}]}}"#);
    assert_eq!(shown(&text(PromptDialect::Chat, body.as_bytes())), format!("<turn>user|{line}"));
}

#[test]
fn seed_contains_everything_that_separates_caches() {
    let plain = br#"{"messages":[{"role":"user","content":"Hello there"}]}"#;
    let base = chain(PromptDialect::Chat, plain);
    let with = |extra: &str| format!(r#"{{{extra}"messages":[{{"role":"user","content":"Hello there"}}]}}"#);
    let same = [r#""temperature":1,"#, r#""cache_salt":null,"#, r#""cache_salt":"","#, r#""user":"u","#];
    for extra in same {
        assert_eq!(chain(PromptDialect::Chat, with(extra).as_bytes()), base, "{extra}");
    }
    let mut chains = vec![base, read(&mut PromptReader::default(), PromptDialect::Chat, "llama-lora", plain)];
    for extra in [
        r#""cache_salt":"s","#,
        r#""cache_salt":"t","#,
        r#""chat_template":"s","#,
        r#""cache_salt":"s","chat_template":"s","#,
        r#""previous_response_id":"s","#,
    ] {
        chains.push(chain(PromptDialect::Chat, with(extra).as_bytes()));
    }
    let others = [
        (PromptDialect::Completions, r#"{"prompt":"\u0001user\u0002Hello there"}"#),
        (PromptDialect::Completions, r#"{"prompt":[1,2,3,4,5,6]}"#),
        (PromptDialect::Generate, r#"{"token_ids":[1,2,3,4,5,6],"features":{"mm_hashes":{"image":["a"]}}}"#),
        (PromptDialect::Generate, r#"{"token_ids":[1,2,3,4,5,6],"features":{"mm_hashes":{"image":["b"]}}}"#),
    ];
    chains.extend(others.map(|(dialect, body)| chain(dialect, body.as_bytes())));
    for (index, one) in chains.iter().enumerate() {
        assert!(!one.blocks.is_empty());
        for other in &chains[..index] {
            assert!(one.blocks.iter().all(|block| !other.blocks.contains(block)), "{one:?} {other:?}");
        }
    }
    let ids = chain(PromptDialect::Completions, br#"{"prompt":[1,2,3]}"#);
    assert_eq!(ids, chain(PromptDialect::Generate, br#"{"token_ids":[1,2,3],"features":null}"#));
    assert_eq!((ids.family, ids.bytes), (PromptFamily::Tokens, 12));
}

#[test]
fn omits_cut_parts() {
    let whole = r#"{"messages":[{"role":"user","content":"Hello"}],"tools":[{"name":"look"}]}"#;
    let without = r#"{"messages":[{"role":"user","content":"Hello"}]}"#;
    assert_eq!(shown(&text(PromptDialect::Chat, whole.as_bytes())), "<tool>look||<turn>user|Hello");
    let cut = &whole.as_bytes()[..whole.len() - 3];
    assert_eq!(text(PromptDialect::Chat, cut), text(PromptDialect::Chat, without.as_bytes()));
    // Without a byte of the conversation nothing is known.
    assert_eq!(text(PromptDialect::Messages, br#"{"system":"Be brief","tools":[{"name":"look"}],"#), b"");
    // A role that comes after the content.
    let late = br#"{"messages":[{"role":"user","content":"Hi"},{"content":"Hello"#;
    assert_eq!(shown(&text(PromptDialect::Chat, late)), "<turn>user|Hi");
}

#[test]
fn ends_the_chain_at_a_message_above_the_limit() {
    let body = br#"{"messages":[{"role":"user","content":"Hi"},"#;
    let mut reader = PromptReader::default();
    let known = read(&mut reader, PromptDialect::Chat, "llama", body);
    assert!(reader.resume(br#"{"role":"user","content":""#));
    assert!(!reader.resume(&vec![b'x'; continuation::MAX_HELD_BYTES]));
    assert_eq!((reader.chain(), reader.resume_offset()), (&known, None));
    assert!(!reader.resume(br#""}"#));
}

#[test]
fn reader_can_be_reused() {
    let mut reader = PromptReader::default();
    let cut = br#"{"messages":[{"role":"user","content":"Hi"},{"role":"user","#;
    for _ in 0..3 {
        read(&mut reader, PromptDialect::Chat, "llama", cut);
        assert!(reader.resume(br#"{"role":"user","content":"half"#));
    }
    let whole = br#"{"messages":[{"role":"user","content":"Hi"}]}"#;
    assert_eq!(read(&mut reader, PromptDialect::Chat, "llama", whole), chain(PromptDialect::Chat, whole));
    assert!(!reader.resume(whole));
}

#[test]
fn accepts_deep_nesting() {
    let deep = "[".repeat(300_000);
    let part = r#"{"type":"tool_result","content":["#.repeat(100_000);
    for body in [
        format!(r#"{{"messages":{deep}"#),
        format!(r#"{{"messages":[{{"role":"user","content":{deep}"#),
        format!(r#"{{"messages":[{{"role":"user","content":[{part}"#),
        format!(r#"{{"prompt":{deep}"#),
        format!(r#"{{"tools":{deep}{},"messages":[]}}"#, "]".repeat(300_000)),
    ] {
        for dialect in DIALECTS {
            chain(dialect, body.as_bytes());
        }
    }
}
