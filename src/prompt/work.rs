//! Tests that reading a prompt takes work linear in the bytes received.

#[cfg(test)]
mod tests;
