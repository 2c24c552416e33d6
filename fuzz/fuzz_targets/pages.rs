#![no_main]

#[allow(dead_code, reason = "one target of them")]
#[path = "../../tests/fuzz/targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|input: &[u8]| targets::pages(input, &|_, action| action()));
