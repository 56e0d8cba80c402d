//! Parses the command line, runs, and exits with a code that means something.

fn main() {}
