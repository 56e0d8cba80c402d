//! `leaf`: runs this station's agents, without MCP.

use super::failure::Failure;
use super::session::Session;
use crate::station::{self, Doors, Setting};

pub(super) async fn run(session: &Session) -> Result<(), Failure> {
    let setting = Setting { by_name: session.loaded.shares_by_name(true), runs_only: true, ..session.setting() };
    Ok(station::serve(setting, Doors::default()).await?)
}
