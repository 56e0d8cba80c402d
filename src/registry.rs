//! Who exists and who is alive: agents, the stations that hold their names, and signs of life.
//!
//! Names are claimed in a table, one compare-and-set at a time. Everything a reader sees comes from one snapshot that
//! is rebuilt whenever a table or this station's own catalogue changes. It knows nothing of works.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::agents::{Catalog, source_id};
use crate::config::Presence;
use crate::model::agent::{Definition, Manifest};
use crate::model::id::{AgentName, InstanceId, StationId};
use crate::transport::{Bucket, Change, Error, Expect, Result, Row, Table};

/// Who this process is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The station.
    pub station: StationId,
    /// The process.
    pub instance: InstanceId,
}

/// An agent as callers of this process see it.
#[derive(Debug, Clone, PartialEq)]
pub struct Agent {
    /// What is known of it.
    pub manifest: Manifest,
    /// The station whose hook its work goes to.
    pub station: StationId,
    /// The lane of that hook.
    pub lane: String,
    /// Whether this process runs it itself.
    pub here: bool,
    /// Whether a process that runs it is alive.
    pub online: bool,
}

/// A lane that this process takes work from.
#[derive(Debug, Clone)]
pub struct Lane {
    /// Its name.
    pub name: String,
    /// The agent.
    pub definition: Arc<Definition>,
}

/// An agent's name that another station, or another folder, holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameTaken {
    /// The name.
    pub agent: AgentName,
    /// Who holds it.
    pub holder: StationId,
}

/// One moment's view of the lattice.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// Agents by name.
    pub agents: BTreeMap<AgentName, Agent>,
    /// Live processes by station.
    pub stations: BTreeMap<StationId, Vec<InstanceId>>,
    /// Own agents whose names are held elsewhere.
    pub taken: Vec<NameTaken>,
}

/// A claim on an agent's name, as the table keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Claim {
    station: StationId,
    source: String,
    manifest: Manifest,
}

/// A process's sign of life, as the table keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Sign {
    station: StationId,
    instance: InstanceId,
    /// Agents it runs, and the source of each.
    agents: BTreeMap<AgentName, String>,
}

/// The registry of one process; cheap to clone.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    table: Arc<dyn Table>,
    me: Identity,
    presence: Presence,
    mirror: Mutex<Mirror>,
    snapshot: RwLock<Arc<Snapshot>>,
    changed: watch::Sender<u64>,
    retry: Notify,
}

#[derive(Default)]
struct Mirror {
    claims: BTreeMap<AgentName, (Claim, u64)>,
    signs: BTreeMap<String, Sign>,
    own: Arc<Catalog>,
}

/// The lane of the agent that a file defines: work that was given to it is never run by another file's agent of the same name,
/// whoever holds the name by then.
fn lane(name: &AgentName, source: &str) -> String {
    format!("{name}~{source}")
}

fn source_of(definition: &Definition) -> String {
    definition.source.as_deref().map_or_else(|| "builtin".to_owned(), source_id)
}

impl Registry {
    /// A registry that has not spoken to anybody yet.
    pub fn new(table: Arc<dyn Table>, me: Identity, presence: Presence) -> Self {
        Self(Arc::new(Inner {
            table,
            me,
            presence,
            mirror: Mutex::default(),
            snapshot: RwLock::default(),
            changed: watch::Sender::new(0),
            retry: Notify::new(),
        }))
    }

    /// Who this process is.
    pub fn me(&self) -> &Identity {
        &self.0.me
    }

    /// The lattice as of the last change.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.0.snapshot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells of every change of the snapshot.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    /// Reads the tables once, without claiming or announcing anything.
    ///
    /// # Errors
    /// The transport's.
    pub async fn load(&self) -> Result<()> {
        let (claims, signs) = tokio::try_join!(self.0.table.list(Bucket::Agents), self.0.table.list(Bucket::Stations))?;
        self.with_mirror(|mirror| {
            mirror.claims = claims.iter().filter_map(claim_of).collect();
            mirror.signs = signs.iter().filter_map(sign_of).collect();
        });
        Ok(())
    }

    /// Takes in this station's own agents: announces them, claims names that are free, gives back those that are gone.
    ///
    /// # Errors
    /// The transport's.
    pub async fn offer(&self, catalog: Arc<Catalog>) -> Result<()> {
        let gone: Vec<(AgentName, String)> = {
            let mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
            mirror
                .own
                .definitions
                .iter()
                .filter(|(name, _)| !catalog.definitions.contains_key(*name))
                .map(|(name, d)| (name.clone(), source_of(d)))
                .collect()
        };
        self.with_mirror(|mirror| mirror.own = catalog.clone());
        // Alive first: a claim of a process that nobody sees alive could be taken over.
        self.beat().await?;
        for (name, source) in gone {
            self.withdraw(&name, &source).await?;
        }
        self.claim_all().await
    }

    /// Beats, follows the tables and retries waiting claims until cancelled; then says goodbye.
    pub async fn run(&self, mut catalog: watch::Receiver<Arc<Catalog>>, cancel: CancellationToken) {
        let follow = async {
            tokio::join!(self.follow(Bucket::Agents), self.follow(Bucket::Stations), self.keep_beating(), self.keep_claiming(), async {
                while catalog.changed().await.is_ok() {
                    let current = catalog.borrow_and_update().clone();
                    if let Err(error) = self.offer(current).await {
                        tracing::warn!(%error, "could not announce a change of agents; the next heartbeat tries again");
                    }
                }
            })
        };
        tokio::select! {
            () = cancel.cancelled() => {}
            _ = follow => {}
        }
        let key = self.sign_key();
        let goodbye = self.0.table.remove(Bucket::Stations, &key, Expect::Any);
        if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(2), goodbye).await {
            tracing::warn!(%error, "could not say goodbye; the station counts as offline once its sign of life expires");
        }
    }

    /// Follows the tables until cancelled, for a process that runs nothing and is no member.
    pub async fn observe(&self, cancel: CancellationToken) {
        tokio::select! {
            () = cancel.cancelled() => {}
            _ = async { tokio::join!(self.follow(Bucket::Agents), self.follow(Bucket::Stations)) } => {}
        }
    }

    /// The lanes that this process takes work from.
    pub fn served(&self) -> Vec<Lane> {
        let mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        let definitions = mirror.own.definitions.iter();
        definitions.map(|(name, definition)| Lane { name: lane(name, &source_of(definition)), definition: definition.clone() }).collect()
    }

    /// Whether work that anybody gives to the name comes to this process: it holds it, or is a replica of who does.
    fn holds(&self, mirror: &Mirror, name: &AgentName, definition: &Definition) -> bool {
        mirror.claims.get(name).is_some_and(|(claim, _)| claim.station == self.0.me.station && claim.source == source_of(definition))
    }

    fn sign_key(&self) -> String {
        format!("{}.{}", self.0.me.station, self.0.me.instance)
    }

    async fn beat(&self) -> Result<()> {
        let sign = {
            let mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
            let agents = mirror.own.definitions.iter().map(|(name, definition)| (name.clone(), source_of(definition))).collect();
            Sign { station: self.0.me.station.clone(), instance: self.0.me.instance, agents }
        };
        let value = Bytes::from(serde_json::to_vec(&sign).unwrap_or_default());
        self.0.table.put(Bucket::Stations, &self.sign_key(), value, Expect::Any, Some(self.0.presence.ttl.get())).await?;
        self.with_mirror(|mirror| {
            mirror.signs.insert(self.sign_key(), sign);
        });
        Ok(())
    }

    async fn keep_beating(&self) {
        let mut tick = tokio::time::interval(self.0.presence.heartbeat.get());
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tick.tick().await;
        loop {
            tick.tick().await;
            if let Err(error) = self.beat().await {
                tracing::warn!(%error, "a heartbeat did not get through");
            }
            self.0.retry.notify_one();
        }
    }

    async fn keep_claiming(&self) {
        loop {
            self.0.retry.notified().await;
            if let Err(error) = self.claim_all().await {
                tracing::warn!(%error, "could not claim agent names; the next heartbeat tries again");
            }
        }
    }

    async fn follow(&self, bucket: Bucket) {
        loop {
            match self.0.table.watch(bucket).await {
                Ok(mut watch) => {
                    let mut there = Some(BTreeSet::new());
                    while let Ok(changes) = watch.next().await {
                        self.with_mirror(|mirror| mirror.take_in(bucket, changes, &mut there));
                        self.0.retry.notify_one();
                    }
                }
                Err(error) => tracing::warn!(%error, bucket = bucket.name(), "could not watch the registry"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    async fn claim_all(&self) -> Result<()> {
        let wanted: Vec<Arc<Definition>> = {
            let mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
            let unclaimed = |(name, definition): &(&AgentName, &Arc<Definition>)| {
                !mirror.claims.get(*name).is_some_and(|(claim, _)| {
                    claim.station == self.0.me.station && claim.source == source_of(definition) && claim.manifest == definition.manifest
                })
            };
            mirror.own.definitions.iter().filter(unclaimed).map(|(_, definition)| definition.clone()).collect()
        };
        if wanted.is_empty() {
            return Ok(());
        }
        let held = join_all(wanted.iter().map(|definition| self.claim(definition))).await.into_iter().collect::<Result<Vec<_>>>()?;
        self.with_mirror(|mirror| mirror.claims.extend(held));
        Ok(())
    }

    /// Claims one name: creates the row, renews our own, or takes over that of a holder that is gone. Gives whose it is then.
    async fn claim(&self, definition: &Definition) -> Result<(AgentName, (Claim, u64))> {
        let name = &definition.manifest.name;
        let claim = Claim { station: self.0.me.station.clone(), source: source_of(definition), manifest: definition.manifest.clone() };
        let value = Bytes::from(serde_json::to_vec(&claim).unwrap_or_default());
        loop {
            let row = self.0.table.get(Bucket::Agents, name.as_str()).await?;
            let expect = match row.as_ref().map(|row| (claim_of(row), row.revision)) {
                None => Expect::Absent,
                Some((None, revision)) => Expect::Revision(revision),
                Some((Some((_, (held, at))), revision)) => {
                    let ours = held.station == claim.station && held.source == claim.source;
                    let settled = if ours { held.manifest == claim.manifest } else { self.holder_is_alive(name, &held) };
                    if settled {
                        return Ok((name.clone(), (held, at)));
                    }
                    Expect::Revision(revision)
                }
            };
            match self.0.table.put(Bucket::Agents, name.as_str(), value.clone(), expect, None).await {
                Ok(revision) => return Ok((name.clone(), (claim, revision))),
                Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn holder_is_alive(&self, name: &AgentName, held: &Claim) -> bool {
        let mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        let serves = |sign: &Sign| sign.station == held.station && sign.agents.get(name) == Some(&held.source);
        mirror.signs.values().any(|sign| sign.instance != self.0.me.instance && serves(sign))
    }

    async fn withdraw(&self, name: &AgentName, source: &str) -> Result<()> {
        let Some(row) = self.0.table.get(Bucket::Agents, name.as_str()).await? else { return Ok(()) };
        let ours = claim_of(&row).is_some_and(|(_, (claim, _))| claim.station == self.0.me.station && claim.source == source);
        let others = ours && claim_of(&row).is_some_and(|(_, (claim, _))| self.holder_is_alive(name, &claim));
        if !ours || others {
            return Ok(());
        }
        match self.0.table.remove(Bucket::Agents, name.as_str(), Expect::Revision(row.revision)).await {
            Ok(_) | Err(Error::Conflict { .. }) => {
                self.with_mirror(|mirror| {
                    mirror.claims.remove(name);
                });
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Changes the mirror, rebuilds the snapshot and tells those who watch, if anything is different.
    fn with_mirror(&self, change: impl FnOnce(&mut Mirror)) {
        let mut mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut mirror);
        let snapshot = self.project(&mirror);
        let mut current = self.0.snapshot.write().unwrap_or_else(PoisonError::into_inner);
        if **current == snapshot {
            return;
        }
        for taken in snapshot.taken.iter().filter(|taken| !current.taken.contains(taken)) {
            if taken.holder == self.0.me.station {
                tracing::warn!(agent = %taken.agent, "another folder of this station has an agent of this name: callers of each process reach their own");
                continue;
            }
            tracing::warn!(
                agent = %taken.agent, holder = %taken.holder,
                "the name is held by station {}: this station joins without the agent and runs it for its own callers only; \
                 rename one of the two, remove it there, or stop that station", taken.holder
            );
        }
        *current = Arc::new(snapshot);
        drop(current);
        drop(mirror);
        self.0.changed.send_modify(|count| *count += 1);
    }

    fn project(&self, mirror: &Mirror) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for sign in mirror.signs.values() {
            snapshot.stations.entry(sign.station.clone()).or_default().push(sign.instance);
        }
        for (name, (claim, _)) in &mirror.claims {
            let here = mirror.own.definitions.get(name).is_some_and(|definition| self.holds(mirror, name, definition));
            let serves = |sign: &Sign| sign.station == claim.station && sign.agents.get(name) == Some(&claim.source);
            let online = here || mirror.signs.values().any(serves);
            let (manifest, station, lane) = (claim.manifest.clone(), claim.station.clone(), lane(name, &claim.source));
            snapshot.agents.insert(name.clone(), Agent { manifest, station, lane, here, online });
        }
        for (name, definition) in &mirror.own.definitions {
            if self.holds(mirror, name, definition) {
                // Saved a moment ago: our callers see the file as it is, whoever renews the claim.
                if let Some(agent) = snapshot.agents.get_mut(name) {
                    agent.manifest = definition.manifest.clone();
                }
                continue;
            }
            if let Some((claim, _)) = mirror.claims.get(name) {
                snapshot.taken.push(NameTaken { agent: name.clone(), holder: claim.station.clone() });
            }
            let (manifest, station, lane) = (definition.manifest.clone(), self.0.me.station.clone(), lane(name, &source_of(definition)));
            snapshot.agents.insert(name.clone(), Agent { manifest, station, lane, here: true, online: true });
        }
        snapshot
    }
}

impl Mirror {
    /// Takes in changes; `there` are the keys that a watch has listed, until it has listed all.
    fn take_in(&mut self, bucket: Bucket, changes: Vec<Change>, there: &mut Option<BTreeSet<String>>) {
        for change in changes {
            if let (Change::Put(row), Some(there)) = (&change, there.as_mut()) {
                there.insert(row.key.clone());
            }
            match (bucket, change) {
                // What went away while nobody watched is not listed.
                (Bucket::Agents, Change::Loaded) => {
                    let there = there.take().unwrap_or_default();
                    self.claims.retain(|name, _| there.contains(name.as_str()));
                }
                (Bucket::Stations, Change::Loaded) => {
                    let there = there.take().unwrap_or_default();
                    self.signs.retain(|key, _| there.contains(key));
                }
                (Bucket::Agents, Change::Put(row)) => {
                    let known = row.key.parse().ok().and_then(|name: AgentName| self.claims.get(&name));
                    if known.is_none_or(|(_, revision)| *revision < row.revision) {
                        self.claims.extend(claim_of(&row));
                    }
                }
                (Bucket::Agents, Change::Removed(key)) => {
                    if let Ok(name) = key.parse::<AgentName>() {
                        self.claims.remove(&name);
                    }
                }
                (Bucket::Stations, Change::Put(row)) => self.signs.extend(sign_of(&row)),
                (Bucket::Stations, Change::Removed(key)) => {
                    self.signs.remove(&key);
                }
                _ => {}
            }
        }
    }
}

fn claim_of(row: &Row) -> Option<(AgentName, (Claim, u64))> {
    let claim: Claim = read(row)?;
    Some((row.key.parse().ok()?, (claim, row.revision)))
}

fn sign_of(row: &Row) -> Option<(String, Sign)> {
    Some((row.key.clone(), read(row)?))
}

fn read<T: serde::de::DeserializeOwned>(row: &Row) -> Option<T> {
    serde_json::from_slice(&row.value)
        .map_err(|error| tracing::warn!(key = row.key, %error, "skipped a row of the registry that cannot be read"))
        .ok()
}
