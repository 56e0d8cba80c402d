//! `--stdio`, `--http ADDR` or both: a station with MCP doors.

use super::failure::{Exit, Failure};
use super::session::Session;
use crate::config::Given;
use crate::station::{self, Doors};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Serve MCP on standard input and output
    #[arg(long)]
    stdio: bool,
    /// Serve MCP over HTTP; a bare port like :8765 binds loopback
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
}

impl Args {
    pub(super) fn any(&self) -> bool {
        self.stdio || self.http.is_some()
    }

    pub(super) fn settings(&self) -> Option<(String, Given, String)> {
        self.http.clone().map(|address| ("http.listen".to_owned(), Given::One(address), "--http".to_owned()))
    }
}

pub(super) async fn run(session: &Session, args: &Args) -> Result<(), Failure> {
    // A process that a client starts on its standard input opens no port unless its command line says so.
    let http = args.http.is_some() || (!args.stdio && session.loaded.config.http.listen.is_some());
    if !args.stdio && !http {
        let next = "name a door (--stdio, --http ADDR) or a command; lattice-mcp --help lists them";
        return Err(Failure::new(Exit::Usage, format!("there is nothing to do: {next}")));
    }
    let mut setting = session.setting();
    setting.bound = station::bound_by(|name| std::env::var(name).ok())?;
    Ok(station::serve(setting, Doors { stdio: args.stdio, http }).await?)
}
