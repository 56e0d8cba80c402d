//! How commands fail, and with which exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::transport::nats::embedded;
use crate::{config, dispatcher, init, install, runs, station, transport};

/// What an exit code means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    Done = 0,
    Failed = 1,
    Usage = 2,
    NotFound = 3,
    Configuration = 4,
    Store = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command failed.
#[derive(Debug)]
pub(super) struct Failure {
    exit: Exit,
    reason: anyhow::Error,
}

impl Failure {
    pub(super) fn new(exit: Exit, reason: impl std::fmt::Display) -> Self {
        Self { exit, reason: anyhow::anyhow!("{reason}") }
    }

    fn of(exit: Exit, reason: impl Into<anyhow::Error>) -> Self {
        Self { exit, reason: reason.into() }
    }

    pub(super) fn exit(&self) -> Exit {
        self.exit
    }

    /// What went wrong, in one line.
    pub(super) fn reason(&self) -> String {
        format!("{:#}", self.reason)
    }

    /// Says what went wrong on standard error; nothing when nothing did.
    pub(super) fn tell(&self) {
        if self.exit != Exit::Done {
            let _ = writeln!(io::stderr(), "lattice-mcp: {}", self.reason());
        }
    }
}

impl From<io::Error> for Failure {
    /// Standard output is the only thing that commands write to: when its reader has had enough, all is done.
    fn from(error: io::Error) -> Self {
        let exit = if error.kind() == io::ErrorKind::BrokenPipe { Exit::Done } else { Exit::Failed };
        Self::of(exit, error)
    }
}

impl From<config::Error> for Failure {
    fn from(error: config::Error) -> Self {
        Self::of(Exit::Configuration, error)
    }
}

impl From<init::Error> for Failure {
    fn from(error: init::Error) -> Self {
        Self::of(Exit::Failed, error)
    }
}

impl From<install::Error> for Failure {
    fn from(error: install::Error) -> Self {
        let exit = match error {
            install::Error::Broken { .. } => Exit::Configuration,
            _ => Exit::Failed,
        };
        Self::of(exit, error)
    }
}

impl From<embedded::Error> for Failure {
    fn from(error: embedded::Error) -> Self {
        Self::of(Exit::Failed, error)
    }
}

impl From<transport::Error> for Failure {
    fn from(error: transport::Error) -> Self {
        let exit = match error {
            transport::Error::NoBlob(_) => Exit::NotFound,
            _ => Exit::Store,
        };
        Self::of(exit, error)
    }
}

impl From<runs::Error> for Failure {
    fn from(error: runs::Error) -> Self {
        Self::of(Exit::Store, error)
    }
}

impl From<station::Error> for Failure {
    fn from(error: station::Error) -> Self {
        let exit = match error {
            station::Error::Store(_) | station::Error::Runs(_) => Exit::Store,
            station::Error::NoDataDir | station::Error::Binding { .. } => Exit::Configuration,
            _ => Exit::Failed,
        };
        Self::of(exit, error)
    }
}

impl From<dispatcher::Error> for Failure {
    fn from(error: dispatcher::Error) -> Self {
        use dispatcher::Error as E;
        match error {
            E::Transport(error) => error.into(),
            E::Runs(error) => error.into(),
            E::UnknownAgent { ref known, .. } => {
                const NAMED_MAX: usize = 10;
                let names: Vec<&str> = known.iter().take(NAMED_MAX).map(|name| name.as_str()).collect();
                let there =
                    if names.is_empty() { "there are none; --agents DIR names a folder of agent files".into() } else { names.join(", ") };
                Self::new(Exit::NotFound, format!("{error}; the closest names: {there}"))
            }
            E::UnknownRun(_) | E::UnknownWork(_) => Self::of(Exit::NotFound, error),
            other => Self::of(Exit::Failed, other),
        }
    }
}
