//! Drives `salp_tests::hostile::requests`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| salp_tests::hostile::requests(input));
