//! The server over an in-memory pair of streams and the embedded store. The tests play the leaf: they append what a leaf would.

mod changes;
mod client;
mod fixture;
mod forms;
mod questions;
mod surface;
mod tasks;
mod waiting;
mod wire;
mod work;

pub(super) use self::fixture::manifest;
