//! Everything that is tested from outside: the model's laws, contracts, and the real binary.
#![expect(clippy::unwrap_used, reason = "in a test, that is how it fails")]

mod agents;
mod config;
mod layers;
mod model;
mod runner;
mod runner_bench;
mod runner_stop;
mod transport;
mod transport_local;
