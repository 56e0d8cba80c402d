//! Parses the command line, runs, and exits with a code that means something.

use std::process::ExitCode;

fn main() -> ExitCode {
    lattice_mcp::cli::main(std::env::args_os())
}
