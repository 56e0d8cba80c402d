//! The pure centre: ids, agents, events, the fold of a work, lineage.
//!
//! Nothing here knows tokio, I/O or the clock; functions take `now`.

pub mod accept;
pub mod access;
pub mod after;
pub mod agent;
pub mod assignment;
pub mod audit;
pub mod budget;
pub mod event;
pub mod hex;
pub mod id;
pub mod keyed;
pub mod map;
pub mod output;
pub mod owner;
pub mod pace;
pub mod retry;
pub mod run;
pub mod size;
pub mod status;
pub mod time;
pub mod turn;
pub mod work;
