//! Holds the reading of a prompt to work that is linear in the bytes received.

#[cfg(test)]
mod tests;
