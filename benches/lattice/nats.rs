//! Assign -> settled over a NATS server, of an agent that does nothing, beside the raw chain on the same server, and beside the
//! messages of its own wire with no lattice behind them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use lattice_mcp::config::Config;
use lattice_mcp::dispatcher::Caller;
use lattice_mcp::station::{Setting, Station};

use crate::compare::{crowd, row};
use crate::inprocess::one;
use crate::load::{Measured, together};
use crate::raw::Raw;
use crate::server::{MISSING, NatsServer, Sync};
use crate::table::Table;
use crate::wire::Alone;

const ECHO: &str = "---\nname: echo\ndescription: answers with its task\nrunner: { kind: echo }\nlimits: { max_parallel: 1024 }\n---\n";
const PATIENCE: Duration = Duration::from_secs(30);
/// The two take turns, so that whatever else this machine does hits both.
const TURNS: usize = 4;

/// Measures and prints.
pub(crate) async fn run(quick: bool) -> anyhow::Result<()> {
    let head = ["", "raw", "p99", "works/s", "lattice", "p99", "works/s", "times raw", "of its works/s"];
    for (sync, title) in [(Sync::Process, "the server as it comes"), (Sync::Power, "with sync_interval: always")] {
        let mut table = Table::new(&format!("assign -> settled over NATS, of an agent that does nothing; {title}"), &head);
        match NatsServer::start(sync).await? {
            Some(server) => measure(&server, &mut table, quick).await?,
            None => table.row(&[MISSING]),
        }
        table.print();
    }
    Ok(())
}

async fn measure(server: &NatsServer, table: &mut Table, quick: bool) -> anyhow::Result<()> {
    let raw = Raw::open(&server.url()).await?;
    let alone = Alone::open(&server.url()).await?;
    let pair = Pair::open(&server.url()).await?;
    for (at_once, count) in [(1, 2_000), (64, 32_000), (1_024, 65_536)] {
        let share = if quick { count / 4 } else { count } / TURNS;
        raw.load(share / 4, at_once.min(share / 4)).await?;
        alone.load(share / 4, at_once.min(share / 4)).await?;
        pair.load(share / 4, at_once.min(share / 4)).await?;
        let (mut reference, mut wire, mut measured) = (Measured::default(), Measured::default(), Measured::default());
        for _ in 0..TURNS {
            reference.add(raw.load(share, at_once).await?);
            wire.add(alone.load(share, at_once).await?);
            measured.add(pair.load(share, at_once).await?);
        }
        row(table, &crowd(at_once), &reference, &measured);
        row(table, "  its messages alone", &reference, &wire);
    }
    pair.close().await;
    Ok(())
}

/// A station that assigns and one that runs, each with a folder and a connection of its own.
struct Pair {
    orchestrator: Station,
    leaf: Station,
    caller: Caller,
    _data: tempfile::TempDir,
}

impl Pair {
    async fn open(url: &str) -> anyhow::Result<Self> {
        let data = tempfile::tempdir()?;
        std::fs::create_dir(data.path().join("agents"))?;
        std::fs::write(data.path().join("agents/echo.md"), ECHO)?;
        let leaf = station(url, data.path(), "leaf", false)?;
        leaf.wake().await?;
        let orchestrator = station(url, data.path(), "orchestrator", true)?;
        orchestrator.wake().await?;
        let registry = orchestrator.dispatcher().registry().clone();
        let mut changes = registry.changes();
        let seen = async { while registry.snapshot().agents.is_empty() && changes.changed().await.is_ok() {} };
        tokio::time::timeout(PATIENCE, seen).await.context("the agent does not show up")?;
        Ok(Self { orchestrator, leaf, caller: Caller::connection(), _data: data })
    }

    async fn load(&self, count: usize, at_once: usize) -> anyhow::Result<Measured> {
        let (dispatcher, caller) = (self.orchestrator.dispatcher().clone(), self.caller.clone());
        together(count, at_once, move || {
            let (dispatcher, caller) = (dispatcher.clone(), caller.clone());
            async move {
                one(&dispatcher, &caller).await;
                Ok(())
            }
        })
        .await
    }

    async fn close(self) {
        self.orchestrator.close().await;
        self.leaf.close().await;
    }
}

fn station(url: &str, dir: &Path, name: &str, orchestrates_only: bool) -> anyhow::Result<Station> {
    let mut config = Config::default();
    config.lattice.station = Some(name.parse()?);
    config.lattice.data_dir = Some(dir.join(name));
    config.lattice.nats.url = Some(url.to_owned());
    config.lattice.work.max_parallel = 1024;
    config.lattice.work.queue_size = 100_000;
    config.agents.dirs = vec![dir.join("agents")];
    let setting = Setting {
        config: Arc::new(config),
        file: None,
        cwd: dir.to_owned(),
        bound: None,
        orchestrates_only,
        runs_only: !orchestrates_only,
        handed_on: Vec::new(),
        by_name: false,
    };
    Ok(Station::open(setting)?)
}
