//! The pace of rounds.

use super::*;

#[test]
fn pauses_double_up_to_a_limit_and_differ() {
    assert_eq!(pause(0, 1.0), MIN_PAUSE);
    assert_eq!(pause(1, 1.0), MIN_PAUSE);
    assert_eq!(pause(2, 1.0), MIN_PAUSE * 2);
    assert_eq!(pause(3, 0.0), MIN_PAUSE * 2);
    for fruitless in [8, 100, u32::MAX] {
        assert_eq!((pause(fruitless, 1.0), pause(fruitless, 0.0)), (MAX_PAUSE, MAX_PAUSE / 2));
    }
}
