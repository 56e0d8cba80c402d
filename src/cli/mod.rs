//! The command line: one file per command.
//!
//! Standard output belongs to what was asked for, in tables or JSON; everything else goes to standard error.
//!
//! | exit code | meaning |
//! | --- | --- |
//! | 0 | done; also when whoever reads standard output has had enough |
//! | 1 | failed |
//! | 2 | the command line is wrong |
//! | 3 | there is no such work, run, agent, result or log |
//! | 4 | the configuration is wrong, ours or a client's |
//! | 5 | the store refuses |

mod agents;
mod assign;
mod config;
mod doctor;
mod events;
mod failure;
mod files;
mod init;
mod install;
mod leaf;
mod runs;
mod screen;
mod serve;
mod session;
mod show;
mod station;
mod stations;
mod status;
mod table;
mod work;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use self::failure::{Exit, Failure};
use self::session::Session;
use crate::config::Given;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  the command line is wrong
  3  there is no such work, run, agent, result or log
  4  the configuration is wrong, ours or a client's
  5  the store refuses";

/// Turns any MCP client into the orchestrator of a mesh of agents.
#[derive(Debug, Parser)]
#[command(name = "lattice-mcp", version, after_help = EXIT_CODES, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    doors: serve::Args,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Hand work to an agent, wait for it and print its result
    Assign(assign::Args),
    /// Run this station's agents, without MCP
    Leaf,
    /// Show this lattice at a glance
    Status,
    /// List the stations of the lattice
    Stations,
    /// Let other machines' stations join this lattice's own server
    Station(station::Args),
    /// List the agents of the lattice, and those of this folder
    Agents,
    /// List the most recent runs, or show the tree of one
    Runs(runs::Args),
    /// List the works that are not settled, or show, cancel or answer one
    Work(work::Args),
    /// Show what happened to stations, agents and works
    Events(events::Args),
    /// Look whether all that this lattice needs is there and in order
    Doctor,
    /// Show every setting in force, and where its value came from
    Config,
    /// Write a commented lattice.yaml and an agent that works at once
    Init(init::Args),
    /// Register this program in an MCP client, or list the clients
    Install(install::Args),
    /// Take this program out of an MCP client again
    Uninstall(install::Removal),
}

/// Flags of every command; they beat the environment, which beats the file.
#[derive(Debug, Args)]
#[command(next_help_heading = "Common options")]
struct Common {
    /// A folder of agent files (repeatable) [default: ./agents, ./.claude/agents and the user's]
    #[arg(long = "agents", value_name = "DIR", global = true)]
    agents: Vec<String>,
    /// Where everything is kept [default: the user's data folder]
    #[arg(long, value_name = "DIR", global = true)]
    data_dir: Option<String>,
    /// The lattice's name [default: default]
    #[arg(long, value_name = "ID", global = true)]
    lattice: Option<String>,
    /// This station's name [default: the host's]
    #[arg(long, value_name = "NAME", global = true)]
    station: Option<String>,
    /// The NATS server that other machines share: nats://HOST:4222, or `embedded` to start one [default: none]
    #[arg(long, value_name = "URL|embedded", global = true)]
    nats: Option<String>,
    /// The configuration file [default: ./lattice.yaml, else the user's]
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// A file with the token that HTTP clients must send
    #[arg(long, value_name = "FILE", global = true)]
    token_file: Option<String>,
    /// An origin whose browser pages may call over HTTP (repeatable)
    #[arg(long, value_name = "ORIGIN", global = true)]
    allow_origin: Vec<String>,
    /// What is logged to standard error, such as info or lattice_mcp=debug [default: warn,rmcp=error,async_nats=off]
    #[arg(long, value_name = "FILTER", global = true)]
    log: Option<String>,
    /// Answer in JSON
    #[arg(long, global = true)]
    json: bool,
}

impl Common {
    /// The flags as a layer of settings.
    fn settings(&self) -> Vec<(String, Given, String)> {
        let one =
            |key: &str, value: &Option<String>, flag: &str| value.clone().map(|value| (key.to_owned(), Given::One(value), flag.to_owned()));
        let many = |key: &str, values: &[String], flag: &str| {
            (!values.is_empty()).then(|| (key.to_owned(), Given::Many(values.to_vec()), flag.to_owned()))
        };
        let flags = [
            many("agents.dirs", &self.agents, "--agents"),
            one("lattice.data_dir", &self.data_dir, "--data-dir"),
            one("lattice.id", &self.lattice, "--lattice"),
            one("lattice.station", &self.station, "--station"),
            one("lattice.nats.url", &self.nats, "--nats"),
            one("http.token_file", &self.token_file, "--token-file"),
            many("http.allowed_origins", &self.allow_origin, "--allow-origin"),
            // `work ID --log` has this name as well, and no filter.
            one("log.filter", &self.log.clone().filter(|filter| !filter.is_empty()), "--log"),
        ];
        flags.into_iter().flatten().collect()
    }
}

/// Runs a command line to its end; gives the process's exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and versions are no errors, and a reader who has left is none either.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage } else { Exit::Done }.into();
        }
    };
    match run(cli) {
        Ok(()) => Exit::Done.into(),
        Err(failure) => {
            failure.tell();
            failure.exit().into()
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    if cli.command.is_some() && cli.doors.any() {
        return Err(Failure::new(Exit::Usage, "--stdio and --http stand alone, without a command"));
    }
    let carried = install::Carried::of(&cli.common);
    let mut flags = cli.common.settings();
    flags.extend(cli.doors.settings());
    let mut session = Session::begin(cli.common.config, flags, cli.common.json)?;
    let serves = matches!(cli.command, None | Some(Command::Leaf | Command::Assign(_)));
    if serves {
        files::raise();
    }
    let mut runtime = if serves { tokio::runtime::Builder::new_multi_thread() } else { tokio::runtime::Builder::new_current_thread() };
    let runtime =
        runtime.enable_all().build().map_err(|error| Failure::new(Exit::Failed, format!("no threads could be started: {error}")))?;
    let ended = runtime.block_on(async {
        match cli.command {
            None => serve::run(&session, &cli.doors).await,
            Some(Command::Assign(args)) => assign::run(&mut session, args).await,
            Some(Command::Leaf) => leaf::run(&session).await,
            Some(Command::Status) => status::run(&mut session).await,
            Some(Command::Stations) => stations::run(&mut session).await,
            Some(Command::Station(args)) => station::run(&mut session, args).await,
            Some(Command::Agents) => agents::run(&mut session).await,
            Some(Command::Runs(args)) => runs::run(&mut session, args).await,
            Some(Command::Work(args)) => work::run(&mut session, args).await,
            Some(Command::Events(args)) => events::run(&mut session, args).await,
            Some(Command::Doctor) => doctor::run(&mut session).await,
            Some(Command::Config) => config::run(&mut session),
            Some(Command::Init(args)) => init::run(&mut session, args),
            Some(Command::Install(args)) => install::run(&mut session, args, carried?),
            Some(Command::Uninstall(args)) => install::undo(&mut session, args),
        }
    });
    // A read of standard input that nobody waits for any more must not keep the process.
    runtime.shutdown_background();
    // What was printed stays printed, also when the command failed in the end.
    let flushed = session.screen.flush();
    ended?;
    Ok(flushed?)
}

/// The answer of a listing command where there is no store yet.
fn session_is_empty(session: &mut Session) -> Result<(), Failure> {
    let text = session.no_store();
    let screen = &mut session.screen;
    let written = if screen.json { screen.json(&serde_json::Value::Array(Vec::new())) } else { screen.line(&text) };
    Ok(written?)
}
