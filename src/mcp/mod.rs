//! The only place that knows MCP: tools, resources, prompts, and what is pushed to clients.
//!
//! It turns requests into the dispatcher's verbs and what they give into answers that a model can act on. It does not know how
//! work travels or runs.

mod agents;
mod answer;
mod call;
mod changes;
mod forms;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod permits;
mod problem;
mod prompts;
mod questions;
mod report;
mod resources;
mod roots;
mod server;
mod stdio;
mod tasks;
#[cfg(test)]
mod tests;
mod waiting;
mod work;

pub use permits::needs;
pub use server::{Parts, Server, Wake};
pub use stdio::{Error, serve_lines, serve_stdio};
