//! The formats by tables, and with hostile texts of clients.

use std::time::Duration;

use log::kv::ToValue;
use proptest::prelude::*;

use super::*;

const FORMATS: [LogFormat; 3] = [LogFormat::Txt, LogFormat::Json, LogFormat::Yaml];

fn origin() -> Origin<'static> {
    let time = UNIX_EPOCH + Duration::from_millis(1_795_162_733_123);
    Origin { time, thread: "main", pid: 42 }
}

fn show(
    format: LogFormat,
    detail: bool,
    level: Level,
    message: &str,
    fields: &[(&str, Value<'_>)],
) -> String {
    let style = LogStyle { format, detail, colour: false };
    let source: &[(&str, Value<'_>)] = fields;
    let record = |args: std::fmt::Arguments<'_>| {
        let record = Record::builder()
            .args(args)
            .level(level)
            .target("vllm_lb::proxy")
            .module_path(Some("vllm_lb::proxy::peer"))
            .file(Some("src/proxy/peer.rs"))
            .line(Some(7))
            .key_values(&source)
            .build();
        super::format(&record, level, style, origin())
    };
    record(format_args!("{message}"))
}

#[test]
fn formats_short_records() {
    let fields =
        [("upstream", "gpu-0:8000".to_value()), ("status", 200_u16.to_value()), ("share", 0.5.to_value())];
    let table = [
        (LogFormat::Txt, "08:18:53.123 INFO  request done upstream=gpu-0:8000 status=200 share=0.5\n"),
        (
            LogFormat::Json,
            "{\"time\":\"2026-11-20T08:18:53.123Z\",\"level\":\"info\",\"target\":\"vllm_lb::proxy\",\
             \"message\":\"request done\",\"upstream\":\"gpu-0:8000\",\"status\":200,\"share\":0.5}\n",
        ),
        (
            LogFormat::Yaml,
            "---\ntime: 2026-11-20T08:18:53.123Z\nlevel: info\ntarget: \"vllm_lb::proxy\"\n\
             message: \"request done\"\nupstream: \"gpu-0:8000\"\nstatus: 200\nshare: 0.5\n",
        ),
    ];
    for (format, wanted) in table {
        assert_eq!(show(format, false, Level::Info, "request done", &fields), wanted);
    }
}

#[test]
fn formats_detailed_records() {
    let fields = [("ok", false.to_value())];
    let table = [
        (
            LogFormat::Txt,
            "2026-11-20T08:18:53.123Z ERROR vllm_lb::proxy: no answer ok=false module=vllm_lb::proxy::peer \
             file=src/proxy/peer.rs:7 thread=main pid=42\n",
        ),
        (
            LogFormat::Json,
            "{\"time\":\"2026-11-20T08:18:53.123Z\",\"level\":\"error\",\"target\":\"vllm_lb::proxy\",\
             \"message\":\"no answer\",\"ok\":false,\"module\":\"vllm_lb::proxy::peer\",\
             \"file\":\"src/proxy/peer.rs:7\",\"thread\":\"main\",\"pid\":42}\n",
        ),
        (
            LogFormat::Yaml,
            "---\ntime: 2026-11-20T08:18:53.123Z\nlevel: error\ntarget: \"vllm_lb::proxy\"\n\
             message: \"no answer\"\nok: false\nmodule: \"vllm_lb::proxy::peer\"\n\
             file: \"src/proxy/peer.rs:7\"\nthread: \"main\"\npid: 42\n",
        ),
    ];
    for (format, wanted) in table {
        assert_eq!(show(format, true, Level::Error, "no answer", &fields), wanted);
    }
}

#[test]
fn a_text_of_a_client_never_forges_a_record() {
    let attacks = [
        ("a\nb", "\"a\\nb\""),
        ("a\r\n---\nlevel: error", "\"a\\r\\n---\\nlevel: error\""),
        ("\u{1b}[31mred", "\"\\u001b[31mred\""),
        ("\",\"level\":\"error", "\"\\\",\\\"level\\\":\\\"error\""),
        ("x status=500", "\"x status=500\""),
        ("back\\slash", "\"back\\\\slash\""),
        ("\u{85}\u{2028}\u{202e}\u{7f}\0", "\"\\u0085\\u2028\\u202e\\u007f\\u0000\""),
    ];
    for (attack, wanted) in attacks {
        for format in FORMATS {
            let shown = show(format, false, Level::Info, "seen", &[("path", attack.to_value())]);
            assert!(shown.contains(wanted), "{shown}");
            let as_message = show(format, false, Level::Info, attack, &[]);
            assert!(as_message.contains(wanted), "{as_message}");
        }
    }
    assert!(
        show(LogFormat::Txt, false, Level::Info, "seen", &[("path", "".to_value())])
            .ends_with(" path=\"\"\n")
    );
}

#[test]
fn a_field_never_takes_the_place_of_another() {
    let fields = [("level", "x".to_value()), ("a", 1.to_value()), ("a", 2.to_value()), ("pid", 3.to_value())];
    let shown = show(LogFormat::Json, true, Level::Info, "m", &fields);
    for wanted in ["\"level_\":\"x\"", "\"a\":1", "\"a_\":2", "\"pid\":3", "\"pid_\":42"] {
        assert!(shown.contains(wanted), "{shown}");
    }
}

#[test]
fn writes_numbers_unknown_to_json_as_strings() {
    let shown = show(LogFormat::Json, false, Level::Info, "m", &[("x", f64::NAN.to_value())]);
    assert!(shown.contains("\"x\":\"NaN\""), "{shown}");
}

#[test]
fn writes_colours_only_when_enabled() {
    let style = LogStyle { format: LogFormat::Txt, detail: false, colour: true };
    let record = Record::builder().args(format_args!("m")).level(Level::Warn).build();
    let shown = super::format(&record, Level::Warn, style, origin());
    assert_eq!(shown, "08:18:53.123 \u{1b}[33mWARN \u{1b}[0m m\n");
}

#[test]
fn hides_the_directories_of_dependencies() {
    assert_eq!(
        short_path("/build/.cargo/registry/src/index-1/pingora-core-0.9.1/src/a.rs"),
        "pingora-core-0.9.1/src/a.rs"
    );
    assert_eq!(short_path("src/app.rs"), "src/app.rs");
}

#[test]
fn formats_dates() {
    let table = [
        (0, (1970, 1, 1)),
        (58, (1970, 2, 28)),
        (59, (1970, 3, 1)),
        (789, (1972, 2, 29)),
        (11_016, (2000, 2, 29)),
        (20_777, (2026, 11, 20)),
        (47_540, (2100, 2, 28)),
        (47_541, (2100, 3, 1)),
    ];
    for (days, wanted) in table {
        assert_eq!(date(days), wanted, "{days}");
    }
}

proptest! {
    #[test]
    fn whatever_is_logged_is_one_record_that_reads_back(
        message in "\\PC{0,20}|[\\x00-\\x7f]{0,20}",
        value in any::<String>(),
    ) {
        let fields = [("value", value.to_value())];
        let txt = show(LogFormat::Txt, true, Level::Info, &message, &fields);
        prop_assert_eq!(txt.lines().count(), 1);
        prop_assert!(!txt.trim_end_matches('\n').chars().any(char::is_control));
        let json = show(LogFormat::Json, true, Level::Info, &message, &fields);
        let read: serde_json::Value = serde_json::from_str(&json).expect("is JSON");
        prop_assert_eq!(read["message"].as_str(), Some(&*message));
        prop_assert_eq!(read["value"].as_str(), Some(&*value));
        let yaml = show(LogFormat::Yaml, true, Level::Info, &message, &fields);
        let mut problems = Vec::new();
        let node = crate::config::yaml::parse(&yaml, &mut problems);
        prop_assert!(node.is_some() && problems.is_empty(), "{:?}", problems);
        let shown = format!("{node:?}");
        let wanted = format!("Text({value:?})");
        prop_assert!(shown.contains(&wanted), "{}", shown);
    }
}
