//! Runs a test in a process of its own, for what only a whole process can be measured by.

use std::process::Command;
use std::thread;

/// Set in the process that runs one test alone.
const OWN_PROCESS: &str = "VLLM_LB_TEST_OWN_PROCESS";

/// Runs `test` where no other test runs in the process: here under nextest, which starts a process for each
/// test, and else in a process of its own. Must be called on the thread of the test.
pub fn in_own_process(test: impl FnOnce()) {
    let current = thread::current();
    // The harness names a test's thread by its path; with one thread, tests run in turn on `main`.
    let name = current.name().filter(|name| *name != "main");
    let Some(name) = name.filter(|_| !is_alone()) else { return test() };
    let program = std::env::current_exe().expect("the test is a file");
    let run = Command::new(program).args(["--exact", name, "--nocapture"]).env(OWN_PROCESS, "1").output();
    let run = run.expect("the test can be started again");
    let output = String::from_utf8_lossy(&run.stdout);
    assert!(output.contains("1 passed"), "{name}: {output}\n{}", String::from_utf8_lossy(&run.stderr));
}

#[allow(clippy::disallowed_methods, reason = "how a test runs is no setting of the product")]
fn is_alone() -> bool {
    ["NEXTEST", OWN_PROCESS].iter().any(|name| std::env::var_os(name).is_some())
}
