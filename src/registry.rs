//! Who exists and who is alive: agents, the stations that hold their names, and signs of life.
//!
//! Names are claimed in a table, one compare-and-set at a time. Everything a reader sees comes from one snapshot that
//! is rebuilt whenever a table or this station's own catalogue changes. It knows nothing of works.
//!
//! A process that leaves says so in its sign of life. One whose sign expires is written down as lost by the first of the
//! others who comes to it; should it come back, it finds that out by itself. So each of these facts is told once.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod mirror;
mod missing;
mod rows;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use self::mirror::Mirror;
use self::rows::{BY_NAME, Claim, Gone, Sign, bytes_of, claim_of, runs, sign_of, source_of};
use crate::agents::Catalog;
use crate::audit::Audit;
use crate::config::Presence;
use crate::model::agent::{Definition, Manifest};
use crate::model::audit::Kind;
use crate::model::id::{AgentName, InstanceId, StationId};
use crate::transport::{Bucket, Error, Expect, Reach, Result, Row, Table};

/// Who this process is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The station.
    pub station: StationId,
    /// The process.
    pub instance: InstanceId,
    /// It shares its agents' works by their names, and not by the folders they are read from.
    pub by_name: bool,
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

/// The registry of one process; cheap to clone.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    table: Arc<dyn Table>,
    audit: Audit,
    me: Identity,
    presence: Presence,
    mirror: Mutex<Mirror>,
    snapshot: RwLock<Arc<Snapshot>>,
    changed: watch::Sender<u64>,
    retry: Notify,
    reach: OnceLock<watch::Receiver<Reach>>,
    /// Nobody here asks who else there is.
    narrow: AtomicBool,
    /// The revision of our last sign of life.
    beaten: Mutex<Option<u64>>,
    /// Rung when a sign of life has vanished.
    vanished: Notify,
}

/// How long a goodbye may take.
const GOODBYE_MAX: Duration = Duration::from_secs(2);

/// The lane of an agent: work that was given to it is never run by another file's agent of the same name, whoever holds the
/// name by then, unless both processes share what they run by its name.
fn lane(name: &AgentName, source: &str) -> String {
    format!("{name}~{source}")
}

impl Registry {
    /// A registry that has not spoken to anybody yet.
    pub fn new(table: Arc<dyn Table>, audit: Audit, me: Identity, presence: Presence) -> Self {
        Self(Arc::new(Inner {
            table,
            audit,
            me,
            presence,
            mirror: Mutex::default(),
            snapshot: RwLock::default(),
            changed: watch::Sender::new(0),
            retry: Notify::new(),
            reach: OnceLock::new(),
            narrow: AtomicBool::new(false),
            beaten: Mutex::default(),
            vanished: Notify::new(),
        }))
    }

    /// Heeds whether the other machines can be reached: while they cannot, their agents are offline.
    pub fn heed(&self, reach: watch::Receiver<Reach>) {
        let _ = self.0.reach.set(reach);
    }

    /// Keeps to what is ours: a station that assigns nothing has no use for everybody's signs of life, of which there are as many
    /// as stations. It looks at its own names, and at its replicas, with each of its own heartbeats.
    pub fn narrow(&self) {
        self.0.narrow.store(true, Ordering::Relaxed);
    }

    fn is_narrow(&self) -> bool {
        self.0.narrow.load(Ordering::Relaxed)
    }

    fn is_away(&self) -> bool {
        self.0.reach.get().is_some_and(|reach| matches!(&*reach.borrow(), Reach::Away { .. }))
    }

    /// Looks anew whenever the server goes or comes; says that we live as soon as it is back.
    async fn keep_in_touch(&self, is_member: bool) {
        let Some(mut reach) = self.0.reach.get().cloned() else { return std::future::pending().await };
        while reach.changed().await.is_ok() {
            self.with_mirror(|_| {});
            if is_member && !self.is_away() {
                if let Err(error) = self.beat().await {
                    tracing::debug!(%error, "a heartbeat did not get through");
                }
                self.0.retry.notify_one();
            }
        }
        std::future::pending().await
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
        if self.is_narrow() {
            return self.look().await;
        }
        let (claims, signs) = tokio::try_join!(self.0.table.list(Bucket::Agents), self.0.table.list(Bucket::Stations))?;
        self.with_mirror(|mirror| {
            mirror.claims = claims.iter().filter_map(claim_of).collect();
            mirror.signs = signs.iter().filter_map(sign_of).filter(|(_, sign)| sign.gone.is_none()).collect();
        });
        Ok(())
    }

    /// Reads what the tables say of our own names, and of our replicas.
    async fn look(&self) -> Result<()> {
        let signs = self.0.table.list_of(Bucket::Stations, self.0.me.station.as_str()).await?;
        let names: Vec<AgentName> = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner).own.definitions.keys().cloned().collect();
        let claims = join_all(names.iter().map(|name| self.0.table.get(Bucket::Agents, name.as_str()))).await;
        let claims: Vec<Row> = claims.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        self.with_mirror(|mirror| mirror.replace(&claims, signs));
        self.0.vanished.notify_one();
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
        self.with_mirror(|mirror| {
            mirror.own = catalog.clone();
            mirror.offered.retain(|name, _| catalog.definitions.contains_key(name));
        });
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
            tokio::join!(
                self.keep_in_touch(true),
                self.follow(Bucket::Agents),
                self.follow(Bucket::Stations),
                self.keep_beating(),
                self.keep_claiming(),
                self.keep_missing(),
                async {
                    while catalog.changed().await.is_ok() {
                        let current = catalog.borrow_and_update().clone();
                        if let Err(error) = self.offer(current).await {
                            tracing::warn!(%error, "could not announce a change of agents; the next heartbeat tries again");
                        }
                    }
                }
            )
        };
        let member = async {
            tokio::select! {
                () = cancel.cancelled() => {}
                _ = follow => {}
            }
            match tokio::time::timeout(GOODBYE_MAX, self.leave()).await {
                Ok(Ok(())) => self.say(Kind::Left),
                Ok(Err(error)) => {
                    tracing::warn!(%error, "could not say goodbye; the station counts as offline once its sign of life expires");
                }
                Err(_) => tracing::warn!("there was no time to say goodbye; the station counts as offline once its sign of life expires"),
            }
            self.0.audit.close();
        };
        tokio::join!(member, self.0.audit.write());
    }

    /// Puts the goodbye where the sign of life was, for as long as the sign would have stood.
    async fn leave(&self) -> Result<()> {
        let goodbye = Sign { gone: Some(Gone::Left), agents: BTreeMap::new(), ..self.sign() };
        self.0.table.put(Bucket::Stations, &self.sign_key(), bytes_of(&goodbye), Expect::Any, Some(self.0.presence.ttl.get())).await?;
        Ok(())
    }

    /// Tells the lattice's log of something that this process did.
    pub fn say(&self, kind: Kind) {
        self.0.audit.say(&self.0.me.station, self.0.me.instance, kind);
    }

    /// Follows the tables until cancelled, for a process that runs nothing and is no member.
    pub async fn observe(&self, cancel: CancellationToken) {
        tokio::select! {
            () = cancel.cancelled() => {}
            _ = async { tokio::join!(self.keep_in_touch(false), self.follow(Bucket::Agents), self.follow(Bucket::Stations), self.0.audit.write()) } => {}
        }
    }

    /// The lanes that this process takes work from, in groups that have each agent once: those of the very files that it reads,
    /// and those that it shares by the agents' names.
    pub fn served(&self) -> Vec<Vec<Lane>> {
        let mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        // Work that cannot run here is left to a replica where it can.
        let left = |(name, definition): &(&AgentName, &Arc<Definition>)| {
            definition.manifest.unavailable.is_some()
                && self.holds(&mirror, name, definition)
                && mirror.claims.get(*name).is_some_and(|(claim, _)| {
                    claim.manifest.unavailable.is_none() && mirror.another_serves(self.0.me.instance, name, claim)
                })
        };
        let lanes = |source: &dyn Fn(&Definition) -> String| -> Vec<Lane> {
            let served = mirror.own.definitions.iter().filter(|own| !left(own));
            served.map(|(name, definition)| Lane { name: lane(name, &source(definition)), definition: definition.clone() }).collect()
        };
        let by_name = self.0.me.by_name.then(|| lanes(&|_| BY_NAME.to_owned()));
        [lanes(&source_of)].into_iter().chain(by_name).collect()
    }

    /// Whether work that anybody gives to the name comes to this process: it holds it, or is a replica of who does.
    fn holds(&self, mirror: &Mirror, name: &AgentName, definition: &Definition) -> bool {
        let me = &self.0.me;
        let ours = |claim: &Claim| claim.station == me.station && runs(&source_of(definition), me.by_name, &claim.source);
        mirror.claims.get(name).is_some_and(|(claim, _)| ours(claim))
    }

    fn sign_key(&self) -> String {
        format!("{}.{}", self.0.me.station, self.0.me.instance)
    }

    fn sign(&self) -> Sign {
        let mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        let agents = mirror.own.definitions.iter().map(|(name, definition)| (name.clone(), source_of(definition))).collect();
        Sign { station: self.0.me.station.clone(), instance: self.0.me.instance, agents, by_name: self.0.me.by_name, gone: None }
    }

    async fn beat(&self) -> Result<()> {
        let (sign, key, ttl) = (self.sign(), self.sign_key(), self.0.presence.ttl.get());
        let put = |expect| self.0.table.put(Bucket::Stations, &key, bytes_of(&sign), expect, Some(ttl));
        let beaten = *self.0.beaten.lock().unwrap_or_else(PoisonError::into_inner);
        let (revision, told) = match put(beaten.map_or(Expect::Any, Expect::Revision)).await {
            Ok(revision) => (revision, beaten.is_none().then_some(Kind::Joined)),
            // Our sign has expired, or somebody wrote down that it had; or we are being heard twice at once.
            Err(Error::Conflict { .. }) => {
                let there = self.0.table.get(Bucket::Stations, &key).await?.as_ref().and_then(sign_of);
                let away = there.is_none_or(|(_, sign)| sign.gone.is_some());
                (put(Expect::Any).await?, away.then_some(Kind::Back))
            }
            Err(error) => return Err(error),
        };
        *self.0.beaten.lock().unwrap_or_else(PoisonError::into_inner) = Some(revision);
        told.into_iter().for_each(|kind| self.say(kind));
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
            if self.is_narrow()
                && let Err(error) = self.look().await
            {
                tracing::debug!(%error, "could not look after our own names");
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
        if self.is_narrow() {
            return std::future::pending().await;
        }
        loop {
            match self.0.table.watch(bucket).await {
                Ok(mut watch) => {
                    let mut there = Some(BTreeSet::new());
                    while let Ok(changes) = watch.next().await {
                        if !self.with_mirror_if(|mirror| mirror.take_in(bucket, changes, &mut there)) {
                            continue;
                        }
                        self.0.retry.notify_one();
                        self.0.vanished.notify_one();
                    }
                }
                Err(error) => tracing::warn!(%error, bucket = bucket.name(), "could not watch the registry"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    async fn claim_all(&self) -> Result<()> {
        let wanted: Vec<Arc<Definition>> = {
            let mut mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
            mirror.note_what_is_offered(&self.0.me);
            let unclaimed = |(name, definition): &(&AgentName, &Arc<Definition>)| {
                let ours = mirror.claims.get(*name).filter(|_| self.holds(&mirror, name, definition));
                !ours.is_some_and(|(claim, _)| mirror.is_described(&self.0.me, claim, definition))
            };
            mirror.own.definitions.iter().filter(unclaimed).map(|(_, definition)| definition.clone()).collect()
        };
        if wanted.is_empty() {
            return Ok(());
        }
        let held = join_all(wanted.iter().map(|definition| self.claim(definition))).await.into_iter().collect::<Result<Vec<_>>>()?;
        self.with_mirror(|mirror| {
            for (name, (claim, _)) in &held {
                if mirror.refused.get(name).is_some_and(|holder| *holder != claim.station) {
                    mirror.refused.remove(name);
                }
            }
            mirror.claims.extend(held);
            mirror.note_what_is_offered(&self.0.me);
        });
        Ok(())
    }

    /// Claims one name: creates the row, renews our own, or takes over that of a holder that is gone. Gives whose it is then.
    async fn claim(&self, definition: &Definition) -> Result<(AgentName, (Claim, u64))> {
        let name = &definition.manifest.name;
        let own = source_of(definition);
        let source = if self.0.me.by_name { BY_NAME.to_owned() } else { own.clone() };
        let claim = Claim { station: self.0.me.station.clone(), source, manifest: definition.manifest.clone() };
        let value = bytes_of(&claim);
        loop {
            let row = self.0.table.get(Bucket::Agents, name.as_str()).await?;
            let (expect, told) = match row.as_ref().map(|row| (claim_of(row), row.revision)) {
                None => (Expect::Absent, Kind::Registered(name.clone())),
                Some((None, revision)) => (Expect::Revision(revision), Kind::Registered(name.clone())),
                Some((Some((_, (held, at))), revision)) => {
                    let ours = held.station == claim.station && runs(&own, self.0.me.by_name, &held.source);
                    let settled = match ours {
                        true => self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner).is_described(&self.0.me, &held, definition),
                        false => self.is_served(name, &held).await?,
                    };
                    if settled {
                        if !ours {
                            self.refused(name, &own, &held.station);
                        }
                        return Ok((name.clone(), (held, at)));
                    }
                    let told = match held.station == claim.station {
                        true => Kind::Changed(name.clone()),
                        false => Kind::TakenOver { agent: name.clone(), from: held.station },
                    };
                    (Expect::Revision(revision), told)
                }
            };
            match self.0.table.put(Bucket::Agents, name.as_str(), value.clone(), expect, None).await {
                Ok(revision) => {
                    self.say(told);
                    return Ok((name.clone(), (claim, revision)));
                }
                Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells that somebody else holds a name, unless this was told already: by us, or by a replica of ours.
    fn refused(&self, name: &AgentName, source: &str, holder: &StationId) {
        let mut mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        let known = mirror.refused.insert(name.clone(), holder.clone()).is_some_and(|known| known == *holder);
        let me = &self.0.me;
        let same = |sign: &Sign| sign.agents.get(name).is_some_and(|theirs| theirs == source || (sign.by_name && me.by_name));
        let is_replica = |sign: &Sign| sign.station == me.station && sign.instance < me.instance && same(sign);
        let told = known || mirror.signs.values().any(is_replica);
        drop(mirror);
        if !told {
            self.say(Kind::Refused { agent: name.clone(), holder: holder.clone() });
        }
    }

    async fn withdraw(&self, name: &AgentName, source: &str) -> Result<()> {
        loop {
            let Some(row) = self.0.table.get(Bucket::Agents, name.as_str()).await? else { return Ok(()) };
            let Some((_, (claim, _))) = claim_of(&row) else { return Ok(()) };
            let ours = claim.station == self.0.me.station && runs(source, self.0.me.by_name, &claim.source);
            if !ours || self.another_serves(name, &claim).await? {
                return Ok(());
            }
            match self.0.table.remove(Bucket::Agents, name.as_str(), Expect::Revision(row.revision)).await {
                Ok(removed) => {
                    if removed {
                        self.say(Kind::Withdrawn(name.clone()));
                    }
                    self.with_mirror(|mirror| {
                        mirror.claims.remove(name);
                    });
                    return Ok(());
                }
                Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether a claim of another station, or of another folder, is that of a process that lives.
    async fn is_served(&self, name: &AgentName, claim: &Claim) -> Result<bool> {
        let me = self.0.me.instance;
        if !self.is_narrow() {
            return Ok(self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner).another_serves(me, name, claim));
        }
        let signs = self.0.table.list_of(Bucket::Stations, claim.station.as_str()).await?;
        Ok(signs.iter().filter_map(sign_of).any(|(_, sign)| sign.instance != me && sign.serves(name, claim)))
    }

    /// Whether a replica of ours still runs an agent that we do not. Replicas see a shared file go at the same moment: of two
    /// signs of life, the later one finds the earlier one in the table, though not always in the mirror.
    async fn another_serves(&self, name: &AgentName, claim: &Claim) -> Result<bool> {
        let me = self.0.me.instance;
        if !self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner).another_serves(me, name, claim) {
            return Ok(false);
        }
        let signs = self.0.table.list_of(Bucket::Stations, claim.station.as_str()).await?;
        Ok(signs.iter().filter_map(sign_of).any(|(_, sign)| sign.instance != me && sign.serves(name, claim)))
    }

    /// Changes the mirror, rebuilds the snapshot and tells those who watch, if anything is different.
    fn with_mirror(&self, change: impl FnOnce(&mut Mirror)) {
        self.with_mirror_if(|mirror| {
            change(mirror);
            true
        });
    }

    /// The same, where most changes change nothing: a heartbeat says again what is known. Gives whether anything is different.
    fn with_mirror_if(&self, change: impl FnOnce(&mut Mirror) -> bool) -> bool {
        let mut mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        if !change(&mut mirror) {
            return false;
        }
        let snapshot = self.project(&mirror);
        let mut current = self.0.snapshot.write().unwrap_or_else(PoisonError::into_inner);
        if **current == snapshot {
            return true;
        }
        self.warn_of_other_copies(&mirror);
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
        true
    }

    /// Replicas by name that describe an agent differently are not copies of one another: somebody should know.
    fn warn_of_other_copies(&self, mirror: &Mirror) {
        for (name, (claim, _)) in mirror.claims.iter().filter(|(_, (claim, _))| claim.source == BY_NAME) {
            let Some(own) = mirror.own.definitions.get(name).filter(|own| self.holds(mirror, name, own)) else { continue };
            let mut theirs = claim.manifest.clone();
            // A program may be missing on one machine.
            theirs.unavailable.clone_from(&own.manifest.unavailable);
            if theirs != own.manifest && mirror.another_serves(self.0.me.instance, name, claim) {
                tracing::warn!(
                    agent = %name, station = %claim.station,
                    "replicas of station {} describe agent {name} differently, and either may run its work: give them copies of one \
                     file, or other station names, or set lattice.replicas to by_folder", claim.station
                );
            }
        }
    }

    fn project(&self, mirror: &Mirror) -> Snapshot {
        let away = self.is_away();
        let mut snapshot = Snapshot::default();
        let mut signs: HashMap<&StationId, Vec<&Sign>> = HashMap::new();
        for sign in mirror.signs.values() {
            snapshot.stations.entry(sign.station.clone()).or_default().push(sign.instance);
            signs.entry(&sign.station).or_default().push(sign);
        }
        for (name, (claim, _)) in &mirror.claims {
            let here = mirror.own.definitions.get(name).is_some_and(|definition| self.holds(mirror, name, definition));
            let is_served = || signs.get(&claim.station).is_some_and(|signs| signs.iter().any(|sign| sign.serves(name, claim)));
            let online = here || (!away && is_served());
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
