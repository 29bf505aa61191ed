//! How much work the reading of a prompt is, for the tests that hold it to be linear in the bytes received.
//!
//! Outside tests nothing is counted and nothing is compiled.

/// Counts `bytes` that a loop examines, copies or hashes. Every loop over bytes of a body calls it.
#[inline(always)]
pub(super) fn spend(bytes: usize) {
    #[cfg(test)]
    tests::count(bytes);
    #[cfg(not(test))]
    let _ = bytes;
}

#[cfg(test)]
mod tests;
