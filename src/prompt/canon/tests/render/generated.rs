//! Conversations by chance.

use super::*;

// === generated ===

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-zA-Z ,.é😀\n\"\\\\/\t]{1,30}",
        any::<String>().prop_filter("an empty text is no turn", |text| !text.is_empty()),
    ]
}

/// JSON whose keys keep their order.
fn value() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i32>().prop_map(Json::from),
        text().prop_map(Json::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
            entries(inner).prop_map(Json::Object),
        ]
    })
}

fn entries(inner: impl Strategy<Value = Json>) -> impl Strategy<Value = serde_json::Map<String, Json>> {
    prop::collection::vec(("[a-zé\"]{1,6}", inner), 0..4).prop_map(|entries| entries.into_iter().collect())
}

fn object() -> impl Strategy<Value = Json> {
    entries(value()).prop_map(Json::Object)
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let piece = prop_oneof![
        4 => text().prop_map(Piece::Text),
        1 => "[a-zA-Z0-9+/]{8,40}".prop_map(Piece::Image),
    ];
    prop::collection::vec(piece, 1..4)
}

fn turn() -> impl Strategy<Value = Turn> {
    let calls = || prop::collection::vec(("[a-z_]{1,12}", object()), 0..3);
    prop_oneof![
        pieces().prop_map(Turn::User),
        (text(), calls()).prop_map(|(text, calls)| Turn::Assistant { text: Some(text), calls }),
        calls().prop_map(|calls| Turn::Assistant { text: None, calls }),
        pieces().prop_map(Turn::Result),
    ]
}

prop_compose! {
    fn any_tool()(name in "[a-z_]{1,12}", description in text(), schema in object()) -> Tool {
        Tool { name, description, schema }
    }
}

prop_compose! {
    pub fn talk()(
        system in prop::option::of(text()),
        tools in prop::collection::vec(any_tool(), 0..3),
        turns in prop::collection::vec(turn(), 1..7),
    ) -> Talk {
        Talk { system, tools, turns }
    }
}
