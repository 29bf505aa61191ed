//! The fuzz targets over their seeds and a bounded number of mutations of them. `./dev fuzz` lets libFuzzer
//! look for more.
//!
//! `VLLM_LB_FUZZ_RUNS` says how many mutations a target gets, and `VLLM_LB_FUZZ_SEED` which ones.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use dice::Dice;

#[path = "../common/dice.rs"]
mod dice;
mod mutate;
#[path = "../../../fuzz/src/lib.rs"]
mod targets;

#[allow(clippy::disallowed_methods, reason = "how a test runs is no setting of the product")]
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Files of fuzz/seeds/NAME.
fn seeds(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name);
    let mut files: Vec<_> = fs::read_dir(&directory)
        .expect("every target has seeds")
        .map(|entry| entry.expect("it can be read").path())
        .collect();
    files.sort();
    files.iter().map(|file| fs::read(file).expect("it can be read")).collect()
}

fn fuzz(name: &str, runs: u64, target: fn(&[u8])) {
    let runs = setting("VLLM_LB_FUZZ_RUNS").unwrap_or(runs);
    let seed = setting("VLLM_LB_FUZZ_SEED").unwrap_or(1);
    let corpus = seeds(name);
    assert!(!corpus.is_empty(), "{name} has no seeds");
    let attempt = |input: &[u8]| {
        if catch_unwind(AssertUnwindSafe(|| target(input))).is_err() {
            panic!("{name} fails with {:?}", String::from_utf8_lossy(input));
        }
    };
    corpus.iter().for_each(|input| attempt(input));
    let mut dice = Dice::new(seed, 0);
    for _ in 0..runs {
        attempt(&mutate::mutation(&corpus, &mut dice));
    }
}

#[test]
fn facts_of_a_body_are_those_of_serde_json() {
    fuzz("scan", 3000, targets::scan::run);
}

#[test]
fn a_chain_does_not_depend_on_how_a_body_is_written() {
    fuzz("canon", 1000, targets::canon::run);
}

#[test]
fn an_edited_body_is_a_merge() {
    fuzz("edits", 1500, targets::edits::run);
}

#[test]
fn a_form_reads_the_same_in_any_pieces() {
    fuzz("form", 3000, targets::form::run);
}

#[test]
fn a_stream_reads_the_same_in_any_chunks() {
    fuzz("sse", 1000, targets::sse::run);
}

#[test]
fn any_text_is_a_configuration_or_problems() {
    fuzz("config", 500, targets::config::run);
}

#[test]
fn a_message_survives_being_written() {
    fuzz("exchange", 10000, targets::exchange::run);
}

#[test]
fn an_upstreams_answer_reads_the_same_in_any_pieces() {
    fuzz("upstream", 2000, targets::upstream::run);
}
