//! `stations`: who is in the lattice, and how busy.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::failure::Failure;
use super::session::{Session, Use};
use super::table::Table;

pub(super) async fn run(session: &mut Session) -> Result<(), Failure> {
    let Some(reader) = session.open(Use::Look).await? else { return super::session_is_empty(session) };
    let snapshot = reader.dispatcher.registry().snapshot();
    let holders = snapshot.agents.values().map(|agent| &agent.station);
    let stations: BTreeSet<_> = snapshot.stations.keys().chain(holders).collect();
    let mut found = Vec::new();
    let mut table = Table::new(["STATION", "STATUS", "PROCESSES", "WAITING", "RUNNING", "AGENTS"]).cut("AGENTS");
    for station in stations {
        let load = reader.dispatcher.transport().queue.load(station).await?;
        let waiting: u32 = load.iter().map(|lane| lane.waiting).sum();
        let running: u32 = load.iter().map(|lane| lane.held).sum();
        let instances = snapshot.stations.get(station).map(Vec::as_slice).unwrap_or_default();
        let status = if instances.is_empty() { "offline" } else { "online" };
        let agents: Vec<&str> =
            snapshot.agents.iter().filter(|(_, agent)| agent.station == *station).map(|(name, _)| name.as_str()).collect();
        table.row([
            station.to_string(),
            status.to_owned(),
            instances.len().to_string(),
            waiting.to_string(),
            running.to_string(),
            agents.join(", "),
        ]);
        found.push(json!({
            "station": station, "status": status, "instances": instances, "agents": agents,
            "load": {"waiting": waiting, "running": running},
        }));
    }
    match (session.screen.json, found.is_empty()) {
        (true, _) => session.screen.json(&Value::from(found))?,
        (false, true) => session.screen.line("no station is in this lattice at the moment; start one (lattice-mcp leaf)")?,
        (false, false) => session.screen.table(&table)?,
    }
    Ok(())
}
