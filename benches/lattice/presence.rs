//! What signs of life cost, how long a registry takes to load, and how soon a change is seen, in a lattice of many stations.
//!
//! The stations are simulated by one process of its own with a connection and a registry for each; the observer is a process of
//! its own too, so that its time and memory are its own.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use lattice_mcp::agents::Catalog;
use lattice_mcp::audit::Audit;
use lattice_mcp::config;
use lattice_mcp::model::agent::{Definition, Limits, Manifest, Prompt, RunnerSpec};
use lattice_mcp::model::time::Span;
use lattice_mcp::registry::{Identity, Registry};
use lattice_mcp::telemetry::{new_instance, now};
use lattice_mcp::transport::Wire;
use lattice_mcp::transport::nats::connect::connect;
use lattice_mcp::transport::nats::{Nats, Options};
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::load::{median, memory};
use crate::server::{MISSING, NatsServer, Sync};
use crate::table::{Table, micros};

/// The argument that turns this program into many stations.
pub(crate) const MEMBERS: &str = "--nats-members";
/// The argument that turns it into an observer.
pub(crate) const OBSERVER: &str = "--nats-observer";

const LATTICE: &str = "bench";
const AGENTS_EACH: usize = 10;
/// The agent whose description changes.
const PROBE: &str = "agent-0-0";
const PATIENCE: Duration = Duration::from_secs(120);
/// How many stations join at once.
const JOINING: usize = 32;
/// How long the lattice is watched while everybody beats at the usual pace.
const LIVE: Duration = Duration::from_secs(10);

/// Measures and prints.
pub(crate) async fn run(quick: bool) -> anyhow::Result<()> {
    let sizes: &[usize] = if quick { &[10, 100] } else { &[10, 100, 1_000] };
    let head = [
        "stations",
        "one beat",
        "its CPU",
        "server CPU",
        "msgs in",
        "bytes in",
        "msgs out",
        "bytes out",
        "out for each watcher",
        "watcher's CPU",
        "memory each",
        "server, each",
    ];
    let mut beats = Table::new("A heartbeat: what one costs whoever beats, the server, and a watching process", &head);
    let head = ["stations", "agents", "load", "memory", "change -> seen", "worst", "while all beat each 10 s", "worst", "CPU used"];
    let mut loads = Table::new("The registry of a new process", &head);
    for &stations in sizes {
        let Some(server) = NatsServer::start(Sync::Process).await? else {
            beats.row(&[MISSING]);
            loads.row(&[MISSING]);
            break;
        };
        measure(&server, stations, quick, &mut beats, &mut loads).await?;
    }
    beats.print();
    loads.print();
    Ok(())
}

async fn measure(server: &NatsServer, stations: usize, quick: bool, beats: &mut Table, loads: &mut Table) -> anyhow::Result<()> {
    let count = if quick { 200 } else { 1_000 };
    let before = memory(server.pid()).unwrap_or_default();
    let mut members = Part::start(&[MEMBERS, &server.url(), &stations.to_string()]).await?;
    let (empty, full) = (members.number("empty").await?, members.number("joined").await?);
    let each = |kib: u64| format!("{:.0} KiB", kib as f64 / stations as f64);
    let (member_memory, server_memory) =
        (each(full.saturating_sub(empty)), each(memory(server.pid()).unwrap_or_default().saturating_sub(before)));

    // Nobody watches.
    let (said, own, its) = (server.traffic().await?, cpu(members.pid()), cpu(server.pid()));
    members.tell(&format!("beat {count}")).await?;
    let beat = members.number("beaten").await?;
    let (alone, own, its) = (server.traffic().await? - said, cpu(members.pid()) - own, cpu(server.pid()) - its);

    // One watches.
    let mut observer = Part::start(&[OBSERVER, &server.url()]).await?;
    let load = observer.number("loaded").await?;
    observer.number("watching").await?;
    settle(observer.pid()).await;
    let held = observer.memory();
    let (said, seen) = (server.traffic().await?, cpu(observer.pid()));
    members.tell(&format!("beat {count}")).await?;
    members.number("beaten").await?;
    settle(observer.pid()).await;
    let (watched, seen) = (server.traffic().await? - said, cpu(observer.pid()) - seen);

    let of_each = |count_of: u64| format!("{:.1}", count_of as f64 / count as f64);
    let time = |spent: Duration| micros(spent / count);
    beats.row(&[
        &stations.to_string(),
        &micros(Duration::from_micros(beat)),
        &time(own),
        &time(its),
        &of_each(alone.in_msgs),
        &of_each(alone.in_bytes),
        &of_each(alone.out_msgs),
        &of_each(alone.out_bytes),
        &format!("{} ({} bytes)", of_each(watched.out_msgs - alone.out_msgs), of_each(watched.out_bytes - alone.out_bytes)),
        &time(seen),
        &member_memory,
        &server_memory,
    ]);

    let rounds = if quick { 10 } else { 30 };
    let quiet = discovery(&mut members, &mut observer, 0, rounds).await?;
    members.tell("live").await?;
    let (began, seen) = (Instant::now(), cpu(observer.pid()));
    tokio::time::sleep(LIVE).await;
    let live = discovery(&mut members, &mut observer, rounds, rounds).await?;
    let busy = (cpu(observer.pid()) - seen).as_secs_f64() / began.elapsed().as_secs_f64();
    let worst = |samples: &[Duration]| micros(samples.iter().max().copied().unwrap_or_default());
    loads.row(&[
        &stations.to_string(),
        &(stations * AGENTS_EACH).to_string(),
        &micros(Duration::from_micros(load)),
        &held,
        &micros(median(quiet.clone())),
        &worst(&quiet),
        &micros(median(live.clone())),
        &worst(&live),
        &format!("{:.1} %", 100.0 * busy),
    ]);
    Ok(())
}

/// How long it takes from each of so many changes until the observer has it.
async fn discovery(members: &mut Part, observer: &mut Part, from: usize, rounds: usize) -> anyhow::Result<Vec<Duration>> {
    let mut samples = Vec::with_capacity(rounds);
    for n in from..from + rounds {
        members.tell(&format!("change {n}")).await?;
        let changed = members.number(&format!("changed-{n}")).await?;
        let seen = observer.number(&format!("seen-{n}")).await?;
        samples.push(Duration::from_micros(seen.saturating_sub(changed)));
    }
    Ok(samples)
}

/// Waits until a process has nothing more to do.
async fn settle(pid: u32) {
    let mut quiet = 0;
    while quiet < 3 {
        let before = cpu(pid);
        tokio::time::sleep(Duration::from_millis(100)).await;
        quiet = if cpu(pid) - before <= Duration::from_millis(10) { quiet + 1 } else { 0 };
    }
}

/// How long a process has computed so far.
fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let ticks: u64 = stat
        .rsplit(") ")
        .next()
        .into_iter()
        .flat_map(|rest| rest.split(' ').skip(11).take(2))
        .filter_map(|ticks| ticks.parse::<u64>().ok())
        .sum();
    Duration::from_millis(ticks * 10)
}

/// Another process of this program.
struct Part {
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Part {
    async fn start(arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let stdin = child.stdin.take().context("no standard input")?;
        let lines = BufReader::new(child.stdout.take().context("no standard output")?).lines();
        Ok(Self { child, stdin, lines })
    }

    fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    fn memory(&self) -> String {
        memory(self.pid()).map_or_else(|| "unknown here".to_owned(), |kib| format!("{:.1} MiB", kib as f64 / 1024.0))
    }

    async fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        Ok(self.stdin.write_all(format!("{line}\n").as_bytes()).await?)
    }

    /// The number that it says under a name.
    async fn number(&mut self, name: &str) -> anyhow::Result<u64> {
        let said = async {
            while let Some(line) = self.lines.next_line().await? {
                if let Some((said, number)) = line.split_once(' ')
                    && said == name
                {
                    return Ok(number.parse()?);
                }
            }
            bail!("the process left without a word of {name}")
        };
        tokio::time::timeout(PATIENCE, said).await.with_context(|| format!("no word of {name}"))?
    }
}

fn say(name: &str, number: u128) {
    println!("{name} {number}");
}

fn clock() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros()
}

fn own_memory() -> u128 {
    memory(std::process::id()).unwrap_or_default().into()
}

/// A registry on a connection of its own.
struct Member {
    registry: Registry,
    catalog: Arc<Catalog>,
    _nats: Nats,
}

impl Member {
    async fn open(url: &str, n: usize, agents: usize) -> anyhow::Result<Self> {
        let settings = config::Nats { url: Some(url.to_owned()), ..config::Nats::default() };
        let (lattice, station) =
            (LATTICE.parse::<lattice_mcp::model::id::LatticeId>()?, format!("station-{n}").parse::<lattice_mcp::model::id::StationId>()?);
        let inbox = Wire::new(lattice.clone()).inbox(&station);
        let connected = connect(&settings, "bench", &inbox).await?;
        let options = Options {
            lattice: lattice.clone(),
            station: station.clone(),
            settings,
            blob_max_age: Duration::from_secs(86_400),
            clock: Arc::new(now),
            interruptions: connected.interruptions,
            denials: connected.denials,
            tasks: TaskTracker::new(),
        };
        let nats = Nats::open(connected.client, options).await?;
        let transport = nats.transport();
        let me = Identity { station, instance: new_instance(), by_name: false };
        // Nobody expires while the others still join.
        let presence = config::Presence { ttl: Span::secs(3_600), ..config::Presence::default() };
        let registry = Registry::new(transport.table, Audit::new(transport.log, lattice), me, presence);
        if agents > 0 {
            // As stations that only run agents are.
            registry.narrow();
        }
        let definitions =
            (0..agents).map(|agent| definition(&format!("agent-{n}-{agent}"), "finds known weaknesses in what a repository depends on"));
        let definitions = definitions.map(|definition| Ok((definition.manifest.name.clone(), Arc::new(definition))));
        let catalog = Arc::new(Catalog { definitions: definitions.collect::<anyhow::Result<_>>()?, problems: Vec::new() });
        Ok(Self { registry, catalog, _nats: nats })
    }

    /// Says that it lives, as a station does every few seconds.
    async fn beat(&self) -> anyhow::Result<()> {
        Ok(self.registry.offer(Arc::clone(&self.catalog)).await?)
    }
}

/// As large as agents are.
fn definition(name: &str, description: &str) -> Definition {
    let schema = json!({
        "type": "object", "required": ["path"],
        "properties": { "path": { "type": "string", "description": "where the repository is" }, "depth": { "type": "integer" } },
    });
    let manifest = Manifest {
        name: name.parse().expect("a name"),
        description: description.to_owned(),
        capabilities: vec!["security".into(), "dependencies".into()],
        input_schema: Some(schema),
        output_schema: None,
        examples: vec!["scan ./services/api".into()],
        limits: Limits::default(),
        retry: Default::default(),
        unavailable: None,
    };
    Definition { manifest, prompt: Prompt::Plain(String::new()), runner: RunnerSpec::Echo, source: None }
}

/// Simulates stations until its input ends.
pub(crate) async fn members(url: &str, count: usize) -> anyhow::Result<()> {
    // The first one makes the streams.
    let first = Member::open(url, 0, AGENTS_EACH).await?;
    first.beat().await?;
    say("empty", own_memory());
    let others = stream::iter(1..count).map(|n| async move {
        let member = Member::open(url, n, AGENTS_EACH).await?;
        member.beat().await?;
        anyhow::Ok(member)
    });
    let mut members = vec![first];
    members.extend(others.buffer_unordered(JOINING).try_collect::<Vec<_>>().await?);
    say("joined", own_memory());
    let members: Arc<[Member]> = members.into();
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        match line.split_once(' ') {
            Some(("beat", beats)) => {
                let mut samples = Vec::new();
                for n in 0..beats.parse()? {
                    let began = Instant::now();
                    members[n % members.len()].beat().await?;
                    samples.push(began.elapsed());
                }
                say("beaten", median(samples).as_micros());
            }
            Some(("change", n)) => {
                let mut catalog = (*members[0].catalog).clone();
                let changed = definition(PROBE, &format!("probe {n}"));
                catalog.definitions.insert(changed.manifest.name.clone(), Arc::new(changed));
                say(&format!("changed-{n}"), clock());
                members[0].registry.offer(Arc::new(catalog)).await?;
            }
            _ => {
                let members = Arc::clone(&members);
                #[expect(clippy::disallowed_methods, reason = "a bench has no tracker")]
                tokio::spawn(async move {
                    let pace = config::Presence::default().heartbeat.get() / u32::try_from(members.len()).unwrap_or(1);
                    let mut tick = tokio::time::interval(pace);
                    for member in members.iter().cycle() {
                        tick.tick().await;
                        // The one whose agent changes beats with each change.
                        if member.registry.me().station != members[0].registry.me().station {
                            member.beat().await.expect("a heartbeat");
                        }
                    }
                });
            }
        }
    }
    Ok(())
}

/// Loads the registry, and says when it sees a change, until its input ends.
pub(crate) async fn observer(url: &str) -> anyhow::Result<()> {
    let observer = Member::open(url, 1_000_000, 0).await?;
    let began = Instant::now();
    observer.registry.load().await?;
    say("loaded", began.elapsed().as_micros());
    let mut changes = observer.registry.changes();
    let registry = observer.registry.clone();
    #[expect(clippy::disallowed_methods, reason = "a bench has no tracker")]
    tokio::spawn(async move { registry.observe(CancellationToken::new()).await });
    #[expect(clippy::disallowed_methods, reason = "a bench has no tracker")]
    let reported = tokio::spawn(async move {
        say("watching", 1);
        let (probe, mut known) = (PROBE.parse().expect("a name"), String::new());
        while changes.changed().await.is_ok() {
            let snapshot = observer.registry.snapshot();
            let Some(agent) = snapshot.agents.get(&probe) else { continue };
            if agent.manifest.description != known {
                known.clone_from(&agent.manifest.description);
                if let Some(n) = known.strip_prefix("probe ") {
                    say(&format!("seen-{n}"), clock());
                }
            }
        }
    });
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while lines.next_line().await?.is_some() {}
    reported.abort();
    Ok(())
}
