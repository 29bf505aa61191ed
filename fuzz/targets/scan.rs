//! The libFuzzer target of `vllm_lb_fuzz::scan`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vllm_lb_fuzz::scan::run(data));
