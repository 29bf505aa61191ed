//! Wall-clock time as the API writes it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970, with their fraction.
pub fn unix() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Whole seconds since 1970: `created` in answers.
pub fn created() -> u64 {
    unix() as u64
}

/// Now, as the `date` header says it.
pub fn http_date() -> String {
    date(created())
}

/// `Fri, 20 Nov 2026 06:09:22 GMT`, by counting days from a first of March, where leap days come last.
fn date(seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    // The calendar's years begin in March.
    let (month, carry) = if month < 10 { (month + 2, 0) } else { (month - 10, 1) };
    format!(
        "{}, {day:02} {} {:04} {:02}:{:02}:{:02} GMT",
        DAYS[(days % 7) as usize],
        MONTHS[month as usize],
        era * 400 + year_of_era + carry,
        rest / 3_600,
        rest / 60 % 60,
        rest % 60,
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_are_as_in_http() {
        for (seconds, expected) in [
            (0, "Thu, 01 Jan 1970 00:00:00 GMT"),
            (784_111_777, "Sun, 06 Nov 1994 08:49:37 GMT"),
            (1_709_164_800, "Thu, 29 Feb 2024 00:00:00 GMT"),
            (1_795_154_962, "Fri, 20 Nov 2026 06:09:22 GMT"),
        ] {
            assert_eq!(super::date(seconds), expected);
        }
    }
}
