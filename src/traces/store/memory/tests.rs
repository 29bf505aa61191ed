//! Tests of the store in memory that its shared tests do not cover.

use super::*;
use crate::traces::store::samples::conversation;

#[test]
fn bytes_are_read_while_the_store_is_busy() {
    let store =
        MemoryStore::new(StoreLimits { keep: std::time::Duration::from_secs(100), max_bytes: 1 << 20 });
    for record in conversation("s", 2, 10, 2) {
        store.put(&[Arc::new(record)], 1.0);
    }
    let held = store.held();
    assert!(store.bytes() > 0 && store.bytes() == held.bytes);
}
