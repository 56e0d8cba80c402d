//! What the lattice promises when processes, servers and networks fail: real processes, looked at from outside.
//!
//! Whatever is random comes from a seed that is printed; `LATTICE_FAULT_SEED` gives it again, `LATTICE_FAULT_ROUNDS` asks for more
//! rounds than a test run takes.

mod alone;
mod cluster;
mod desks;
mod fleet;
mod garbage;
mod homes;
mod kills;
mod namespaces;
mod outages;
mod partition;
mod proxy;
mod questions;
mod replicas;
mod sleep;
mod witness;

use rustix::process::{Pid, Signal, kill_process};

/// Small random numbers that can be had again from the seed that was printed.
struct Dice(u64);

impl Dice {
    /// From a seed that is new each time, unless one is given.
    #[expect(clippy::print_stderr, reason = "whoever sees a failure needs the seed")]
    fn new(what: &str) -> Self {
        let given = std::env::var("LATTICE_FAULT_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| u64::from(std::process::id()) * 7919);
        eprintln!("{what}: LATTICE_FAULT_SEED={seed}");
        Self(seed | 1)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).unwrap()
    }
}

/// How many rounds a test has, unless more are asked for.
fn rounds(few: u64) -> u64 {
    std::env::var("LATTICE_FAULT_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(few)
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// Milliseconds since 1970, as agents write them.
fn now_ms() -> u64 {
    u64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis()).unwrap()
}
