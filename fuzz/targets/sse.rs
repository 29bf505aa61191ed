//! The libFuzzer target of `vllm_lb_fuzz::sse`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vllm_lb_fuzz::sse::run(data));
