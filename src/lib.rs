//! lattice-mcp: any MCP client as the orchestrator of a mesh of agents.
//!
//! From the top down; a module uses only what stands below it, and a test holds that:
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`cli`], [`init`] | the command line, and the files that `init` writes |
//! | [`install`] | an entry for this program in the configuration files of MCP clients |
//! | [`station`] | the composition root: builds the parts, runs them, drains them |
//! | [`http`] | the HTTP door: `/mcp`, `/health`, tokens, sessions |
//! | [`mcp`] | the only place that knows MCP: tools, prompts, resources |
//! | [`dispatcher`] | assign, check, await, answer, cancel, escalate |
//! | [`leaf`] | take from the hook, run, report |
//! | [`orders`] | orders on their way to an agent: held back, taken apart, called off |
//! | [`registry`] | agents, stations, signs of life |
//! | [`runs`] | the run store: the fold of the log, with its lineage |
//! | [`results`] | parts of results of any size |
//! | [`audit`] | tells what happens to the lattice itself |
//! | [`works`] | a work's state, read off the log |
//! | [`runner`] | how an agent is executed |
//! | [`transport`] | log, queue, table, blobs: in one SQLite file, on a NATS server, and on both at once |
//! | [`agents`] | agents from files, watched |
//! | [`telemetry`] | the clock, new ids, trace context, logs |
//! | [`config`] | every setting, and where its value came from |
//! | [`model`] | pure: ids, events, the fold of a work, lineage |
//!
//! Invariants: a work's status is one pure function of its events ([`model::status::Status::after`]); there is no table of pending
//! work in memory whose loss could matter; an effect is acknowledged after it is durable, and is idempotent by work id.

pub mod agents;
pub mod audit;
pub mod cli;
pub mod config;
pub mod dispatcher;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod http;
pub mod init;
pub mod install;
pub mod leaf;
pub mod mcp;
pub mod model;
pub mod orders;
pub mod registry;
pub mod results;
pub mod runner;
pub mod runs;
pub mod station;
pub mod telemetry;
pub mod transport;
pub mod works;
