//! Wall-clock time as the API writes it.

use std::time::{SystemTime, UNIX_EPOCH};

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
    httpdate::fmt_http_date(SystemTime::now())
}
