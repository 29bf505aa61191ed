//! Durations, sizes and other values as they are written.

use proptest::prelude::*;

use super::*;

fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

#[test]
fn parses_durations() {
    let table = [
        ("0", 0),
        ("0s", 0),
        ("500ms", 500),
        ("2s", 2000),
        ("5m", 300_000),
        ("1h", 3_600_000),
        ("7d", 604_800_000),
    ];
    for (text, wanted) in table {
        assert_eq!(duration(text), Ok(ms(wanted)), "{text}");
    }
    for text in ["", "5", "s", "5 s", "-5s", "1.5s", "5S", "5min", "1h30m", "five"] {
        assert!(duration(text).is_err(), "{text}");
    }
}

#[test]
fn parses_sizes() {
    let table = [
        ("0", 0),
        ("1024", 1024),
        ("64KiB", 65536),
        ("2MiB", 2 << 20),
        ("1GiB", 1 << 30),
        ("10GB", 10_000_000_000),
        ("7B", 7),
    ];
    for (text, wanted) in table {
        assert_eq!(size(text), Ok(wanted), "{text}");
    }
    for text in ["", "KiB", "64k", "64kb", "64 KiB", "-1", "1.5GiB", "0x10"] {
        assert!(size(text).is_err(), "{text}");
    }
    assert_eq!(size("99999999999999999999TiB"), Ok(u64::MAX));
}

#[test]
fn names_the_range_in_the_error() {
    assert_eq!(duration_in(ms(10)..=ms(3_600_000))("2h"), Err("\"2h\" is out of range: 10ms to 1h".into()));
    assert_eq!(integer_in(1..=1000_u32)("0"), Err("\"0\" is out of range: 1 to 1000".into()));
    assert_eq!(
        integer_in(1..=1000_u32)("99999999999"),
        Err("\"99999999999\" is out of range: 1 to 1000".into())
    );
    assert_eq!(integer_in(1..=1000_u32)("-1"), Err("\"-1\" is out of range: 1 to 1000".into()));
    assert_eq!(number_in(0.0..=10.0)("0.05"), Ok(0.05));
    for text in ["", "nan", "inf", "1,5", "x"] {
        assert!(number_in(0.0..=10.0)(text).is_err(), "{text}");
    }
    assert!(number_in(0.0..=10.0)("1e300").is_err());
}

#[test]
fn keeps_secrets_out_of_the_message() {
    for text in ["hunter 2", "hunter2\n", "hünter2"] {
        let message = secret(text).expect_err("is no header value");
        assert!(!message.contains("nter"), "{message}");
    }
}

proptest! {
    #[test]
    fn parses_what_it_writes(value: u64, millis in 0..u64::MAX / 2) {
        prop_assert_eq!(size(&show_size(value)), Ok(value));
        prop_assert_eq!(duration(&show_duration(ms(millis))), Ok(ms(millis)));
    }

    #[test]
    fn never_panics(text in "\\PC{0,12}") {
        let _ = (duration(&text), size(&text), is_host(&text), url_path(&text), plain(&text));
        let _ = (number_in(0.0..=1.0)(&text), integer_in(0..=9_u16)(&text), boolean(&text));
    }
}
