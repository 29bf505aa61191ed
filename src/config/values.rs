//! How single values are written: durations, sizes, numbers, yes and no, texts, addresses.
//!
//! Every reader takes the text and gives the value, or the rest of a sentence that begins with the
//! key: what was seen and what is allowed. The writers give the form that the readers read.

use std::fmt::Display;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::problem::seen;
use super::secret::Secret;
use super::types::{ListenAddress, Network, TrustedProxy};

/// A reader's answer; the error reads on after the key.
pub type ReadResult<T> = Result<T, String>;

const DURATION_UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

const SIZE_UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("B", 1),
    ("KB", 1000),
    ("KiB", 1 << 10),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
    ("TB", 1_000_000_000_000),
    ("TiB", 1 << 40),
];

/// Splits `64KiB` into 64 and `KiB`; a number that is too long counts as the largest there is.
fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    if digits == 0 {
        return None;
    }
    Some((text[..digits].parse().unwrap_or(u64::MAX), &text[digits..]))
}

fn duration(text: &str) -> ReadResult<Duration> {
    let bad = || format!("{} is not a duration: write 500ms, 2s, 5m, 1h, 7d or 0", seen(text));
    let (number, unit) = number_and_unit(text).ok_or_else(bad)?;
    if number == 0 && unit.is_empty() {
        return Ok(Duration::ZERO);
    }
    let (_, factor) = DURATION_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?;
    Ok(Duration::from_millis(number.saturating_mul(*factor)))
}

fn size(text: &str) -> ReadResult<u64> {
    let bad = || format!("{} is not a size: write 1024, 64KiB, 2MiB, 1GiB or 10GB", seen(text));
    let (number, unit) = number_and_unit(text).ok_or_else(bad)?;
    let (_, factor) = SIZE_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?;
    Ok(number.saturating_mul(*factor))
}

fn within<T: PartialOrd>(
    text: &str,
    value: T,
    range: &RangeInclusive<T>,
    show: impl Fn(&T) -> String,
) -> ReadResult<T> {
    if range.contains(&value) {
        return Ok(value);
    }
    Err(format!("{} is out of range: {} to {}", seen(text), show(range.start()), show(range.end())))
}

pub fn duration_in(range: RangeInclusive<Duration>) -> impl Fn(&str) -> ReadResult<Duration> {
    move |text| within(text, duration(text)?, &range, |value| show_duration(*value))
}

pub fn size_in(range: RangeInclusive<u64>) -> impl Fn(&str) -> ReadResult<u64> {
    move |text| within(text, size(text)?, &range, |value| show_size(*value))
}

/// A whole number, as the integer type that the caller needs.
pub fn integer_in<T: TryFrom<u64> + PartialOrd + Display>(
    range: RangeInclusive<T>,
) -> impl Fn(&str) -> ReadResult<T> {
    move |text| {
        let out_of_range = || format!("{} is out of range: {} to {}", seen(text), range.start(), range.end());
        let digits = text.strip_prefix('-').unwrap_or(text);
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(format!("{} is not a whole number", seen(text)));
        }
        let value = text.parse::<u64>().ok().and_then(|value| T::try_from(value).ok());
        within(text, value.ok_or_else(out_of_range)?, &range, T::to_string)
    }
}

pub fn number_in(range: RangeInclusive<f64>) -> impl Fn(&str) -> ReadResult<f64> {
    move |text| {
        let looks_right = text.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(&byte));
        match text.parse::<f64>() {
            Ok(value) if looks_right => within(text, value, &range, f64::to_string),
            _ => Err(format!("{} is not a number", seen(text))),
        }
    }
}

pub fn boolean(text: &str) -> ReadResult<bool> {
    match text {
        "true" | "True" | "TRUE" => Ok(true),
        "false" | "False" | "FALSE" => Ok(false),
        _ => Err(format!("{} is neither true nor false", seen(text))),
    }
}

/// Any text of visible characters and spaces.
pub fn plain(text: &str) -> ReadResult<String> {
    if text.trim().is_empty() {
        return Err("must not be empty".into());
    }
    if text.chars().any(char::is_control) {
        return Err(format!("{} has control characters", seen(text)));
    }
    Ok(text.into())
}

/// A token or key that goes into a header; never shown.
pub fn secret(text: &str) -> ReadResult<Secret> {
    if text.is_empty() {
        return Err("must not be empty: leave the key out where there is none".into());
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("must be visible ASCII characters without spaces".into());
    }
    Ok(Secret::new(text))
}

/// The name of a header, or of a cookie, in small letters.
pub fn header_name(text: &str) -> ReadResult<String> {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if text.is_empty() || !text.bytes().all(is_part) {
        return Err(format!("{} is no name: write letters, digits and dashes", seen(text)));
    }
    Ok(text.to_ascii_lowercase())
}

pub fn file_path(text: &str) -> ReadResult<PathBuf> {
    plain(text).map(PathBuf::from)
}

/// The path of a request: begins with a slash, has no query.
pub fn url_path(text: &str) -> ReadResult<String> {
    if text.is_empty() {
        return Err("must not be empty".into());
    }
    let clean = text.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#".contains(&byte));
    if !text.starts_with('/') || !clean {
        return Err(format!("{} is not a path: write it as /health, without query", seen(text)));
    }
    Ok(text.into())
}

/// `host:port` or `unix:/path`.
pub fn address(text: &str) -> ReadResult<ListenAddress> {
    let remedy = "write host:port, [::]:port or unix:/path";
    if text.is_empty() {
        return Err(format!("must not be empty: {remedy}"));
    }
    if let Some(path) = text.strip_prefix("unix:") {
        let path = unix_path(path).ok_or_else(|| format!("{} is no unix socket: {remedy}", seen(text)))?;
        return Ok(ListenAddress::Unix(path));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if is_host(host) => (host, port),
        _ => return Err(format!("{} is no address: {remedy}", seen(text))),
    };
    match port.parse::<u16>() {
        Ok(number) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
            Ok(ListenAddress::Tcp(format!("{host}:{number}")))
        }
        _ => Err(format!("{} has no valid port: 0 to 65535, 0 lets the system choose", seen(text))),
    }
}

/// The absolute path after `unix:`, also as `unix:///path`.
pub(super) fn unix_path(text: &str) -> Option<PathBuf> {
    let path = text.strip_prefix("//").unwrap_or(text);
    let clean = path.starts_with('/') && path.len() > 1 && !path.chars().any(char::is_control);
    clean.then(|| PathBuf::from(path))
}

/// A host name, an IPv4 address, or an IPv6 address in brackets.
pub(super) fn is_host(host: &str) -> bool {
    if let Some(inner) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return inner.parse::<std::net::Ipv6Addr>().is_ok();
    }
    let label = |label: &str| {
        !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    host.len() <= 253 && host.strip_suffix('.').unwrap_or(host).split('.').all(label)
}

/// An address, a network in CIDR form, or `unix`.
pub fn trusted_proxy(text: &str) -> ReadResult<TrustedProxy> {
    if text == "unix" {
        return Ok(TrustedProxy::Unix);
    }
    let bad = || format!("{} is no network: write 10.0.0.0/8, 10.0.0.7, fd00::/8, ::1 or unix", seen(text));
    let (address, prefix) =
        text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
    let address: IpAddr = address.parse().map_err(|_| bad())?;
    let whole = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        None => whole,
        Some(bits) if bits.bytes().all(|byte| byte.is_ascii_digit()) => bits.parse().map_err(|_| bad())?,
        Some(_) => return Err(bad()),
    };
    let network = Network::new(address, prefix).ok_or_else(bad)?;
    // A typing error here opens more, or other, networks than was meant.
    if !network.begins_with(address) {
        return Err(format!("{} has bits after its prefix: write {network}", seen(text)));
    }
    Ok(TrustedProxy::Network(network))
}

// === writing ===

/// In the largest unit that leaves no rest.
pub fn show_duration(value: Duration) -> String {
    let ms = u64::try_from(value.as_millis()).unwrap_or(u64::MAX);
    if ms == 0 {
        return "0".into();
    }
    let fits = DURATION_UNITS.iter().rev().find(|(_, factor)| ms.is_multiple_of(*factor));
    fits.map_or_else(|| format!("{ms}ms"), |(unit, factor)| format!("{}{unit}", ms / factor))
}

/// In the unit, binary or decimal, that gives the smallest whole number.
pub fn show_size(value: u64) -> String {
    let fits =
        SIZE_UNITS.iter().rev().filter(|(_, factor)| value >= *factor && value.is_multiple_of(*factor));
    match fits.max_by_key(|(unit, factor)| (*factor, unit.is_empty())) {
        Some((unit, factor)) => format!("{}{unit}", value / factor),
        None => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    #[test]
    fn durations() {
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
    fn sizes() {
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
    fn ranges_say_what_is_allowed() {
        assert_eq!(
            duration_in(ms(10)..=ms(3_600_000))("2h"),
            Err("\"2h\" is out of range: 10ms to 1h".into())
        );
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
    fn addresses() {
        for text in ["0.0.0.0:8000", "localhost:0", "[::]:8000", "gpu-0.lan:80"] {
            assert_eq!(address(text), Ok(ListenAddress::Tcp(text.into())), "{text}");
        }
        for text in ["unix:/run/lb.sock", "unix:///run/lb.sock"] {
            assert_eq!(address(text), Ok(ListenAddress::Unix("/run/lb.sock".into())), "{text}");
        }
        for text in
            ["", "8000", ":8000", "*:8000", "::1:80", "a b:1", "h:", "h:+1", "h:65536", "unix:", "unix:x"]
        {
            assert!(address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn networks() {
        let table = [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.0.0.7", "10.0.0.7"),
            ("10.0.0.7/32", "10.0.0.7"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("::/0", "::/0"),
            ("::1", "::1"),
            ("FD00:0:0::/8", "fd00::/8"),
            ("2001:db8::/127", "2001:db8::/127"),
            ("::ffff:10.1.0.0/112", "10.1.0.0/16"),
            ("::ffff:10.1.0.7", "10.1.0.7"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::/80", "::/80"),
        ];
        for (text, shown) in table {
            let Ok(TrustedProxy::Network(network)) = trusted_proxy(text) else { panic!("{text}") };
            assert_eq!(network.to_string(), shown, "{text}");
            assert_eq!(trusted_proxy(shown), Ok(TrustedProxy::Network(network)), "{text}");
        }
        assert_eq!(trusted_proxy("unix"), Ok(TrustedProxy::Unix));
        for text in [
            "",
            "/",
            "10.0.0.0/",
            "10.0.0.0/33",
            "::/129",
            "::/256",
            "10/8",
            "10.0.0/8",
            "10.0.0.0/+8",
            "10.0.0.0/-1",
            "10.0.0.0/8/8",
            "010.0.0.0/8",
            "10.0.0.0 /8",
            "[::1]",
            "fe80::1%eth0",
            "localhost",
            "*",
            "Unix",
            "unix:/x",
            "10.0.0.0/999999999999",
            "::ffff:10.0.0.0/129",
            "10.0.0.1/8",
            "fd00::1/64",
            "::ffff:10.0.0.0/90",
        ] {
            assert!(trusted_proxy(text).is_err(), "{text}");
        }
        let wide = trusted_proxy("10.0.0.1/8").expect_err("has bits after its prefix");
        assert_eq!(wide, "\"10.0.0.1/8\" has bits after its prefix: write 10.0.0.0/8");
    }

    #[test]
    fn an_address_is_in_a_network_when_its_leading_bits_are_the_networks() {
        let table = [
            (&["10.0.0.0/8"][..], "10.255.0.1", true),
            (&["10.0.0.0/8"], "11.0.0.0", false),
            (&["10.0.0.0/8"], "::ffff:10.1.2.3", true),
            (&["::ffff:10.0.0.0/104"], "10.1.2.3", true),
            (&["10.0.0.7"], "10.0.0.7", true),
            (&["10.0.0.7"], "10.0.0.6", false),
            (&["10.0.0.0/31", "192.168.0.0/16"], "192.168.9.9", true),
            (&["0.0.0.0/0"], "203.0.113.9", true),
            (&["0.0.0.0/0"], "2001:db8::1", false),
            (&["::/0"], "2001:db8::1", true),
            // All of IPv6 is nothing of IPv4.
            (&["::/0"], "203.0.113.9", false),
            (&["::/0"], "::ffff:203.0.113.9", false),
            (&["fd00::/8"], "fdff::1", true),
            (&["fd00::/8"], "fe00::1", false),
            (&["::1"], "::1", true),
            // The deprecated IPv4-compatible form is an IPv6 address as any other.
            (&["127.0.0.1"], "::127.0.0.1", false),
            (&["unix"], "127.0.0.1", false),
            (&[], "127.0.0.1", false),
        ];
        for (networks, address, wanted) in table {
            let networks = networks.iter().map(|text| trusted_proxy(text).expect(text));
            let proxies = super::super::types::TrustedProxies::new(networks);
            let address = address.parse().expect("is an address");
            assert_eq!(proxies.contains(address), wanted, "{address} in {:?}", proxies.names());
        }
    }

    #[test]
    fn secrets_are_never_in_the_message() {
        for text in ["hunter 2", "hunter2\n", "hünter2"] {
            let message = secret(text).expect_err("is no header value");
            assert!(!message.contains("nter"), "{message}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(value: u64, millis in 0..u64::MAX / 2) {
            prop_assert_eq!(size(&show_size(value)), Ok(value));
            prop_assert_eq!(duration(&show_duration(ms(millis))), Ok(ms(millis)));
        }

        #[test]
        fn no_text_makes_a_reader_panic(text in "\\PC{0,12}") {
            let _ = (duration(&text), size(&text), address(&text), url_path(&text), plain(&text));
            let _ = (number_in(0.0..=1.0)(&text), integer_in(0..=9_u16)(&text), boolean(&text));
        }
    }
}
