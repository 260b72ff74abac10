//! Drives `salp_tests::hostile::kernels`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| salp_tests::hostile::kernels(input));
