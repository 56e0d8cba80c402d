//! `agents`: the agents of the lattice, and those of this folder that no station offers yet.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::failure::Failure;
use super::session::{Session, Use};
use super::table::Table;
use crate::agents;
use crate::model::agent::Manifest;
use crate::model::id::{AgentName, StationId};
use crate::model::time::Timestamp;

struct Listed {
    manifest: Manifest,
    station: Option<StationId>,
    status: &'static str,
    paused_until: Option<Timestamp>,
    waiting: u32,
    running: u32,
}

pub(super) async fn run(session: &mut Session) -> Result<(), Failure> {
    let config = &session.loaded.config;
    let files = agents::load(&config.agent_dirs(&session.cwd), &config.agents, std::env::var_os("PATH").as_deref());
    for problem in &files.problems {
        tracing::warn!("{problem}");
    }
    let mut listed: BTreeMap<AgentName, Listed> = BTreeMap::new();
    for (name, definition) in files.definitions {
        let manifest = definition.manifest.clone();
        listed.insert(name, Listed { manifest, station: None, status: "not running", paused_until: None, waiting: 0, running: 0 });
    }
    if let Some(reader) = session.open(Use::Look).await? {
        let snapshot = reader.dispatcher.registry().snapshot();
        for (name, agent) in &snapshot.agents {
            let load = reader.dispatcher.transport().queue.load(&agent.station).await?;
            let lane = load.iter().find(|lane| lane.lane == agent.lane);
            let status = match (agent.online, &agent.manifest.unavailable) {
                (false, _) => "offline",
                (true, Some(_)) => "unavailable",
                (true, None) => "online",
            };
            let (waiting, running) = lane.map_or((0, 0), |lane| (lane.waiting, lane.held));
            let paused_until = lane.and_then(|lane| lane.paused_until);
            let (manifest, station) = (agent.manifest.clone(), Some(agent.station.clone()));
            listed.insert(name.clone(), Listed { manifest, station, status, paused_until, waiting, running });
        }
    }
    if session.screen.json {
        return Ok(session.screen.json(&listed.values().map(as_json).collect::<Value>())?);
    }
    if listed.is_empty() {
        return Ok(session.screen.line("no agents are known: lattice-mcp init writes one into ./agents to begin with")?);
    }
    let heads = ["NAME", "STATION", "STATUS", "WAITING", "RUNNING", "CAPABILITIES", "DESCRIPTION"];
    let mut table = Table::new(heads).cut("CAPABILITIES").cut("DESCRIPTION");
    for agent in listed.into_values() {
        let Manifest { name, description, capabilities, unavailable, .. } = agent.manifest;
        table.row([
            name.to_string(),
            agent.station.map_or_else(|| "-".to_owned(), String::from),
            agent.paused_until.map_or_else(|| agent.status.to_owned(), |until| format!("{}, paused until {until}", agent.status)),
            agent.waiting.to_string(),
            agent.running.to_string(),
            capabilities.join(", "),
            unavailable.map_or(description, |reason| format!("({reason})")),
        ]);
    }
    Ok(session.screen.table(&table)?)
}

fn as_json(agent: &Listed) -> Value {
    let Manifest { name, description, capabilities, input_schema, output_schema, unavailable, .. } = &agent.manifest;
    json!({
        "name": name, "description": description, "station": agent.station, "status": agent.status, "capabilities": capabilities,
        "input_schema": input_schema, "output_schema": output_schema, "unavailable": unavailable, "paused_until": agent.paused_until,
        "load": {"waiting": agent.waiting, "running": agent.running},
    })
}
