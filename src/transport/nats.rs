//! The transport across machines: JetStream streams, key-value buckets and an object store on a NATS server.

mod blobs;
pub mod connect;
pub mod embedded;
pub mod examine;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod hook;
mod link;
mod log;
mod pages;
mod queue;
mod row;
mod stream;
mod table;
mod tail;
mod told;
mod watcher;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::Client;
use serde_json::{Value, json};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::connect::Connected;
use self::link::{Background, Link};
use self::stream::Stream;
use super::local::Clock;
use super::{Bucket, Error, Reach, Result, Transport, Wire};
use crate::config;
use crate::model::id::{LatticeId, StationId};
use crate::model::time::Timestamp;
use crate::telemetry::{clock_correction, correct_clock, machine_now, now};

/// How long the server knows a message id again.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// Who opens the transport, and how.
#[derive(Clone)]
pub struct Options {
    /// The lattice.
    pub lattice: LatticeId,
    /// This process's station.
    pub station: StationId,
    /// The settings of the connection.
    pub settings: config::Nats,
    /// How long blobs are kept.
    pub blob_max_age: Duration,
    /// Tells the time, for leases, deadlines and expiry.
    pub clock: Clock,
    /// Counts moments after which something may have been missed.
    pub interruptions: watch::Receiver<u64>,
    /// Tells of everything that these credentials may not do.
    pub denials: broadcast::Sender<connect::Denial>,
    /// What runs in the background ends with this.
    pub tasks: TaskTracker,
}

/// An open transport.
pub struct Nats {
    transport: Transport,
    stream: Arc<Stream>,
    cancel: CancellationToken,
}

impl Nats {
    /// Opens the lattice over a connection: makes or checks its streams.
    ///
    /// # Errors
    /// `Store` when the server's streams are not as needed, `Unreachable` when it does not answer.
    pub async fn open(client: Client, options: Options) -> Result<Self> {
        let cancel = CancellationToken::new();
        let background = Background { tasks: options.tasks.clone(), cancel: cancel.clone() };
        let link = Link::new(client, &options, background);
        let blobs = Arc::new(blobs::NatsBlobs::new(&link, options.blob_max_age));
        let log = log::NatsLog::open(&link, &blobs).await?;
        let stream = log.stream();
        let table = table::NatsTable::new(&link, &blobs);
        let queue = queue::NatsQueue::new(&link, &log, &blobs, options.tasks, cancel.clone());
        let transport = Transport {
            queue: Arc::new(queue),
            log: Arc::new(log),
            table: Arc::new(table),
            blobs,
            reach: watch::channel(super::Reach::Connected).1,
        };
        Ok(Self { transport, stream, cancel })
    }

    /// The four primitives.
    pub fn transport(&self) -> Transport {
        self.transport.clone()
    }

    /// How far this machine's own clock is behind the server's, in milliseconds.
    ///
    /// # Errors
    /// The server's.
    pub async fn behind_ms(&self) -> Result<i64> {
        let mut best = (Duration::MAX, 0);
        for _ in 0..3 {
            let (before, begun) = (machine_now().as_millis(), Instant::now());
            let info = self.stream.info().await.map_err(|fault| self.stream.explain(fault))?;
            let (middle, took) = (before.midpoint(machine_now().as_millis()), begun.elapsed());
            let server: Option<Timestamp> = info["ts"].as_str().and_then(|text| text.parse().ok());
            if took < best.0 {
                best = (took, server.map_or(0, |server| server.as_millis() - middle));
            }
            if took <= MEASURE_MAX {
                break;
            }
        }
        Ok(best.1)
    }

    /// Ends what runs in the background.
    pub fn close(&self) {
        self.cancel.cancel();
    }
}

/// Who a process is in a lattice.
#[derive(Debug, Clone)]
pub struct Member {
    /// The lattice.
    pub lattice: LatticeId,
    /// The station.
    pub station: StationId,
    /// How long blobs are kept.
    pub blob_max_age: Duration,
}

impl Member {
    fn options(&self, settings: &config::Nats, connected: &Connected, clock: Clock, tasks: &TaskTracker) -> Options {
        Options {
            lattice: self.lattice.clone(),
            station: self.station.clone(),
            settings: settings.clone(),
            blob_max_age: self.blob_max_age,
            clock,
            interruptions: connected.interruptions.clone(),
            denials: connected.denials.clone(),
            tasks: tasks.clone(),
        }
    }
}

/// Two clocks that differ by less are taken for one.
const SKEW_MIN: Duration = Duration::from_millis(1000);
/// How often this machine's clock is looked at, for a jump.
const CLOCK_LOOK: Duration = Duration::from_secs(1);
/// How often it is compared with the server's, if it does not jump: clocks drift.
const CLOCK_EVERY: Duration = Duration::from_secs(300);
/// A difference that no pause of this process explains.
const JUMP_MIN_MS: u64 = 500;
/// An answer that took longer says little of the clock that made it.
const MEASURE_MAX: Duration = Duration::from_millis(200);

/// Brings the server within reach, however long that takes, and says how it goes. `settings` may still be unknown.
pub async fn seek(
    member: Member,
    mut settings: watch::Receiver<Option<config::Nats>>,
    far: watch::Sender<Option<Transport>>,
    reach: watch::Sender<Reach>,
    tasks: TaskTracker,
) {
    let settings = loop {
        if let Some(settings) = settings.borrow_and_update().clone() {
            break settings;
        }
        if settings.changed().await.is_err() {
            return;
        }
    };
    let since = now();
    let mut pause = Duration::from_millis(200);
    let mut said = String::new();
    let (nats, connected) = loop {
        match open_once(&member, &settings, &tasks).await {
            Ok(opened) => break opened,
            Err(reason) => {
                if reason != said {
                    tracing::warn!("{reason}; trying again without end");
                    reach.send_replace(Reach::Away { since, reason: reason.as_str().into() });
                    said = reason;
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(settings.reconnect_delay_max.get());
    };
    far.send_replace(Some(nats.transport()));
    tokio::join!(pass_on(connected.reach, reach), keep_clock(&nats, connected.interruptions));
}

/// Says how the connection goes, for ever: it never ends by itself.
async fn pass_on(mut heard: watch::Receiver<Reach>, reach: watch::Sender<Reach>) {
    loop {
        let state = heard.borrow_and_update().clone();
        reach.send_replace(state);
        if heard.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Keeps what `now` says at the server's time, for ever. Somebody, or a time server, may set this machine's clock right at any
/// moment; what was measured before that is then wrong by as much.
async fn keep_clock(nats: &Nats, mut interruptions: watch::Receiver<u64>) {
    let (mut measured, mut is_due) = (Instant::now(), false);
    loop {
        let (wall, steady) = (machine_now().as_millis(), Instant::now());
        tokio::time::sleep(CLOCK_LOOK).await;
        let passed = i64::try_from(steady.elapsed().as_millis()).unwrap_or(i64::MAX);
        let jumped = (machine_now().as_millis() - wall).saturating_sub(passed).unsigned_abs() >= JUMP_MIN_MS;
        let is_elsewhere = interruptions.has_changed().unwrap_or(false);
        interruptions.mark_unchanged();
        is_due = is_due || jumped || is_elsewhere || measured.elapsed() >= CLOCK_EVERY;
        if is_due && follow_clock(nats).await {
            (measured, is_due) = (Instant::now(), false);
        }
    }
}

/// Corrects what `now` says, if that is wrong by more than can be measured; false when the server did not answer.
async fn follow_clock(nats: &Nats) -> bool {
    let behind = match nats.behind_ms().await {
        Ok(behind) => behind,
        Err(error) => {
            tracing::debug!(%error, "the server's clock could not be read");
            return false;
        }
    };
    let is_apart = |milliseconds: i64| milliseconds.unsigned_abs() >= SKEW_MIN.as_millis() as u64;
    if !is_apart(behind - clock_correction()) {
        return true;
    }
    if is_apart(behind) {
        tracing::warn!(
            "this machine's clock is {} s {} the server's: times of the lattice are the server's",
            behind.unsigned_abs() / 1000,
            if behind > 0 { "behind" } else { "ahead of" }
        );
        correct_clock(behind);
    } else {
        tracing::info!("this machine's clock is as good as the server's now");
        correct_clock(0);
    }
    true
}

async fn open_once(member: &Member, settings: &config::Nats, tasks: &TaskTracker) -> std::result::Result<(Nats, Connected), String> {
    let name = format!("lattice-mcp {} {}", member.lattice, member.station);
    let inbox = Wire::new(member.lattice.clone()).inbox(&member.station);
    let connected = connect::connect(settings, &name, &inbox).await.map_err(|error| error.to_string())?;
    let options = member.options(settings, &connected, Arc::new(now), tasks);
    let nats = Nats::open(connected.client.clone(), options).await.map_err(|error| error.to_string())?;
    follow_clock(&nats).await;
    Ok((nats, connected))
}

/// Makes what a station finds there when it may make nothing itself.
///
/// # Errors
/// What is wrong, where, and what to do.
pub async fn provide(member: &Member, settings: &config::Nats, station: &StationId) -> std::result::Result<(), String> {
    let name = format!("lattice-mcp {} {}", member.lattice, member.station);
    let inbox = Wire::new(member.lattice.clone()).inbox(&member.station);
    let connected = connect::connect(settings, &name, &inbox).await.map_err(|error| error.to_string())?;
    let options = member.options(settings, &connected, Arc::new(now), &TaskTracker::new());
    let link = Link::new(connected.client.clone(), &options, Background::default());
    let made = async {
        let blobs = Arc::new(blobs::NatsBlobs::new(&link, member.blob_max_age));
        blobs.stream().await?;
        log::NatsLog::open(&link, &blobs).await?;
        for bucket in [Bucket::Agents, Bucket::Stations] {
            bucket_stream(&link, bucket).await?;
        }
        queue::hook_stream(&link, station).await
    };
    made.await.map(|_| ()).map_err(|error: Error| error.to_string())
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.close();
    }
}

/// What every stream of ours has.
fn stream_config(link: &Link, name: String, subjects: &[String], max_age: Duration, max_bytes: i64) -> Value {
    json!({
        "name": name,
        "subjects": subjects,
        "retention": "limits",
        "storage": "file",
        "num_replicas": link.settings.replicas,
        "max_age": u64::try_from(max_age.as_nanos()).unwrap_or(0),
        "max_bytes": max_bytes,
        "max_consumers": -1,
        "max_msgs": -1,
        "max_msg_size": -1,
        "allow_direct": true,
        "duplicate_window": u64::try_from(DUPLICATE_WINDOW.as_nanos()).unwrap_or(0),
    })
}

/// Makes or checks the streams of the lattice's tables.
async fn bucket_stream(link: &Arc<Link>, bucket: Bucket) -> Result<Arc<Stream>> {
    let wire = &link.wire;
    let mut config = stream_config(link, wire.bucket_stream(bucket), &[wire.rows(bucket)], Duration::ZERO, -1);
    config["discard"] = "new".into();
    config["max_msgs_per_subject"] = 1.into();
    config["allow_msg_ttl"] = true.into();
    config["deny_delete"] = true.into();
    config["republish"] = json!({ "src": wire.rows(bucket), "dest": wire.told_rows(bucket) });
    Stream::ensure(link, config).await
}
