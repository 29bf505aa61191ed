//! The libFuzzer target of `vllm_lb_fuzz::upstream`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vllm_lb_fuzz::upstream::run(data));
