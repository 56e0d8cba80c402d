//! `init`: a configuration and an agent to begin with.

use std::path::PathBuf;

use serde_json::json;

use super::failure::Failure;
use super::session::Session;
use crate::init;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where to; the working directory when absent
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(super) fn run(session: &mut Session, args: Args) -> Result<(), Failure> {
    let report = init::write(args.dir.as_deref().unwrap_or(std::path::Path::new(".")))?;
    if session.screen.json {
        return Ok(session.screen.json(&json!({"written": report.written, "kept": report.kept}))?);
    }
    for (verb, files) in [("wrote", &report.written), ("kept", &report.kept)] {
        for file in files {
            session.screen.line(&format!("{verb} {}", file.display()))?;
        }
    }
    Ok(())
}
