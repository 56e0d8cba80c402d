//! Many clients at once, for minutes: each assigns, subscribes and waits, in one of both protocols; the memory of the server, and how
//! long calls take beside a bare server under the same load.
//!
//! Unlike the other benches this one fails: on any error, on a wrong result, and when memory goes on growing.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::json;
use tokio::task::JoinSet;

use crate::bare;
use crate::compare::{ECHO, bare, ours};
use crate::load::{Measured, Server, Speaks, Stream, Wire};
use crate::table::{Table, micros, per_second};

/// How long it takes until all clients are there.
const ARRIVAL: Duration = Duration::from_secs(20);
/// How long the bare server is measured.
const REFERENCE: Duration = Duration::from_secs(60);
/// The server has its caches filled by then; memory is looked at from here on.
const WARM_UP: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_secs(5);
/// How many percent memory may grow in a minute after that.
const GROWTH_MAX: f64 = 1.0;
const CALLS: [&str; 3] = ["assign_work", "subscribe", "await_work"];

/// How many clients, for how long, and how often each begins a round of assigning, subscribing and waiting.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) clients: usize,
    pub(crate) length: Duration,
    pub(crate) round: Duration,
}

/// What clients saw.
#[derive(Default)]
struct Seen {
    samples: [Vec<Duration>; 3],
    errors: Vec<String>,
    updates: u64,
}

/// Measures, prints and judges.
pub(crate) async fn run(load: Load) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::create_dir(dir.path().join("agents"))?;
    std::fs::write(dir.path().join("agents/echo.md"), ECHO)?;
    let Load { clients, round, .. } = load;
    println!("{clients} clients, half of each protocol, each with a round every {round:?}: assign, subscribe, wait");
    let plain = Server::start(&bare(bare::HTTP)?).await?;
    let reference = rounds(&plain, Load { length: REFERENCE.min(load.length), ..load }, None).await?;
    drop(plain);
    let (seen, memory) = lattice(dir.path(), load).await?;

    let head = ["calls under this load", "bare", "p99", "calls/s", "lattice", "p99", "calls/s"];
    let mut table = Table::new(&format!("{clients} clients on HTTP for {:?}", load.length), &head);
    for (at, name) in CALLS.iter().enumerate() {
        let of = |seen: &Seen, took: Duration| Measured::new(seen.samples[at].clone(), took);
        let (bare, ours) = (of(&reference, REFERENCE.min(load.length)), of(&seen, load.length));
        let figures =
            |measured: &Measured| [micros(measured.percentile(50)), micros(measured.percentile(99)), per_second(measured.per_second())];
        let cells = [vec![(*name).to_owned()], figures(&bare).to_vec(), figures(&ours).to_vec()].concat();
        table.row(&cells.iter().map(String::as_str).collect::<Vec<_>>());
    }
    table.print();
    judge(&reference, &seen, &memory, load)
}

async fn lattice(dir: &Path, load: Load) -> anyhow::Result<(Seen, Vec<(Duration, u64)>)> {
    let mut argv = ours(dir, "data", &["--http", "127.0.0.1:0"]);
    // All may assign in the same moment, and none is to be told that the hook is full.
    let settings = dir.join("lattice.yaml");
    std::fs::write(&settings, format!("lattice: {{ work: {{ queue_size: {} }} }}\n", 2 * load.clients))?;
    argv.extend(["--config".to_owned(), settings.display().to_string(), "--log".to_owned(), "error".to_owned()]);
    let server = Server::start(&argv).await?;
    let mut memory = Vec::new();
    let seen = rounds(&server, load, Some(&mut memory)).await?;
    Ok((seen, memory))
}

/// Lets clients do rounds, and looks at the server's memory all the while.
async fn rounds(server: &Server, load: Load, memory: Option<&mut Vec<(Duration, u64)>>) -> anyhow::Result<Seen> {
    let is_lattice = memory.is_some();
    let began = Instant::now();
    let end = began + load.length;
    let updates = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for n in 0..load.clients {
        let (at, updates) = (server.at().to_owned(), Arc::clone(&updates));
        // Each comes at its own time, so that their rounds are no wave.
        let offset = ARRIVAL.min(load.length / 4).mul_f64(n as f64 / load.clients as f64);
        clients.spawn(async move {
            let mut seen = Seen::default();
            tokio::time::sleep(offset).await;
            let speaks = if n % 2 == 0 { Speaks::Legacy } else { Speaks::Modern };
            if let Err(error) = client(&at, speaks, (load.round, end), is_lattice, &updates, &mut seen).await {
                seen.errors.push(format!("client {n} ({speaks:?}): {error:#}"));
            }
            seen
        });
    }
    if let Some(memory) = memory {
        watch(server, began, end, memory).await;
    }
    let mut all = Seen::default();
    while let Some(seen) = clients.join_next().await {
        let seen = seen?;
        all.samples.iter_mut().zip(seen.samples).for_each(|(all, more)| all.extend(more));
        all.errors.extend(seen.errors);
    }
    all.updates = updates.load(Ordering::Relaxed);
    Ok(all)
}

async fn watch(server: &Server, began: Instant, end: Instant, memory: &mut Vec<(Duration, u64)>) {
    println!("\n  minute  memory held");
    let mut minutes = 0;
    while Instant::now() < end {
        tokio::time::sleep(LOOK).await;
        let Some(held) = server.memory() else { return };
        memory.push((began.elapsed(), held));
        if began.elapsed().as_secs() / 60 > minutes {
            minutes = began.elapsed().as_secs() / 60;
            println!("  {minutes:>6}  {:.1} MiB", held as f64 / 1024.0);
        }
    }
}

/// One client, until its time is over; only whole rounds are counted.
async fn client(
    at: &str,
    speaks: Speaks,
    (round, end): (Duration, Instant),
    is_lattice: bool,
    updates: &Arc<AtomicU64>,
    seen: &mut Seen,
) -> anyhow::Result<()> {
    let mut wire = Wire::open(at, speaks).await.context("opening")?;
    // Older clients hear of everything on one stream of their session; newer ones open one for what they want to hear of.
    let hearing = match speaks {
        Speaks::Legacy => Some(Stream::of_session(&wire, updates).await.context("listening")?),
        Speaks::Modern => None,
    };
    let mut next = Instant::now();
    for n in 0.. {
        // Who is late does no rounds beyond the end to make up for it.
        if next.max(Instant::now()) >= end {
            break;
        }
        tokio::time::sleep_until(next.into()).await;
        next += round;
        let task = format!("round {n}");
        let assigned = timed(&mut seen.samples[0], wire.call("assign_work", &json!({ "agent_name": "echo", "task": task }))).await;
        let work = assigned.context("assign_work")?["work_id"].as_str().unwrap_or("0198f2c4-7d3e-7000-8000-1b2c3d4e5f60").to_owned();
        let uri = format!("work://{work}");
        let subscribed = async {
            match speaks {
                Speaks::Legacy => wire.request("resources/subscribe", &json!({ "uri": uri })).await.map(|_| None),
                Speaks::Modern => Stream::of_resource(at, &uri, updates).await.map(Some),
            }
        };
        let listening = timed(&mut seen.samples[1], subscribed).await.context("subscribing")?;
        let done = timed(&mut seen.samples[2], wire.call("await_work", &json!({ "work_id": work }))).await.context("await_work")?;
        if is_lattice {
            ensure!(done["status"] == "COMPLETE" && done["result"] == task, "not what was ordered: {done}");
        }
        if speaks == Speaks::Legacy {
            wire.request("resources/unsubscribe", &json!({ "uri": uri })).await.context("unsubscribing")?;
        }
        if let Some(listening) = &listening {
            listening.is_whole().context("listening to a work")?;
        }
    }
    hearing.map_or(Ok(()), |hearing| hearing.is_whole().context("listening"))
}

async fn timed<T>(samples: &mut Vec<Duration>, call: impl Future<Output = T>) -> T {
    let began = Instant::now();
    let done = call.await;
    samples.push(began.elapsed());
    done
}

fn judge(reference: &Seen, seen: &Seen, memory: &[(Duration, u64)], load: Load) -> anyhow::Result<()> {
    let Seen { samples, errors, updates } = seen;
    let slope = growth(memory.iter().filter(|(at, _)| *at >= WARM_UP));
    println!(
        "\n  {} rounds, {updates} updates heard, {} errors, {} in front of the bare server",
        samples[2].len(),
        errors.len(),
        reference.errors.len()
    );
    for error in errors.iter().chain(&reference.errors).take(10) {
        println!("  {error}");
    }
    match slope {
        Some(percent) => println!("  memory grows by {percent:.2} % a minute after the first minute, and may by {GROWTH_MAX} %"),
        None => println!("  too short to say whether memory grows: that takes more than two minutes"),
    }
    ensure!(errors.is_empty() && reference.errors.is_empty(), "{} errors", errors.len() + reference.errors.len());
    ensure!(!samples[2].is_empty() && *updates > 0, "nobody heard of anything");
    ensure!(slope.is_none_or(|percent| percent <= GROWTH_MAX), "memory grows under {} clients", load.clients);
    Ok(())
}

/// By how many percent of their mean these figures grow in a minute: the slope of the line that fits them best.
fn growth<'a>(memory: impl Iterator<Item = &'a (Duration, u64)>) -> Option<f64> {
    let points: Vec<(f64, f64)> = memory.map(|(at, held)| (at.as_secs_f64() / 60.0, *held as f64)).collect();
    let count = points.len() as f64;
    if points.len() < 12 {
        return None;
    }
    let (x, y) = (points.iter().map(|(x, _)| x).sum::<f64>() / count, points.iter().map(|(_, y)| y).sum::<f64>() / count);
    let (over, under) = points.iter().fold((0.0, 0.0), |(over, under), (px, py)| (over + (px - x) * (py - y), under + (px - x).powi(2)));
    Some(100.0 * over / under / y)
}
