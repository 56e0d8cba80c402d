//! `config`: every setting in force, and where its value came from.

use serde_json::{Value, json};

use super::failure::Failure;
use super::session::Session;
use super::table::Table;

pub(super) fn run(session: &mut Session) -> Result<(), Failure> {
    let rows = session.loaded.table();
    if session.screen.json {
        let setting = |(key, value, origin): &(String, String, crate::config::Origin)| json!({"key": key, "value": value, "origin": origin.to_string()});
        return Ok(session.screen.json(&json!({
            "file": session.loaded.file,
            "settings": rows.iter().map(setting).collect::<Value>(),
            "warnings": session.loaded.warnings,
        }))?);
    }
    let mut table = Table::new(["KEY", "VALUE", "ORIGIN"]).cut("VALUE");
    for (key, value, origin) in rows {
        table.row([key, value, origin.to_string()]);
    }
    session.screen.table(&table)?;
    let file = match &session.loaded.file {
        Some(file) => format!("file: {}", file.display()),
        None => "no file was read; lattice-mcp init writes one with every key".to_owned(),
    };
    Ok(session.screen.line(&file)?)
}
