/// Entry.
fn main() {}
