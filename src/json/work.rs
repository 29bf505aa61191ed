//! How much work the reading of JSON is, for the tests that hold it to be linear in the bytes received.
//!
//! Outside tests nothing is counted and nothing is compiled.

#[cfg(test)]
thread_local! {
    /// The bytes that this thread has examined, copied or hashed.
    pub static WORK: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Counts `bytes` that a loop examines, copies or hashes. Every loop over bytes of a body calls it.
#[inline(always)]
pub(crate) fn spend(bytes: usize) {
    #[cfg(test)]
    WORK.set(WORK.get() + bytes as u64);
    #[cfg(not(test))]
    let _ = bytes;
}
