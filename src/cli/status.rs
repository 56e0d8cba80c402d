//! `status`: this lattice at a glance.

use serde_json::{Value, json};

use super::failure::Failure;
use super::session::{Session, Use};
use super::table::Table;

/// How many dead letters are counted.
const DEAD_MAX: u32 = 10_000;

pub(super) async fn run(session: &mut Session) -> Result<(), Failure> {
    let reader = session.open(Use::Look).await?;
    let setting = session.setting();
    let dir = setting.lattice_dir()?.display().to_string();
    let mut facts: Vec<(&str, Value)> = vec![
        ("lattice", json!(setting.config.lattice.id)),
        ("station", json!(setting.config.station())),
        ("data_dir", json!(dir)),
        ("config_file", json!(setting.file)),
    ];
    if let Some(reader) = &reader {
        let snapshot = reader.dispatcher.registry().snapshot();
        let (outstanding, _) = reader.dispatcher.runs().open_works(None, 0).await?;
        facts.extend([
            ("stations_online", json!(snapshot.stations.len())),
            ("agents", json!(snapshot.agents.len())),
            ("agents_online", json!(snapshot.agents.values().filter(|agent| agent.online).count())),
            ("works_outstanding", json!(outstanding)),
            ("works_dead", json!(reader.dispatcher.runs().recent(None, DEAD_MAX, true).await?.len())),
        ]);
    }
    if session.screen.json {
        return Ok(session.screen.json(&facts.into_iter().collect())?);
    }
    let mut table = Table::pairs();
    for (name, value) in facts.into_iter().filter(|(_, value)| !value.is_null()) {
        let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        table.pair(&name.replace('_', " "), shown);
    }
    session.screen.table(&table)?;
    if reader.is_none() {
        let text = session.no_store();
        session.screen.line(&text)?;
    }
    Ok(())
}
