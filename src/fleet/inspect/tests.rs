//! Tests of the inspection: clocks, and the address of the admin listener.

use super::*;

#[test]
fn compares_a_date_with_the_middle_of_the_round_trip() {
    let at = |millis: u64| UNIX_EPOCH + Duration::from_millis(1_790_000_000_000 + millis);
    let read = |date: SystemTime| {
        let mut headers = HeaderMap::new();
        let date = HeaderValue::try_from(httpdate::fmt_http_date(date)).expect("a date");
        headers.insert(header::DATE, date);
        clock(&headers, at(0), at(1_000)).expect("a reading")
    };
    for (date, differs) in [(0, false), (2_900, false), (5_000, true), (90_000, true)] {
        assert_eq!(read(at(date)).differs_by(2.0), differs, "{date}");
    }
    assert!((read(at(90_000)).ahead - 90.0).abs() < 1.0);
    assert!((read(UNIX_EPOCH + Duration::from_secs(1_789_999_910)).ahead + 90.0).abs() < 1.0);
    assert_eq!(clock(&HeaderMap::new(), at(0), at(1)), None);
    let mut headers = HeaderMap::new();
    headers.insert(header::DATE, HeaderValue::from_static("yesterday"));
    assert_eq!(clock(&headers, at(0), at(1)), None);
}

#[test]
fn reaches_the_admin_listener_of_this_machine() {
    let table = [
        ("0.0.0.0:9090", Some("http://127.0.0.1:9090")),
        ("[::]:9090", Some("http://[::1]:9090")),
        ("10.0.0.7:9090", Some("http://10.0.0.7:9090")),
        ("127.0.0.1:0", None),
        ("unix:/run/admin.sock", Some("unix:/run/admin.sock")),
    ];
    for (text, wanted) in table {
        let address = ListenAddress::parse(text).expect("an address");
        assert_eq!(reachable(&address).as_deref(), wanted, "{text}");
    }
}
