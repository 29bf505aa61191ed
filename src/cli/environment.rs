//! The one door through which settings come from the environment.

/// Reads a variable of the environment; one that is not UTF-8 counts as not set.
#[allow(clippy::disallowed_methods, reason = "the only reader of the environment")]
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}
