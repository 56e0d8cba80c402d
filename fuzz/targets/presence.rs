#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lattice_mcp::fuzz::target("presence")(bytes));
