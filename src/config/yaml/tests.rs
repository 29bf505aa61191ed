//! Trees, duplicate keys and other problems of YAML files.

use super::*;

fn outline(node: &YamlNode) -> String {
    match &node.value {
        YamlValue::Null => "null".into(),
        YamlValue::Broken => "?".into(),
        YamlValue::Text(text) => text.clone(),
        YamlValue::List(items) => {
            format!("[{}]", items.iter().map(outline).collect::<Vec<_>>().join(","))
        }
        YamlValue::Map(entries) => {
            let pair = |entry: &YamlEntry| format!("{}:{}", entry.key, outline(&entry.node));
            format!("{{{}}}", entries.iter().map(pair).collect::<Vec<_>>().join(","))
        }
    }
}

fn read(text: &str) -> (Option<String>, Vec<String>) {
    let mut problems = Vec::new();
    let node = parse(text, &mut problems);
    (node.as_ref().map(outline), problems.iter().map(ConfigProblem::to_string).collect())
}

#[test]
fn reads_trees() {
    let table = [
        ("", "null"),
        ("# nothing", "null"),
        ("\u{feff}a: 1", "{a:1}"),
        ("a: ~\nb: ''\nc: null\nd: 'null'", "{a:null,b:,c:null,d:null}"),
        ("a: [1, {b: c}]\nd:\n  - e", "{a:[1,{b:c}],d:[e]}"),
        ("a: &x [1]\nb: *x", "{a:[1],b:[1]}"),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", "{a:{b:1,c:2},d:{c:3,b:1}}"),
        ("d: {<<: [{a: 1}, {a: 2, b: 3}]}", "{d:{a:1,b:3}}"),
        ("a: http://x:1", "{a:http://x:1}"),
    ];
    for (text, wanted) in table {
        assert_eq!(read(text), (Some(wanted.into()), vec![]), "{text}");
    }
}

#[test]
fn reports_every_duplicate_key() {
    let (tree, problems) = read("a: 1\nb: {c: 1, c: 2}\na: 3\n");
    assert_eq!(tree.as_deref(), Some("{a:1,b:{c:1}}"));
    assert_eq!(
        problems,
        ["b.c: given twice, first on line 2 (line 2)", "a: given twice, first on line 1 (line 3)"]
    );
}

#[test]
fn reports_one_problem_for_text_that_is_not_one_document() {
    let deep = "[".repeat(40);
    let bomb = format!(
        "a: &a [{}]\nb: &b [{}]\nc: &c [{}]\nd: [{}]\n",
        "x,".repeat(50),
        "*a,".repeat(50),
        "*b,".repeat(50),
        "*c,".repeat(50)
    );
    // Each line nests the one before it deeper by 20 levels.
    let ladder: String =
        (1..5).map(|n| format!("k{n}: &k{n} {}*k{}{}\n", "[".repeat(20), n - 1, "]".repeat(20))).collect();
    let ladder = format!("k0: &k0 x\n{ladder}");
    let large = " ".repeat(MAX_BYTES + 1);
    for text in [
        "a: [",
        "a: b: c",
        "a: 1\n---\nb: 2",
        "? [a]\n: b",
        "a: *x",
        "a: &x [*x]",
        &deep,
        &ladder,
        &bomb,
        &large,
    ] {
        let (tree, problems) = read(text);
        assert_eq!((tree, problems.len()), (None, 1), "{problems:?}");
    }
}

#[test]
fn reports_a_merge_key_without_a_map() {
    assert_eq!(
        read("a: {<<: 3}").1,
        ["a.<<: must be a map of keys or a list of maps, is a single value (line 1)"]
    );
}
