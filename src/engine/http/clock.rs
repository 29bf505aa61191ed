//! Wall-clock time as the API writes it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Seconds since 1970, with their fraction.
pub(super) fn unix() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Whole seconds since 1970: `created` in answers.
pub(super) fn created() -> u64 {
    unix() as u64
}

/// Now, as the `date` header says it.
pub(super) fn http_date() -> String {
    skewed_http_date(0)
}

/// The `date` header of a machine whose clock is ahead by this many seconds.
pub(super) fn skewed_http_date(seconds: i64) -> String {
    let (now, skew) = (SystemTime::now(), Duration::from_secs(seconds.unsigned_abs()));
    let skewed = if seconds < 0 { now.checked_sub(skew) } else { now.checked_add(skew) };
    httpdate::fmt_http_date(skewed.unwrap_or(now))
}
