//! A place to run programs in: a data folder, an agent's folder, and blobs.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use lattice_mcp::config;
use lattice_mcp::model::agent::{Command, Definition, Limits, Manifest, Prompt, RunnerSpec};
use lattice_mcp::model::assignment::Assignment;
use lattice_mcp::model::event::Failure;
use lattice_mcp::model::id::{InstanceId, RunId, WorkId};
use lattice_mcp::model::output::{BlobRef, Media, Output};
use lattice_mcp::model::size::Size;
use lattice_mcp::model::time::Timestamp;
use lattice_mcp::runner::{Answer, Context, Ended, Line, MeshAccess, Order, Report, Runners};
use lattice_mcp::transport::{self, Blobs};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Far more than anything here takes.
pub(crate) const LONG: Duration = Duration::from_secs(120);

pub(crate) struct DirBlobs(PathBuf);

#[async_trait]
impl Blobs for DirBlobs {
    async fn put(&self, source: &mut (dyn AsyncRead + Unpin + Send), media: Media) -> transport::Result<BlobRef> {
        let (mut hash, mut size, mut chunk) = (Sha256::new(), 0, vec![0; 65536]);
        let new = self.0.join(Uuid::new_v4().to_string());
        let mut file = tokio::fs::File::create(&new).await.unwrap();
        loop {
            let read = source.read(&mut chunk).await.unwrap();
            if read == 0 {
                break;
            }
            hash.update(&chunk[..read]);
            size += read as u64;
            file.write_all(&chunk[..read]).await.unwrap();
        }
        file.flush().await.unwrap();
        let sha256: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::rename(new, self.0.join(&sha256)).unwrap();
        Ok(BlobRef { sha256, size, media })
    }

    async fn open(&self, sha256: &str, range: Range<u64>) -> transport::Result<Box<dyn AsyncRead + Unpin + Send>> {
        let open = tokio::fs::File::open(self.0.join(sha256)).await;
        let mut file = open.map_err(|_| transport::Error::NoBlob(sha256.to_owned()))?;
        file.seek(std::io::SeekFrom::Start(range.start)).await.unwrap();
        Ok(Box::new(file.take(range.end - range.start)))
    }

    async fn size(&self, sha256: &str) -> transport::Result<u64> {
        Ok(std::fs::metadata(self.0.join(sha256)).unwrap().len())
    }
}

/// What is given to `Runners::new`, to be changed before.
pub(crate) fn context(data_dir: &Path, blobs: Arc<DirBlobs>) -> Context {
    Context {
        blobs,
        runner: config::Runner::default(),
        results: config::Results::default(),
        kill_after: Duration::from_secs(60),
        progress_per_second: 20,
        data_dir: data_dir.to_owned(),
        instance: InstanceId::new(Uuid::new_v4()),
        mesh: MeshAccess { program: "/opt/lattice-mcp".into(), args: vec!["--stdio".into()], env: Vec::new() },
    }
}

pub(crate) struct Bench {
    pub(crate) dir: TempDir,
    pub(crate) blobs: Arc<DirBlobs>,
    pub(crate) runners: Runners,
    pub(crate) definition: Definition,
    pub(crate) assignment: Assignment,
    pub(crate) attempt: u32,
    pub(crate) exchanges: Vec<lattice_mcp::model::work::Exchange>,
    pub(crate) refuted: Option<Value>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    /// A bench whose `work.sh` is this script.
    pub(crate) fn script(body: &str) -> Self {
        let bench = Self::new();
        bench.write("work.sh", body);
        bench
    }

    pub(crate) fn with(change: impl FnOnce(&mut Context)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("blobs")).unwrap();
        std::fs::create_dir(dir.path().join("agents")).unwrap();
        let blobs = Arc::new(DirBlobs(dir.path().join("blobs")));
        let mut context = context(&dir.path().join("data"), blobs.clone());
        change(&mut context);
        let work_id = WorkId::new(Uuid::now_v7());
        let assignment = Assignment {
            work_id,
            orchestrator_run_id: RunId::root_of(Uuid::now_v7()).child(1),
            parent_work_id: None,
            originating_station: "here".parse().unwrap(),
            target_station: "here".parse().unwrap(),
            agent_name: "worker".parse().unwrap(),
            task: "do it".into(),
            context: Map::new(),
            input_ref: None,
            assigned_at: Timestamp::from_millis(1_700_000_000_000),
            timeout: lattice_mcp::model::time::Span::secs(300),
            queue_timeout: None,
            silence_timeout: None,
            redrives: None,
            priority: 3,
            trace_id: "0af7651916cd43dd8448eb211c80319c".into(),
            span_id: "b7ad6b7169203331".into(),
            owner: None,
            principal: None,
            accept: None,
            budgets: vec![],
            after: None,
            map: None,
        };
        let manifest = Manifest {
            name: "worker".parse().unwrap(),
            description: String::new(),
            capabilities: vec![],
            input_schema: None,
            output_schema: None,
            examples: vec![],
            limits: Limits::default(),
            retry: Default::default(),
            unavailable: None,
        };
        let definition = Definition {
            manifest,
            prompt: Prompt::Plain(String::new()),
            runner: RunnerSpec::Command(command(&["./work.sh"])),
            source: Some(dir.path().join("agents/worker.md")),
        };
        Self { dir, blobs, runners: Runners::new(context), definition, assignment, attempt: 1, exchanges: vec![], refuted: None }
    }

    pub(crate) fn agents(&self) -> PathBuf {
        self.dir.path().join("agents")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub(crate) fn write(&self, name: &str, body: &str) {
        let path = self.agents().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    pub(crate) fn command(&mut self, words: &[&str]) -> &mut Command {
        self.definition.runner = RunnerSpec::Command(command(words));
        let RunnerSpec::Command(command) = &mut self.definition.runner else { unreachable!() };
        command
    }

    pub(crate) fn order(&self) -> Order {
        Order {
            assignment: Arc::new(self.assignment.clone()),
            attempt: self.attempt,
            definition: Arc::new(self.definition.clone()),
            exchanges: self.exchanges.clone(),
            refuted: self.refuted.clone(),
        }
    }

    /// Runs to the end.
    pub(crate) async fn run(&self) -> (Ended, Vec<Report>) {
        let (ended, reports) = self.talk(|_, _, _| {}).await;
        (ended, reports)
    }

    /// Runs to the end; `hear` is told every report and may answer or stop.
    pub(crate) async fn talk(&self, mut hear: impl FnMut(&Report, &mpsc::Sender<Answer>, &CancellationToken)) -> (Ended, Vec<Report>) {
        let (reports, mut heard) = mpsc::channel(4);
        let (answer, answers) = mpsc::channel(4);
        let stop = CancellationToken::new();
        let runner = self.runners.runner_for(&self.definition.runner);
        let run = runner.run(self.order(), Line { reports, answers, stop: stop.clone() });
        let listen = async {
            let mut all = Vec::new();
            while let Some(report) = heard.recv().await {
                hear(&report, &answer, &stop);
                all.push(report);
            }
            all
        };
        let both = async { tokio::join!(run, listen) };
        tokio::time::timeout(LONG, both).await.expect("the run ends")
    }

    pub(crate) async fn output(&self) -> Value {
        match self.run().await.0 {
            Ended::Complete(Output::Inline(value)) => value,
            other => panic!("it ended as {other:?}"),
        }
    }

    pub(crate) async fn failure(&self) -> Failure {
        match self.run().await.0 {
            Ended::Failed(failure) => failure,
            other => panic!("it ended as {other:?}"),
        }
    }

    pub(crate) async fn blob(&self) -> (BlobRef, Vec<u8>) {
        match self.run().await.0 {
            Ended::Complete(Output::Blob(blob)) => {
                let bytes = std::fs::read(self.dir.path().join("blobs").join(&blob.sha256)).unwrap();
                (blob, bytes)
            }
            other => panic!("it ended as {other:?}"),
        }
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.data().join(format!("logs/{}.{}.log", self.assignment.work_id, self.attempt))
    }
}

pub(crate) fn command(words: &[&str]) -> Command {
    Command {
        command: words.iter().map(|word| (*word).to_owned()).collect(),
        interactive: false,
        cwd: None,
        env_pass: vec![],
        env: BTreeMap::new(),
    }
}

pub(crate) fn object(value: Value) -> Map<String, Value> {
    let Value::Object(object) = value else { panic!("{value} is no object") };
    object
}

/// Whether a process runs, zombies not counted.
pub(crate) fn is_alive(pid: &str) -> bool {
    assert!(pid.trim().parse::<u32>().is_ok(), "{pid:?} is a pid");
    std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).is_ok_and(|stat| !stat.contains(") Z "))
}

pub(crate) fn bytes(n: u64) -> Size {
    Size::bytes(n)
}
