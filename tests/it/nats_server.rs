//! A real nats-server of one test: started on a free port of this machine, killed and started again, gone at the end.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The program that `./tests/run` installs.
pub(crate) const NATS_SERVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/.tools/nats/bin/nats-server");
const START: Duration = Duration::from_secs(30);

/// A server with JetStream; its process ends and its folder is gone with this value.
pub(crate) struct NatsServer {
    child: Child,
    port: u16,
    config: PathBuf,
    dir: TempDir,
}

impl NatsServer {
    /// One that lets everybody in.
    pub(crate) fn start() -> Self {
        Self::with("")
    }

    /// One with more settings, in the server's own language. `DIR` in them is the server's folder.
    pub(crate) fn with(settings: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let config = dir.path().join("nats.conf");
        let settings = settings.replace("DIR", &dir.path().display().to_string());
        let jetstream = format!("jetstream {{ store_dir: {:?} }}", dir.path().join("store"));
        std::fs::write(&config, format!("listen: \"127.0.0.1:{port}\"\n{jetstream}\n{settings}\n")).unwrap();
        Self::run(dir, config, port)
    }

    /// One whose whole configuration is given; it must listen on this port.
    pub(crate) fn with_config(dir: TempDir, config: &str, port: u16) -> Self {
        let path = dir.path().join("nats.conf");
        std::fs::write(&path, config).unwrap();
        Self::run(dir, path, port)
    }

    fn run(dir: TempDir, config: PathBuf, port: u16) -> Self {
        let child = spawn(&config, dir.path());
        let mut server = Self { child, port, config, dir };
        server.wait_until_it_listens();
        server
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// Kills it without a word; its folder stays.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again on the same port and folder, after `kill`.
    pub(crate) fn revive(&mut self) {
        self.child = spawn(&self.config, self.dir.path());
        self.wait_until_it_listens();
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("server.log")).unwrap_or_default()
    }

    fn wait_until_it_listens(&mut self) {
        let deadline = Instant::now() + START;
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(self.child.try_wait().unwrap().is_none(), "the nats-server ended:\n{}", self.log());
            assert!(Instant::now() < deadline, "the nats-server does not listen:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A port that nobody listens on. It lies below those that outgoing connections get, so that it stays free while its server is
/// down, and no two tests of a process get the same.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let start = u16::try_from(std::process::id() % 199).unwrap() * 100;
        let port = 10_000 + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn spawn(config: &Path, dir: &Path) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(dir.join("server.log")).unwrap();
    let mut command = Command::new(NATS_SERVER);
    command.arg("-c").arg(config).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command.spawn().unwrap_or_else(|error| panic!("no nats-server at {NATS_SERVER} ({error}): run ./tests/run, which installs it"))
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
