//! Properties of chains: equal and different conversations, cuts, and any bytes.

use super::*;

/// How many blocks from the front are the same.
fn shared(one: &Chain, other: &Chain) -> usize {
    one.blocks.iter().zip(&other.blocks).take_while(|(one, other)| one == other).count()
}

fn common_prefix(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

/// What the chain is whole of, in pieces of any size.
fn streamed(body: &[u8], dialect: PromptDialect, cuts: &mut [Index]) -> (Chain, Option<Chain>) {
    cuts.sort_by_key(|cut| cut.index(body.len() + 1));
    let mut ends = cuts.iter().map(|cut| cut.index(body.len() + 1)).chain([body.len()]);
    let mut from = ends.next().unwrap_or(body.len());
    let mut reader = PromptReader::default();
    let known = read(&mut reader, dialect, "llama", &body[..from]);
    let Some(at) = reader.resume_offset() else { return (known, None) };
    reader.resume(&body[at..from]);
    for end in ends {
        reader.resume(&body[from..end]);
        from = end;
    }
    (known, Some(reader.chain().clone()))
}

fn one_change() -> impl Strategy<Value = fn(&mut Talk)> {
    let changes: [fn(&mut Talk); 4] = [
        |talk| talk.system = Some(format!("{}!", talk.system.clone().unwrap_or_default())),
        |talk| {
            talk.tools.push(render::Tool {
                name: "one_more".into(),
                description: "d".into(),
                schema: serde_json::json!({}),
            })
        },
        |talk| talk.turns.insert(0, Turn::User(vec![Piece::Image("AAAA".into())])),
        |talk| talk.turns.insert(0, Turn::User(vec![Piece::Text("Hello!".into())])),
    ];
    select(changes.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn equal_conversations_have_equal_chains(talk in render::talk(), seeds: [u64; 3]) {
        let chat = rendered(&talk, RenderedApi::Chat, false, seeds[0]);
        let responses = rendered(&talk, RenderedApi::Responses, false, seeds[1]);
        let messages = rendered(&talk, RenderedApi::Messages, false, seeds[2]);
        let expected = text(PromptDialect::Chat, chat.as_bytes());
        prop_assert_eq!(shown(&text(PromptDialect::Responses, responses.as_bytes())), shown(&expected));
        prop_assert_eq!(shown(&text(PromptDialect::Messages, messages.as_bytes())), shown(&expected));
        let chat = chain(PromptDialect::Chat, chat.as_bytes());
        prop_assert_eq!(chat.bytes, expected.len() as u64);
        prop_assert_eq!(&chain(PromptDialect::Responses, responses.as_bytes()), &chat);
        prop_assert_eq!(&chain(PromptDialect::Messages, messages.as_bytes()), &chat);
    }

    #[test]
    fn chains_share_the_common_beginning(
        talk in render::talk(), other in render::talk(), mut turns: usize,
        seeds: [u64; 2], apis in [render::api(), render::api()],
    ) {
        // The other one begins like the first.
        turns %= talk.turns.len() + 1;
        let mut longer = talk.clone();
        longer.turns.truncate(turns);
        longer.turns.extend(other.turns);
        let bodies = [rendered(&talk, apis[0], false, seeds[0]), rendered(&longer, apis[1], false, seeds[1])];
        let texts = [0, 1].map(|index| text(dialect(apis[index]), bodies[index].as_bytes()));
        let chains = [0, 1].map(|index| chain(dialect(apis[index]), bodies[index].as_bytes()));
        prop_assert_eq!(shared(&chains[0], &chains[1]), common_prefix(&texts[0], &texts[1]) / SMALL.bytes);
    }

    #[test]
    fn different_prompts_have_different_chains(
        talk in render::talk(), change in one_change(), api in render::api(),
    ) {
        let mut other = talk.clone();
        change(&mut other);
        let [one, other] = [&talk, &other].map(|talk| rendered(talk, api, false, 1));
        prop_assert_ne!(chain(dialect(api), one.as_bytes()), chain(dialect(api), other.as_bytes()));
    }

    #[test]
    fn cut_body_has_a_prefix_of_the_chain(
        talk in render::talk(), api in render::api(), seed: u64, mut cuts: [Index; 2],
    ) {
        let body = rendered(&talk, api, true, seed);
        let body = body.as_bytes();
        let whole = text(dialect(api), body);
        cuts.sort_by_key(|cut| cut.index(body.len() + 1));
        let [earlier, later] = cuts.map(|cut| text(dialect(api), &body[..cut.index(body.len() + 1)]));
        prop_assert!(later.starts_with(&earlier), "{} {}", shown(&later), shown(&earlier));
        prop_assert!(whole.starts_with(&later), "{} {}", shown(&whole), shown(&later));
    }

    #[test]
    fn body_in_pieces_has_the_chain_of_the_whole(
        talk in render::talk(), api in render::api(), seed: u64,
        mut cuts in prop::collection::vec(any::<Index>(), 1..6),
    ) {
        let body = rendered(&talk, api, true, seed);
        let whole = chain(dialect(api), body.as_bytes());
        let (known, all) = streamed(body.as_bytes(), dialect(api), &mut cuts);
        prop_assert_eq!(shared(&known, &whole), known.blocks.len());
        if let Some(all) = all {
            prop_assert_eq!(all, whole);
        }
    }

    #[test]
    fn plain_prompts_in_pieces_have_the_chain_of_the_whole(
        prompt in prop_oneof![
            any::<String>().prop_map(serde_json::Value::from),
            prop::collection::vec(any::<u32>(), 1..40).prop_map(serde_json::Value::from),
        ],
        batch: bool, dialect in select(vec![PromptDialect::Completions, PromptDialect::Responses]),
        mut cuts in prop::collection::vec(any::<Index>(), 1..6),
    ) {
        let prompt = if batch { serde_json::json!([prompt, prompt]) } else { prompt };
        let body = serde_json::json!({"input": prompt, "prompt": prompt, "model": "m"}).to_string();
        let whole = chain(dialect, body.as_bytes());
        let (known, all) = streamed(body.as_bytes(), dialect, &mut cuts);
        prop_assert_eq!(shared(&known, &whole), known.blocks.len());
        if let Some(all) = all {
            prop_assert_eq!(all, whole);
        }
    }

    #[test]
    fn a_cut_behind_the_first_turn_can_be_gone_on_from(
        mut talk in render::talk(), seed: u64, api in render::api(),
    ) {
        talk.turns.insert(0, Turn::User(vec![Piece::Text("first".into())]));
        talk.turns.push(Turn::User(vec![Piece::Text("last".into())]));
        let body = rendered(&talk, api, true, seed);
        let end = body.trim_end_matches(|byte| byte != ']').len() - 1;
        let mut reader = PromptReader::default();
        read(&mut reader, dialect(api), "llama", &body.as_bytes()[..end]);
        prop_assert!(reader.resume_offset().is_some());
        reader.resume(&body.as_bytes()[reader.resume_offset().unwrap()..]);
        prop_assert_eq!(reader.chain(), &chain(dialect(api), body.as_bytes()));
    }

    #[test]
    fn any_bytes_are_taken(
        talk in render::talk(), api in render::api(), seed: u64,
        wrong in prop::collection::vec((any::<Index>(), any::<u8>()), 0..6),
        mut cuts in prop::collection::vec(any::<Index>(), 1..4),
    ) {
        let mut body = rendered(&talk, api, false, seed).into_bytes();
        for (at, byte) in wrong {
            let at = at.index(body.len());
            body[at] = byte;
        }
        for dialect in DIALECTS {
            streamed(&body, dialect, &mut cuts);
        }
    }

    #[test]
    fn bytes_that_look_like_a_request_are_taken(
        field in select(vec!["messages", "input", "prompt", "token_ids"]),
        value in r#"("(role|type|content|tool_calls|text)"|[{}\[\]":,\\1]|null|\\u12| ){0,30}"#,
        mut cuts in prop::collection::vec(any::<Index>(), 1..4),
    ) {
        let body = format!("{{\"{field}\":{value}");
        for dialect in DIALECTS {
            streamed(body.as_bytes(), dialect, &mut cuts);
        }
    }
}
