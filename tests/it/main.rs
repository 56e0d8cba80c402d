//! Everything that is tested from outside: the model's laws, contracts, and the real binary.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "in a test, that is how it fails")]
#![expect(clippy::disallowed_methods, reason = "tests have no station whose tracker would wait for their tasks")]

mod agents;
mod assign;
mod budgets;
mod claims;
mod cli;
mod clients;
mod clocks;
mod config;
mod conformance;
mod crash;
mod door;
mod events;
mod faults;
mod ground;
mod harness;
mod http;
mod install;
mod layers;
mod lifecycle;
mod malformed;
mod mcpsec;
mod model;
mod names;
mod nats_away;
mod nats_chain;
mod nats_connect;
mod nats_embedded;
mod nats_leaf;
mod nats_server;
mod orders;
mod questions;
mod quotas;
mod retries;
mod rpc;
mod rude;
mod runner;
mod runner_bench;
mod runner_stop;
mod stage;
mod stations;
mod timeouts;
mod transport;
mod transport_local;
mod web;
