//! `leaf`: runs this station's agents, without MCP.

use super::failure::Failure;
use super::session::Session;
use crate::station::{self, Doors};

pub(super) async fn run(session: &Session) -> Result<(), Failure> {
    Ok(station::serve(session.setting(), Doors::default()).await?)
}
