//! Tests of `engine_metrics`: pages by table, cut, and of anything.

use proptest::prelude::*;

use super::*;

const SAMPLE: &[u8] = include_bytes!("../../../tests/data/vllm-0.32/metrics.body");

fn parsed(page: &str) -> EngineMetrics {
    parse_engine_metrics(page.as_bytes())
}

#[test]
fn a_page_of_a_real_server_is_understood() {
    let found = parse_engine_metrics(SAMPLE);
    let expected = EngineMetrics {
        running: Some(0),
        waiting: Some(0),
        kv_usage: Some(0.0),
        cache_tokens: Some(32_768),
        started: Some(1.79515492581e9),
        prefix_caching: Some(true),
    };
    assert_eq!(found, expected);
    assert!(!found.is_empty());
}

#[test]
fn what_is_not_said_is_absent() {
    let nothing = EngineMetrics::default();
    let table = [
        ("", nothing),
        ("\n\n# HELP vllm:num_requests_running 3\n", nothing),
        ("vllm:num_requests_running 3\n", EngineMetrics { running: Some(3), ..nothing }),
        ("  vllm:num_requests_running\t3.0 1700000000\r\n", EngineMetrics { running: Some(3), ..nothing }),
        ("vllm:num_requests_waiting_by_reason{reason=\"capacity\"} 4\n", nothing),
        ("vllm:num_requests_waiting{engine=\"0\"} 1.2e+01\n", EngineMetrics { waiting: Some(12), ..nothing }),
        // Values that are none.
        ("vllm:num_requests_running NaN\n", nothing),
        ("vllm:num_requests_running +Inf\n", nothing),
        ("vllm:num_requests_running -1\n", nothing),
        ("vllm:num_requests_running 1e300\n", nothing),
        ("vllm:num_requests_running many\n", nothing),
        ("vllm:num_requests_running{engine=\"0} 3\n", nothing),
        // Cut in the middle of the number, perhaps.
        (
            "vllm:num_requests_waiting 1\nvllm:num_requests_running 3",
            EngineMetrics { waiting: Some(1), ..nothing },
        ),
        ("vllm:kv_cache_usage_perc 0.25\n", EngineMetrics { kv_usage: Some(0.25), ..nothing }),
        ("vllm:kv_cache_usage_perc 1.5\n", EngineMetrics { kv_usage: Some(1.0), ..nothing }),
        ("vllm:gpu_cache_usage_perc 0.5\n", EngineMetrics { kv_usage: Some(0.5), ..nothing }),
        (
            "vllm:gpu_cache_usage_perc 0.5\nvllm:kv_cache_usage_perc 0.25\n",
            EngineMetrics { kv_usage: Some(0.25), ..nothing },
        ),
        ("process_start_time_seconds 1.5e+09\n", EngineMetrics { started: Some(1.5e9), ..nothing }),
        (
            "process_start_time_seconds{upstream=\"a\"} 20\nprocess_start_time_seconds{upstream=\"b\"} 10\n",
            EngineMetrics { started: Some(20.0), ..nothing },
        ),
        ("sglang:num_running_reqs 3\nvllm:new_metric 1\n\u{fffd}\n", nothing),
    ];
    for (page, expected) in table {
        assert_eq!(parsed(page), expected, "{page}");
    }
}

#[test]
fn engines_behind_one_address_are_added_and_their_usage_is_the_mean() {
    let page = "vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 3.0\n\
                vllm:num_requests_running{engine=\"1\",model_name=\"m\"} 4.0\n\
                vllm:num_requests_waiting{engine=\"0\",model_name=\"m\"} 0.0\n\
                vllm:num_requests_waiting{engine=\"1\",model_name=\"m\"} 9.0\n\
                vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.5\n\
                vllm:kv_cache_usage_perc{engine=\"1\",model_name=\"m\"} 1.0\n\
                vllm:cache_config_info{engine=\"0\",kv_cache_size_tokens=\"1000\"} 1.0\n\
                vllm:cache_config_info{block_size=\"16\",engine=\"1\",num_gpu_blocks=\"100\"} 1.0\n";
    let expected = EngineMetrics {
        running: Some(7),
        waiting: Some(9),
        kv_usage: Some(0.75),
        cache_tokens: Some(2600),
        started: None,
        prefix_caching: None,
    };
    assert_eq!(parsed(page), expected);
}

#[test]
fn prompts_are_cached_when_all_engines_cache_them() {
    let table = [
        ("enable_prefix_caching=\"True\"", "", Some(true)),
        ("enable_prefix_caching=\"True\"", "enable_prefix_caching=\"False\"", Some(false)),
        ("enable_prefix_caching=\"False\"", "enable_prefix_caching=\"True\"", Some(false)),
        ("enable_prefix_caching=\"None\"", "block_size=\"16\"", None),
    ];
    for (first, second, wanted) in table {
        let page = format!("vllm:cache_config_info{{{first}}} 1.0\nvllm:cache_config_info{{{second}}} 1.0\n");
        assert_eq!(parsed(&page).prefix_caching, wanted, "{page}");
    }
}

#[test]
fn a_cache_is_as_large_as_its_engine_says_or_as_its_blocks_are() {
    let table = [
        ("block_size=\"16\",num_gpu_blocks=\"200\"", Some(3200)),
        ("block_size=\"16\",kv_cache_size_tokens=\"900\",num_gpu_blocks=\"200\"", Some(900)),
        ("block_size=\"16\",kv_cache_size_tokens=\"None\",num_gpu_blocks=\"200\"", Some(3200)),
        ("block_size=\"16\",num_gpu_blocks=\"None\"", None),
        ("block_size=\"16\"", None),
        ("", None),
        ("kv_cache_size_tokens=\"0\"", None),
        ("kv_cache_size_tokens=\"-5\"", None),
        ("block_size=\"99999999999\",num_gpu_blocks=\"99999999999\"", None),
        ("kv_cache_size_tokens=\"99999999999999999999999\"", None),
    ];
    for (labels, expected) in table {
        let page = format!("vllm:cache_config_info{{{labels}}} 1.0\n");
        assert_eq!(parsed(&page).cache_tokens, expected, "{labels}");
        // One engine that says nothing leaves the sum unknown: too little would be worse than nothing.
        let page = format!("{page}vllm:cache_config_info{{kv_cache_size_tokens=\"5\"}} 1.0\n");
        assert_eq!(parsed(&page).cache_tokens, expected.map(|tokens| tokens + 5), "{labels}");
    }
}

#[test]
fn a_cut_page_says_what_its_whole_lines_say() {
    let whole = parse_engine_metrics(SAMPLE);
    let pieces = |metrics: EngineMetrics| {
        let floats = [metrics.kv_usage, metrics.started].map(|value| value.map(f64::to_bits));
        let [usage, started] = floats;
        [metrics.running, metrics.waiting, metrics.cache_tokens, usage, started]
    };
    for end in (0..SAMPLE.len()).step_by(97) {
        for (cut, all) in pieces(parse_engine_metrics(&SAMPLE[..end])).into_iter().zip(pieces(whole)) {
            assert!(cut.is_none() || cut == all, "{end}");
        }
    }
}

proptest! {
    #[test]
    fn anything_can_be_read(page in any::<Vec<u8>>()) {
        parse_engine_metrics(&page);
    }

    /// Lines of other metrics, of none, or of these with values that are none.
    #[test]
    fn lines_of_others_change_nothing(
        lines in prop::collection::vec((0..NAMES.len(), "[ -~]{0,30}", any::<bool>()), 0..30),
    ) {
        let mut page = String::from("vllm:num_requests_running{engine=\"0\"} 5\n");
        for (name, text, longer) in lines {
            let apart = if longer { "_x" } else { " x" };
            page.push_str(&format!("{}{apart}{text}\n", NAMES[name]));
        }
        page.push_str("vllm:num_requests_running{engine=\"1\"} 6\n");
        let found = parsed(&page);
        prop_assert_eq!(found, EngineMetrics { running: Some(11), ..EngineMetrics::default() });
    }
}
