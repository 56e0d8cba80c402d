//! The composition root: builds the parts of one process, runs them, drains them.
//!
//! A station is opened quietly and wakes at its first real request, so that a client that only probes the protocol
//! leaves no trace in the lattice.

mod clock;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use serde_json::json;
use tokio::sync::{OnceCell, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agents::{Catalog, Pace, Watcher};
use crate::audit::Audit;
use crate::config::{self, Config};
use crate::dispatcher::{Bound, Caller, Dispatcher};
use crate::http;
use crate::leaf::Leaf;
use crate::mcp;
use crate::model::audit::Kind as Fact;
use crate::model::id::{StationId, WorkId};
use crate::model::owner::{Owner, Principal, Workspace};
use crate::registry::{Identity, Registry};
use crate::runner::{self, MeshAccess, Runners};
use crate::runs::{self, Runs};
use crate::telemetry::{new_instance, now};
use crate::transport::local::{self, Local};
use crate::transport::nats::embedded;
use crate::transport::{self, Reach, Transport, mesh, nats};
use crate::works::{self, Works};

/// How long the parts that only tidy up may take at the end.
const TIDY_MAX: Duration = Duration::from_secs(3);

/// How often a process that starts no server looks whether one has come.
const EMBEDDED_PAUSE: Duration = Duration::from_millis(500);
/// How long the end of the connection, and of a server of ours, may take.
const SERVER_STOP_MAX: Duration = Duration::from_secs(8);
/// How long whoever wakes waits for the lattice's server.
const REACH_WAIT: Duration = Duration::from_secs(2);

/// How long after it woke a station looks for programs that dead processes left behind.
const SWEEP_AFTER: Duration = Duration::from_secs(1);

/// Why a station does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no place for the data.
    #[error("no folder for the data is known: name one with --data-dir or LATTICE_DATA_DIR")]
    NoDataDir,
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] transport::Error),
    /// The run store refuses.
    #[error(transparent)]
    Runs(#[from] runs::Error),
    /// The HTTP door cannot be opened.
    #[error(transparent)]
    Http(#[from] http::Error),
    /// The process's surroundings are not usable.
    #[error("{what}: {source}")]
    Surroundings {
        /// What was looked for.
        what: &'static str,
        /// Why it was not found.
        source: std::io::Error,
    },
    /// Standard input or output broke.
    #[error("the connection on standard input and output broke: {0}")]
    Stdio(String),
    /// A variable that binds this process to a run is malformed.
    #[error("{name} is {value:?}: {reason}")]
    Binding {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// What a process does besides keeping the lattice.
#[derive(Debug, Clone, Default)]
pub struct Doors {
    /// MCP on standard input and output.
    pub stdio: bool,
    /// MCP over HTTP at the configured address.
    pub http: bool,
}

/// The settings of a process, and where it runs.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The settings.
    pub config: Arc<Config>,
    /// The file they came from.
    pub file: Option<PathBuf>,
    /// The working directory.
    pub cwd: PathBuf,
    /// The run that this process is bound to: it is the orchestrator of an agent that runs, and runs none itself.
    pub bound: Option<Bound>,
    /// It runs no agents, whatever its folders hold.
    pub orchestrates_only: bool,
    /// Nobody assigns anything through it.
    pub runs_only: bool,
    /// Variables with settings that the file does not have, for those of its agents that use the lattice themselves.
    pub handed_on: Vec<(String, String)>,
    /// It shares its agents' works by their names, and not by the folders they are read from.
    pub by_name: bool,
}

impl Setting {
    /// The folder of this lattice's data.
    ///
    /// # Errors
    /// `NoDataDir`.
    pub fn lattice_dir(&self) -> Result<PathBuf, Error> {
        let data = self.config.data_dir().ok_or(Error::NoDataDir)?;
        Ok(std::path::absolute(&data).unwrap_or(data).join(self.config.lattice.id.as_str()))
    }
}

impl Setting {
    /// Whoever started this process: the agent of the run that it is bound to, or the user.
    pub fn caller(&self) -> Caller {
        match &self.bound {
            Some(bound) => Caller::bound(bound.clone()),
            None => Caller::connection().owned_by(Some(self.owner(Principal::User))),
        }
    }

    /// Whose the works are that a principal assigns through this process.
    pub fn owner(&self, principal: Principal) -> Owner {
        let station = self.config.station();
        let folder = config::workspace_of(&self.cwd);
        let workspace = match &self.config.mcp.workspace {
            Some(name) => Workspace::Named(name),
            None => Workspace::Folder(&station, folder),
        };
        Owner::of(principal, &workspace)
    }
}

/// The run that the environment binds a process to.
///
/// # Errors
/// `Binding` when the variables are there and malformed.
pub fn bound_by(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Bound>, Error> {
    fn read<T: std::str::FromStr<Err: std::fmt::Display>>(name: &'static str, value: Option<String>) -> Result<T, Error> {
        let value = value.unwrap_or_default();
        value.parse().map_err(|error: T::Err| Error::Binding { name, reason: error.to_string(), value })
    }
    let Some(work) = variable("LATTICE_BOUND_WORK") else { return Ok(None) };
    Ok(Some(Bound {
        work_id: read("LATTICE_BOUND_WORK", Some(work))?,
        run_id: read("LATTICE_BOUND_RUN", variable("LATTICE_BOUND_RUN"))?,
        attempt: read("LATTICE_BOUND_ATTEMPT", variable("LATTICE_BOUND_ATTEMPT"))?,
    }))
}

/// One process of a station; cheap to clone.
#[derive(Clone)]
pub struct Station(Arc<Inner>);

struct Inner {
    setting: Setting,
    store: Arc<Local>,
    /// How this folder said at first that this machine's clock is corrected; nothing in a lattice of one machine.
    clock: Option<clock::Known>,
    link: Option<Link>,
    dispatcher: Dispatcher,
    registry: Registry,
    runs: Runs,
    /// Absent in a process that only orchestrates.
    leaf: Option<(Leaf, Runners)>,
    woken: OnceCell<()>,
    tasks: TaskTracker,
    /// Cancelled first: take no more work.
    taking: CancellationToken,
    /// Cancelled when running work gets no more grace.
    hurry: CancellationToken,
    /// Cancelled when all work has ended.
    living: CancellationToken,
}

/// What leads to the lattice's other machines.
pub(crate) struct Link {
    tasks: TaskTracker,
    cancel: CancellationToken,
    begun: OnceCell<()>,
    member: nats::Member,
    way: Way,
    far: watch::Sender<Option<Transport>>,
    reach: watch::Sender<Reach>,
}

/// How the server is found.
enum Way {
    /// It is somebody else's.
    Given(Box<config::Nats>),
    /// It is ours.
    Embedded {
        plan: Box<embedded::Plan>,
        /// A process that stays for a moment only starts none.
        joins: bool,
    },
}

impl Link {
    /// The way to the others, not begun yet, and the transport that uses it; none in a lattice of one machine.
    pub(crate) fn new(setting: &Setting, local: Transport, me: &Identity, forwards: bool) -> Option<(Self, Transport)> {
        let lattice = &setting.config.lattice;
        lattice.nats.url.as_ref()?;
        let reason = "the NATS server has not been reached yet".into();
        let (far, opened) = watch::channel(None);
        let (reach, reached) = watch::channel(Reach::Away { since: now(), reason });
        let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
        let member =
            nats::Member { lattice: lattice.id.clone(), station: me.station.clone(), blob_max_age: lattice.storage.blob_max_age.get() };
        let place = mesh::Place { station: me.station.clone(), instance: me.instance, forwards, goes_on: works::goes_on };
        let transport = mesh::compose(local, opened, reached, place, tasks.clone(), cancel.clone());
        let way = if lattice.nats.is_embedded() {
            let plan = embedded::Plan::new(&setting.config, &setting.lattice_dir().ok()?);
            Way::Embedded { plan: Box::new(plan), joins: forwards && setting.bound.is_none() }
        } else {
            Way::Given(Box::new(lattice.nats.clone()))
        };
        Some((Self { tasks, cancel, begun: OnceCell::new(), member, way, far, reach }, transport))
    }

    /// Begins to connect, and waits a moment for that: what is asked first should not find the lattice empty.
    pub(crate) async fn begin(&self) {
        self.begun.get_or_init(|| self.connect()).await;
    }

    async fn connect(&self) {
        let mut reached = self.reach.subscribe();
        reached.mark_unchanged();
        let settings = self.settings();
        let seeking = nats::seek(self.member.clone(), settings, self.far.clone(), self.reach.clone(), self.tasks.clone());
        let cancel = self.cancel.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = seeking => {}
            }
        });
        // What it comes to is said by whoever finds that it did not.
        let _ = tokio::time::timeout(REACH_WAIT, reached.changed()).await;
    }

    /// How to connect, as soon as that is known.
    fn settings(&self) -> watch::Receiver<Option<config::Nats>> {
        let (known, settings) = watch::channel(None);
        match &self.way {
            Way::Given(given) => _ = known.send_replace(Some((**given).clone())),
            Way::Embedded { plan, joins: true } => {
                let (plan, cancel, reach) = ((**plan).clone(), self.cancel.clone(), self.reach.clone());
                let (trouble, mut troubles) = watch::channel(None);
                self.tasks.spawn_blocking(move || match embedded::Member::join(plan, known, trouble.clone()) {
                    Ok(member) => member.run(&cancel),
                    Err(error) => {
                        tracing::error!(%error, "the lattice's own server cannot be run");
                        trouble.send_replace(Some(error.to_string().into()));
                    }
                });
                let cancel = self.cancel.clone();
                self.tasks.spawn(async move {
                    loop {
                        tokio::select! {
                            () = cancel.cancelled() => return,
                            changed = troubles.changed() => if changed.is_err() { return },
                        }
                        if let Some(reason) = troubles.borrow_and_update().clone() {
                            // What works needs no explanation.
                            reach.send_if_modified(|reach| match reach {
                                Reach::Away { reason: known, .. } if *known != reason => {
                                    *known = reason;
                                    true
                                }
                                _ => false,
                            });
                        }
                    }
                });
            }
            Way::Embedded { plan, joins: false } => {
                let (plan, cancel, reach) = (plan.clone(), self.cancel.clone(), self.reach.clone());
                self.tasks.spawn(async move {
                    loop {
                        let asked = plan.clone();
                        if let Ok(Some(running)) = tokio::task::spawn_blocking(move || asked.running()).await {
                            known.send_replace(Some(running));
                            return;
                        }
                        let reason = "this lattice's own nats-server does not run; it begins with the first station (lattice-mcp leaf, --stdio or --http)";
                        reach.send_replace(Reach::Away { since: now(), reason: reason.into() });
                        tokio::select! {
                            () = cancel.cancelled() => return,
                            () = tokio::time::sleep(EMBEDDED_PAUSE) => {}
                        }
                    }
                });
            }
        }
        settings
    }

    pub(crate) async fn close(&self) {
        self.cancel.cancel();
        self.tasks.close();
        if tokio::time::timeout(SERVER_STOP_MAX, self.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.tasks.len(), "the connection to the lattice did not end in time");
        }
    }
}

impl Station {
    /// Opens the store and puts the parts together; takes no work and tells nobody.
    ///
    /// # Errors
    /// What the store says, with the file and the next step.
    pub fn open(setting: Setting) -> Result<Self, Error> {
        let config = setting.config.clone();
        let dir = setting.lattice_dir()?;
        let opening = runs::Opening::begin(&dir);
        // Without a server this machine's own clock is the lattice's.
        let clock = config.lattice.nats.url.is_some().then(|| clock::adopt(&dir));
        let options = local::Options { clock: Arc::new(now), jumps: true, ..local::Options::default() };
        let store = Arc::new(local::open_with(&dir, &config.lattice.storage, options)?);
        let me = Identity { station: config.station(), instance: new_instance(), by_name: setting.by_name };
        let (link, transport) = match Link::new(&setting, store.transport(), &me, true) {
            Some((link, transport)) => (Some(link), transport),
            None => (None, store.transport()),
        };
        let works = Works::new(transport.log.clone());
        let runs = opening.finish(transport.log.clone())?;
        let audit = Audit::new(transport.log.clone(), config.lattice.id.clone());
        let registry = Registry::new(transport.table.clone(), audit, me.clone(), config.lattice.presence.clone());
        registry.heed(transport.reach.clone());
        if setting.runs_only && link.is_some() {
            registry.narrow();
        }
        let dispatcher = Dispatcher::new(transport.clone(), works.clone(), registry.clone(), runs.clone(), config.clone());
        let tasks = TaskTracker::new();
        let leaf = match setting.bound.is_some() || setting.orchestrates_only {
            true => None,
            false => {
                let runners = Runners::new(runner::Context {
                    blobs: transport.blobs.clone(),
                    runner: config.runner.clone(),
                    results: config.results.clone(),
                    kill_after: config.lattice.work.kill_after.get(),
                    progress_per_second: config.lattice.work.progress_per_second,
                    data_dir: dir.clone(),
                    instance: me.instance,
                    mesh: mesh_access(&setting, &me.station)?,
                });
                let orders = dispatcher.orders().clone();
                let (registry, runners_too, runs, tasks) = (registry.clone(), runners.clone(), runs.clone(), tasks.clone());
                Some((Leaf::new(transport, works, orders, registry, runners_too, runs, config, tasks), runners))
            }
        };
        let (taking, living) = (CancellationToken::new(), CancellationToken::new());
        Ok(Self(Arc::new(Inner {
            setting,
            store,
            clock,
            link,
            dispatcher,
            registry,
            runs,
            leaf,
            woken: OnceCell::new(),
            tasks,
            taking,
            living,
            hurry: CancellationToken::new(),
        })))
    }

    /// The verbs.
    pub fn dispatcher(&self) -> &Dispatcher {
        &self.0.dispatcher
    }

    /// Runs nothing but these works: for a process that stays no longer than they do.
    pub fn keep_to(&self, works: Vec<WorkId>) {
        if let Some((leaf, _)) = &self.0.leaf {
            leaf.keep_to(works);
        }
    }

    /// Announces the station, claims its agents' names and begins to take work; once, however often it is asked.
    ///
    /// # Errors
    /// The store's; the next call tries again.
    pub async fn wake(&self) -> Result<(), Error> {
        self.0.woken.get_or_try_init(|| self.begin()).await.copied()
    }

    async fn begin(&self) -> Result<(), Error> {
        let inner = &self.0;
        let (registry, runs, living) = (inner.registry.clone(), inner.runs.clone(), inner.living.clone());
        if let Some(link) = &inner.link {
            link.begin().await;
        }
        tolerate(registry.load().await)?;
        if let Some(known) = inner.clock.clone() {
            let (dir, sharing) = (inner.setting.lattice_dir()?, living.clone());
            inner.tasks.spawn(async move { clock::share(&dir, known, sharing).await });
        }
        let max_age = inner.setting.config.lattice.storage.runs_max_age.get();
        let seldom = inner.setting.runs_only && inner.link.is_some();
        inner.tasks.spawn(async move { runs.keep(max_age, seldom, living).await });
        // A process that an agent started ends with it; its station sees to what it leaves.
        if inner.setting.bound.is_none() {
            let (orders, living) = (inner.dispatcher.orders().clone(), inner.living.clone());
            inner.tasks.spawn(async move { orders.keep(seldom, living).await });
        }
        let living = inner.living.clone();
        let Some((leaf, runners)) = inner.leaf.clone() else {
            inner.tasks.spawn(async move { registry.observe(living).await });
            return Ok(());
        };
        let (logs, age, forever) = (runners.clone(), inner.setting.config.lattice.storage.max_age.get(), living.clone());
        inner.tasks.spawn(async move { logs.keep_logs(age, forever).await });
        let leaving = living.clone();
        inner.tasks.spawn(async move {
            // The first answers come first. A work that is taken up again looks for its own leftovers anyway.
            tokio::select! {
                () = leaving.cancelled() => return,
                () = tokio::time::sleep(SWEEP_AFTER) => {}
            }
            if let Err(failure) = runners.sweep_orphans().await {
                tracing::warn!(reason = failure.message, "could not look for programs that an earlier process left behind");
            }
        });
        let catalog = self.follow_agents().await;
        let current = catalog.borrow().clone();
        tolerate(registry.offer(current).await)?;
        let announced = inner.living.clone();
        inner.tasks.spawn(async move { registry.run(catalog, announced).await });
        let (attending, taking) = (leaf.clone(), inner.taking.clone());
        inner.tasks.spawn(async move { attending.attend(living).await });
        inner.tasks.spawn(async move { leaf.run(taking).await });
        Ok(())
    }

    /// The agents of this station's folders, followed from now on.
    async fn follow_agents(&self) -> watch::Receiver<Arc<Catalog>> {
        let setting = &self.0.setting;
        let dirs = setting.config.agent_dirs(&setting.cwd);
        let settings = setting.config.agents.clone();
        let read = move || Watcher::new(&dirs, settings, std::env::var_os("PATH"), Pace::default());
        let (watcher, catalog) = match tokio::task::spawn_blocking(read).await {
            Ok(opened) => opened,
            Err(_) => return watch::channel(Arc::new(Catalog::default())).1,
        };
        for problem in &catalog.borrow().problems {
            tracing::warn!("{problem}");
        }
        let living = self.0.living.clone();
        self.0.tasks.spawn(async move { watcher.run(living).await });
        catalog
    }

    /// A server for one connection on standard input and output, or the model of those that HTTP makes.
    pub fn mcp(&self, caller: Caller) -> mcp::Server {
        let station = self.clone();
        let wake: mcp::Wake = Arc::new(move || {
            let station = station.clone();
            async move { station.wake().await.map_err(|error| error.to_string()) }.boxed()
        });
        mcp::Server::new(mcp::Parts {
            dispatcher: self.0.dispatcher.clone(),
            caller,
            wake,
            stop: self.0.living.clone(),
            tasks: self.0.tasks.clone(),
        })
    }

    /// Takes no more work, gives what runs its grace, hands back the rest, says goodbye, and closes the store.
    pub async fn close(&self) {
        let inner = &self.0;
        inner.taking.cancel();
        if let Some((leaf, _)) = &inner.leaf {
            leaf.drain(inner.setting.config.lattice.work.grace.get(), &inner.hurry).await;
        }
        inner.living.cancel();
        inner.tasks.close();
        if tokio::time::timeout(TIDY_MAX, inner.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = inner.tasks.len(), "not everything ended in time");
        }
        if let Some(link) = &inner.link {
            link.close().await;
        }
        let store = inner.store.clone();
        let _ = tokio::task::spawn_blocking(move || store.close()).await;
    }

    /// Leaves running work no more grace.
    pub fn hurry(&self) {
        self.0.hurry.cancel();
    }

    /// Kills every program that runs for this process, at once.
    pub fn kill(&self) {
        if let Some((_, runners)) = &self.0.leaf {
            runners.kill_all();
        }
    }

    fn health(&self) -> serde_json::Value {
        let snapshot = self.0.registry.snapshot();
        json!({
            "status": "ok",
            "version": env!("CARGO_PKG_VERSION"),
            "lattice": self.0.setting.config.lattice.id,
            "station": self.0.registry.me().station,
            "agents": snapshot.agents.len(),
            "stations": snapshot.stations.len(),
            "running": self.0.leaf.as_ref().map_or(0, |(leaf, _)| leaf.running()),
        })
    }
}

/// A server that is away keeps nobody from working here: what could not be done is done when it is back.
fn tolerate(done: transport::Result<()>) -> Result<(), Error> {
    match done {
        Err(transport::Error::Unreachable(reason) | transport::Error::Unanswered(reason)) => {
            tracing::info!("{reason}; this station's own agents work all the same");
            Ok(())
        }
        other => Ok(other?),
    }
}

/// How an agent reaches this lattice: this very program, on the same data.
fn mesh_access(setting: &Setting, station: &StationId) -> Result<MeshAccess, Error> {
    let program = std::env::current_exe().map_err(|source| Error::Surroundings { what: "this program's own path", source })?;
    let data = setting.config.data_dir().ok_or(Error::NoDataDir)?;
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string();
    let mut args = vec!["--stdio".to_owned(), "--data-dir".to_owned(), absolute(&data)];
    args.extend(["--lattice".to_owned(), setting.config.lattice.id.to_string(), "--station".to_owned(), station.to_string()]);
    if let Some(file) = &setting.file {
        args.extend(["--config".to_owned(), absolute(file)]);
    }
    Ok(MeshAccess { program, args, env: setting.handed_on.clone() })
}

/// Runs a station until its client leaves or a signal comes.
///
/// # Errors
/// Whatever keeps it from starting, or breaks its connection.
pub async fn serve(setting: Setting, doors: Doors) -> Result<(), Error> {
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    let http = match &setting.config.http.listen {
        Some(listen) if doors.http => Some(http::bind(&setting.config.http, listen.parse()?).await?),
        _ => None,
    };
    let station = Station::open(setting)?;
    tasks.spawn(heed_signals(station.clone(), stop.clone()));
    let ended = async {
        match (doors.stdio, http) {
            (true, None) => talk(&station, &stop).await,
            (true, Some(bound)) => {
                station.wake().await?;
                let door = listen(&station, bound, stop.clone());
                let (talked, listened) = tokio::join!(talk(&station, &stop), door);
                talked.and(listened)
            }
            (false, Some(bound)) => {
                station.wake().await?;
                listen(&station, bound, stop.clone()).await
            }
            (false, None) => {
                station.wake().await?;
                stop.cancelled().await;
                Ok(())
            }
        }
    }
    .await;
    stop.cancel();
    station.close().await;
    ended
}

async fn talk(station: &Station, stop: &CancellationToken) -> Result<(), Error> {
    let caller = station.0.setting.caller();
    let server = station.mcp(caller);
    let line_max = station.0.setting.config.mcp.line_max;
    tokio::select! {
        () = stop.cancelled() => Ok(()),
        ended = mcp::serve_stdio(server, line_max) => {
            stop.cancel();
            ended.map_err(|error| Error::Stdio(error.to_string()))
        }
    }
}

async fn listen(station: &Station, bound: http::Bound, stop: CancellationToken) -> Result<(), Error> {
    let health = station.clone();
    let server = station.mcp(Caller::stateless().owned_by(Some(station.0.setting.owner(Principal::Http))));
    let parts = http::Parts {
        make: Arc::new(move |kind| match kind {
            http::Kind::Session => server.for_connection(),
            http::Kind::Request => server.for_request(),
        }),
        table: station.0.dispatcher.transport().table.clone(),
        stop,
        tasks: station.0.tasks.clone(),
        health: Arc::new(move || health.health()),
        grace: station.0.setting.config.lattice.work.grace.get(),
        needs: mcp::needs,
        tell: {
            let registry = station.0.registry.clone();
            Arc::new(move |turned| registry.say(Fact::Turned(turned)))
        },
    };
    Ok(bound.serve(parts).await?)
}

/// Cancels `stop` at the first signal, and leaves at once at a second one. A client that has ended the input and then sends a signal
/// kills next: what runs is handed back before that.
pub async fn heed_signals(station: Station, stop: CancellationToken) {
    let Some(mut signals) = Signals::new() else { return };
    signals.next().await;
    if stop.is_cancelled() {
        station.hurry();
    }
    stop.cancel();
    signals.next().await;
    station.kill();
    std::process::exit(130);
}

#[cfg(unix)]
struct Signals([tokio::signal::unix::Signal; 2]);

#[cfg(unix)]
impl Signals {
    fn new() -> Option<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let both = signal(SignalKind::terminate()).and_then(|terminate| Ok([terminate, signal(SignalKind::interrupt())?]));
        both.map_err(|error| tracing::warn!(%error, "signals cannot be heard")).ok().map(Self)
    }

    async fn next(&mut self) {
        let [terminate, interrupt] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> Option<Self> {
        Some(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
