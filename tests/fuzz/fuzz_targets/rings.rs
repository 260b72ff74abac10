//! Drives `salp_tests::hostile::rings`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| salp_tests::hostile::rings(input));
