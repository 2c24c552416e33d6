#![no_main]

#[allow(dead_code, reason = "one target of them")]
#[path = "../../tests/fuzz/targets.rs"]
mod targets;

// A library beneath panics on some inputs, which the reader catches: only what nobody catches is found.
libfuzzer_sys::fuzz_target!(
    init: drop(std::panic::take_hook()),
    |input: &[u8]| targets::tokenizer(input, &|_, action| action())
);
