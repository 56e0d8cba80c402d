//! A real nats-server that the bench starts itself, and what it says of its own traffic.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/.tools/nats/bin/nats-server");
/// Said instead of a table where the server is missing.
pub(crate) const MISSING: &str = "skipped: run ./tests/nats/setup.sh";
const CONFIG: &str = "nats.conf";
const START: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(20);

/// When an acknowledgement of the server is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sync {
    /// Once the system has the bytes.
    Process,
    /// Once the disk has them.
    Power,
}

/// A server with JetStream; its process and its folder are gone with this value.
pub(crate) struct NatsServer {
    child: Child,
    port: u16,
    monitor: u16,
    dir: tempfile::TempDir,
}

/// What went through the server so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub(crate) in_msgs: u64,
    pub(crate) out_msgs: u64,
    pub(crate) in_bytes: u64,
    pub(crate) out_bytes: u64,
}

impl std::ops::Sub for Traffic {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            in_msgs: self.in_msgs - earlier.in_msgs,
            out_msgs: self.out_msgs - earlier.out_msgs,
            in_bytes: self.in_bytes - earlier.in_bytes,
            out_bytes: self.out_bytes - earlier.out_bytes,
        }
    }
}

impl NatsServer {
    /// Starts one; none where the program is missing.
    pub(crate) async fn start(sync: Sync) -> anyhow::Result<Option<Self>> {
        if !Path::new(PROGRAM).exists() {
            return Ok(None);
        }
        let dir = tempfile::tempdir()?;
        let (port, monitor) = (free_port()?, free_port()?);
        let always = if sync == Sync::Power { ", sync_interval: always" } else { "" };
        let store = dir.path().join("store");
        let text = format!("listen: \"127.0.0.1:{port}\"\nhttp: \"127.0.0.1:{monitor}\"\njetstream {{ store_dir: {store:?}{always} }}\n");
        std::fs::write(dir.path().join(CONFIG), text)?;
        let server = Self { child: spawn(dir.path())?, port, monitor, dir };
        server.listens().await?;
        Ok(Some(server))
    }

    /// Kills it, starts it anew on the same port and folder, and waits until it listens.
    pub(crate) async fn kill_and_start(&mut self) -> anyhow::Result<()> {
        self.child.kill().await?;
        self.child = spawn(self.dir.path())?;
        self.listens().await
    }

    async fn listens(&self) -> anyhow::Result<()> {
        let listens = async {
            while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() || self.page("varz").await.is_err() {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(START, listens).await.context("the nats-server does not listen")
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    /// What went through it so far.
    pub(crate) async fn traffic(&self) -> anyhow::Result<Traffic> {
        let page = self.page("varz").await?;
        let count = |name: &str| page[name].as_u64().unwrap_or_default();
        Ok(Traffic { in_msgs: count("in_msgs"), out_msgs: count("out_msgs"), in_bytes: count("in_bytes"), out_bytes: count("out_bytes") })
    }

    async fn page(&self, name: &str) -> anyhow::Result<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.monitor)).await?;
        stream.write_all(format!("GET /{name} HTTP/1.0\r\n\r\n").as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let Some((_, body)) = text.split_once("\r\n\r\n") else { bail!("no page: {text}") };
        Ok(serde_json::from_str(body)?)
    }
}

fn spawn(dir: &Path) -> anyhow::Result<Child> {
    let log = std::fs::File::options().create(true).append(true).open(dir.join("server.log"))?;
    let mut command = Command::new(PROGRAM);
    command.arg("-c").arg(dir.join(CONFIG)).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
    command.spawn().with_context(|| format!("cannot start {PROGRAM}"))
}

fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
