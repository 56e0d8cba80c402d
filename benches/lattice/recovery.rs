//! How long it takes after a kill -9 until the work goes on: of a leaf, of an orchestrator, of the server.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::compare::PROGRAM;
use crate::load::{Pipes, median};
use crate::server::{MISSING, NatsServer, Sync};
use crate::table::{Table, micros};

/// Its first attempt never ends by itself, the next one at once; each says which process runs it.
const STUCK: &str = r#"echo $PPID > "$1/$LATTICE_WORK_ID.$LATTICE_ATTEMPT"; [ "$LATTICE_ATTEMPT" -gt 1 ] || exec sleep 600; echo done"#;
const ECHO: &str = "---\nname: echo\ndescription: Answers with its task\nrunner: { kind: echo }\n---\n";
const PATIENCE: Duration = Duration::from_secs(60);
/// Over so long a time the kills of leaves are spread.
const SPREAD: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(5);

/// Measures and prints.
pub(crate) async fn run(quick: bool) -> anyhow::Result<()> {
    let mut table = Table::new("After a kill -9 over NATS, until the work goes on", &["killed", "until", "kills", "median", "worst"]);
    match Scene::open().await? {
        Some(scene) => measure(scene, if quick { 5 } else { 20 }, &mut table).await?,
        None => table.row(&[MISSING]),
    }
    table.print();
    Ok(())
}

async fn measure(mut scene: Scene, rounds: usize, table: &mut Table) -> anyhow::Result<()> {
    let mut samples = Vec::new();
    for n in 0..rounds {
        samples.push(scene.replica_killed(later(n, rounds)).await?);
    }
    row(table, "a leaf", "another replica has settled its work", samples);
    let mut samples = Vec::new();
    for n in 0..rounds {
        samples.push(scene.only_leaf_killed(later(n, rounds)).await?);
    }
    row(table, "the only leaf, started anew at once", "it has settled its work", samples);
    let mut samples = Vec::new();
    for _ in 0..rounds {
        samples.push(scene.orchestrator_killed().await?);
    }
    row(table, "an orchestrator", "a new one knows its work", samples);
    let (mut starts, mut samples) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (start, sample) = scene.server_killed().await?;
        starts.push(start);
        samples.push(sample);
    }
    row(table, "the nats-server", "it listens again, by itself", starts);
    row(table, "the nats-server", "a new order is settled", samples);
    Ok(())
}

/// A hold is extended again and again: a kill may come at any moment in between.
fn later(n: usize, rounds: usize) -> Duration {
    SPREAD.mul_f64(n as f64 / rounds as f64)
}

fn row(table: &mut Table, killed: &str, until: &str, samples: Vec<Duration>) {
    let (kills, worst) = (samples.len().to_string(), samples.iter().max().copied().unwrap_or_default());
    table.row(&[killed, until, &kills, &micros(median(samples)), &micros(worst)]);
}

/// A server, a station of two replicas, and an orchestrator.
struct Scene {
    dir: tempfile::TempDir,
    server: NatsServer,
    leaves: Vec<Child>,
    desk: Pipes,
    desks: usize,
}

impl Scene {
    async fn open() -> anyhow::Result<Option<Self>> {
        let Some(server) = NatsServer::start(Sync::Process).await? else { return Ok(None) };
        let dir = tempfile::tempdir()?;
        for folder in ["agents", "none", "ran"] {
            std::fs::create_dir(dir.path().join(folder))?;
        }
        let command = json!(["sh", "-c", STUCK, "stuck", dir.path().join("ran")]);
        let stuck =
            format!("---\nname: stuck\ndescription: Ends at its second attempt\nrunner: {{ kind: command, command: {command} }}\n---\n");
        std::fs::write(dir.path().join("agents/stuck.md"), stuck)?;
        std::fs::write(dir.path().join("agents/echo.md"), ECHO)?;
        let leaves = vec![leaf(dir.path(), &server, 0)?, leaf(dir.path(), &server, 1)?];
        let desk = desk(dir.path(), &server, 0).await?;
        let mut scene = Self { dir, server, leaves, desk, desks: 1 };
        let settled = scene.echo().await?;
        anyhow::ensure!(settled["status"] == "COMPLETE", "the agent does not answer: {settled}");
        Ok(Some(scene))
    }

    /// Assigns a work as soon as that is possible, and waits for its end.
    async fn echo(&mut self) -> anyhow::Result<Value> {
        let began = Instant::now();
        loop {
            match self.desk.call("assign_work", &json!({ "agent_name": "echo", "task": "go on" })).await {
                Ok(work) => return awaited(&mut self.desk, &work).await,
                Err(error) if began.elapsed() > PATIENCE => return Err(error.context("no order was taken in time")),
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// A work whose first attempt has begun, and the process that runs it.
    async fn begun(&mut self) -> anyhow::Result<(Value, u32)> {
        let work = self.desk.call("assign_work", &json!({ "agent_name": "stuck", "task": "begin" })).await?;
        let file = self.dir.path().join("ran").join(format!("{}.1", work["work_id"].as_str().context("no work_id")?));
        let ran = async {
            loop {
                if let Some(pid) = std::fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok()) {
                    return pid;
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        let pid = tokio::time::timeout(PATIENCE, ran).await.context("the work does not begin")?;
        Ok((work, pid))
    }

    async fn kill_leaf(&mut self, pid: u32) -> anyhow::Result<usize> {
        let at = self.leaves.iter().position(|leaf| leaf.id() == Some(pid)).context("no leaf runs it")?;
        self.leaves[at].kill().await?;
        Ok(at)
    }

    async fn replica_killed(&mut self, later: Duration) -> anyhow::Result<Duration> {
        let (work, pid) = self.begun().await?;
        tokio::time::sleep(later).await;
        let began = Instant::now();
        let at = self.kill_leaf(pid).await?;
        awaited(&mut self.desk, &work).await?;
        let took = began.elapsed();
        self.leaves[at] = leaf(self.dir.path(), &self.server, at)?;
        Ok(took)
    }

    async fn only_leaf_killed(&mut self, later: Duration) -> anyhow::Result<Duration> {
        while self.leaves.len() > 1
            && let Some(mut leaf) = self.leaves.pop()
        {
            leaf.kill().await?;
        }
        let (work, pid) = self.begun().await?;
        tokio::time::sleep(later).await;
        let began = Instant::now();
        let at = self.kill_leaf(pid).await?;
        self.leaves[at] = leaf(self.dir.path(), &self.server, at)?;
        awaited(&mut self.desk, &work).await?;
        Ok(began.elapsed())
    }

    async fn orchestrator_killed(&mut self) -> anyhow::Result<Duration> {
        let work = self.desk.call("assign_work", &json!({ "agent_name": "echo", "task": "outlive me" })).await?;
        let began = Instant::now();
        self.desk.kill().await?;
        self.desk = desk(self.dir.path(), &self.server, self.desks).await?;
        self.desks += 1;
        let settled = awaited(&mut self.desk, &work).await?;
        anyhow::ensure!(settled["status"] == "COMPLETE", "the work of the one that was killed: {settled}");
        Ok(began.elapsed())
    }

    /// How long the server itself needs, and how long it takes until an order is settled again.
    async fn server_killed(&mut self) -> anyhow::Result<(Duration, Duration)> {
        let began = Instant::now();
        self.server.kill_and_start().await?;
        let start = began.elapsed();
        self.echo().await?;
        Ok((start, began.elapsed()))
    }
}

/// Waits for the end of a work.
async fn awaited(desk: &mut Pipes, work: &Value) -> anyhow::Result<Value> {
    let began = Instant::now();
    loop {
        let looked = desk.call("await_work", &json!({ "work_id": work["work_id"], "timeout": "30s" })).await;
        match looked {
            Ok(now) if matches!(now["status"].as_str(), Some("COMPLETE" | "FAILED" | "CANCELLED")) => return Ok(now),
            Ok(now) => anyhow::ensure!(began.elapsed() < PATIENCE, "the work does not end: {now}"),
            Err(error) if began.elapsed() > PATIENCE => return Err(error),
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

fn words(dir: &Path, server: &NatsServer, station: &str, data: &str, agents: &str) -> Vec<String> {
    let text = |path: PathBuf| path.display().to_string();
    let (data, agents) = (text(dir.join(data)), text(dir.join(agents)));
    ["--nats", &server.url(), "--station", station, "--data-dir", &data, "--agents", &agents].map(str::to_owned).into()
}

fn leaf(dir: &Path, server: &NatsServer, n: usize) -> anyhow::Result<Child> {
    let mut command = Command::new(PROGRAM);
    command.arg("leaf").args(words(dir, server, "workers", &format!("leaf-{n}"), "agents"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    command.spawn().context("a leaf does not start")
}

async fn desk(dir: &Path, server: &NatsServer, n: usize) -> anyhow::Result<Pipes> {
    let mut argv = vec![PROGRAM.to_owned(), "--stdio".to_owned()];
    argv.extend(words(dir, server, "desk", &format!("desk-{n}"), "none"));
    Pipes::open(&argv).await
}
