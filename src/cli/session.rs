//! One command's settings, its screen, and the store as it finds it.

use std::path::PathBuf;
use std::sync::Arc;

use super::failure::{Exit, Failure};
use super::screen::Screen;
use crate::audit::Audit;
use crate::config::{self, Given, Loaded, Sources};
use crate::dispatcher::Dispatcher;
use crate::registry::{Identity, Registry};
use crate::runs::Runs;
use crate::station::{Link, Setting};
use crate::telemetry::{self, new_instance};
use crate::transport::Error;
use crate::transport::local::{self, Local};
use crate::works::Works;

/// The file by which a store is known to exist.
pub(super) const STORE_FILE: &str = "lattice.db";

pub(super) struct Session {
    pub(super) loaded: Loaded,
    pub(super) cwd: PathBuf,
    pub(super) screen: Screen,
}

/// The lattice as the store tells it; this process is no member.
pub(super) struct Reader {
    pub(super) dispatcher: Dispatcher,
    /// The folder of the lattice's data.
    pub(super) dir: PathBuf,
    _store: Local,
    _link: Option<Link>,
}

/// What a command does with the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Look,
    Change,
}

impl Session {
    /// Reads the settings and begins to log.
    pub(super) fn begin(file: Option<PathBuf>, flags: Vec<(String, Given, String)>, json: bool) -> Result<Self, Failure> {
        let here = |error| Failure::new(Exit::Failed, format!("the working directory cannot be used: {error}"));
        let sources = Sources::of_process(file, flags).map_err(here)?;
        let loaded = config::load(&sources)?;
        let filter = &loaded.config.log.filter;
        telemetry::init(filter)
            .map_err(|error| Failure::new(Exit::Configuration, format!("log.filter {filter:?} is no filter: {error}")))?;
        for warning in &loaded.warnings {
            tracing::warn!("{warning}");
        }
        Ok(Self { loaded, cwd: sources.cwd, screen: Screen::new(json) })
    }

    /// The settings as a station takes them.
    pub(super) fn setting(&self) -> Setting {
        let config = Arc::new(self.loaded.config.clone());
        Setting {
            config,
            file: self.loaded.file.clone(),
            cwd: self.cwd.clone(),
            bound: None,
            orchestrates_only: false,
            runs_only: false,
            handed_on: self.loaded.handed_on(),
            by_name: self.loaded.shares_by_name(false),
        }
    }

    /// Opens the store, if there is one, and reads in what happened since the last look.
    pub(super) async fn open(&self, access: Use) -> Result<Option<Reader>, Failure> {
        let setting = self.setting();
        let dir = setting.lattice_dir()?;
        let has_server = setting.config.lattice.nats.url.is_some();
        if !dir.join(STORE_FILE).exists() && !has_server {
            return Ok(None);
        }
        let config = setting.config.clone();
        let store = match access {
            Use::Look if dir.join(STORE_FILE).exists() => local::open_read_only(&dir)?,
            Use::Look | Use::Change => local::open(&dir, &config.lattice.storage)?,
        };
        let me = Identity { station: config.station(), instance: new_instance(), by_name: false };
        let (link, transport) = match Link::new(&setting, store.transport(), &me, false) {
            Some((link, transport)) => {
                link.begin().await;
                (Some(link), transport)
            }
            None => (None, store.transport()),
        };
        if let Some((since, reason)) = transport.away() {
            tracing::warn!("{reason} (since {since}): what follows is what this machine knows");
        }
        let works = Works::new(transport.log.clone());
        let runs = Runs::open(&dir, transport.log.clone())?;
        let audit = Audit::new(transport.log.clone(), config.lattice.id.clone());
        let registry = Registry::new(transport.table.clone(), audit, me, config.lattice.presence.clone());
        match registry.load().await {
            Err(Error::Unreachable(_) | Error::Unanswered(_)) => {}
            other => other?,
        }
        runs.catch_up().await?;
        let dispatcher = Dispatcher::new(transport, works, registry, runs, config);
        Ok(Some(Reader { dispatcher, dir, _store: store, _link: link }))
    }

    /// Opens the store to find something that cannot be there without one.
    pub(super) async fn open_for(&self, access: Use, what: &str) -> Result<Reader, Failure> {
        let missing = || Failure::new(Exit::NotFound, format!("no {what} is known: {}", self.no_store()));
        self.open(access).await?.ok_or_else(missing)
    }

    /// What to say where there is no store.
    pub(super) fn no_store(&self) -> String {
        let dir = self.setting().lattice_dir().map(|dir| dir.display().to_string()).unwrap_or_default();
        format!("nothing is kept in {dir} yet; it begins with the first station (lattice-mcp --stdio, --http ADDR or leaf)")
    }
}
