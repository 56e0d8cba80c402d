//! Takes work from this station's hook, runs it, and reports.
//!
//! Each attempt is a held item: while its process lives, the hold is extended; when it dies, the hold runs out and somebody
//! else takes the work as a later attempt, if there may be one. What this module holds in memory may be lost at any moment.

mod attempt;
mod claim;
mod expire;
mod lapsed;
mod lend;
mod outbox;
mod policy;
mod watch_over;

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::attempt::Word;
use crate::config::Config;
use crate::model::agent::Definition;
use crate::model::id::{RunId, WorkId};
use crate::model::retry::Policy;
use crate::model::time::Timestamp;
use crate::orders::Orders;
use crate::registry::{Lane, Registry};
use crate::runner::Runners;
use crate::runs::Runs;
use crate::telemetry::now;
use crate::transport::{Accept, Delivery, Error, Result, Taken, Transport, Want};
use crate::works::Works;

/// How often works whose time is up are looked after.
const SWEEP_EVERY: Duration = Duration::from_millis(500);
/// How often the hook, and a work that runs here, is looked at although nobody said that anything changed.
const LOOK_EVERY: Duration = Duration::from_secs(5);
const EXPIRED_MAX: usize = 64;
const TROUBLE_PAUSE: Duration = Duration::from_secs(1);
/// How many words a running attempt may have waiting.
const WORDS_MAX: usize = 256;

/// The leaf role of one process; cheap to clone.
#[derive(Clone)]
pub struct Leaf(Arc<Inner>);

struct Inner {
    transport: Transport,
    works: Works,
    orders: Orders,
    registry: Registry,
    runners: Runners,
    runs: Runs,
    config: Arc<Config>,
    tasks: TaskTracker,
    running: Mutex<HashMap<WorkId, Running>>,
    /// Counts attempts that have ended.
    freed: watch::Sender<u64>,
    accept: Accept,
    /// Held by whoever takes work.
    taking: tokio::sync::Mutex<()>,
    /// When what runs here was held last.
    held_ms: AtomicI64,
    /// From when on it may be looked again whether attempts can lend their places.
    lend_at: Mutex<Instant>,
    /// What was found of works whose holders give no sign of life.
    found: Mutex<HashMap<Delivery, lapsed::Found>>,
    /// Takes nothing but these works, if set.
    only: Mutex<Option<Vec<WorkId>>>,
}

/// How many works may be taken, and which if not all.
struct Room {
    places: usize,
    only: Option<Vec<WorkId>>,
}

/// An attempt that runs in this process.
struct Running {
    delivery: Delivery,
    /// The work's run, if its order can be read.
    run_id: Option<RunId>,
    definition: Arc<Definition>,
    words: mpsc::Sender<Word>,
    /// When it was looked at last; it listens besides.
    looked_at: Instant,
}

impl Leaf {
    /// A leaf that takes nothing yet.
    #[expect(clippy::too_many_arguments, reason = "the parts of a station, each made elsewhere")]
    pub fn new(
        transport: Transport,
        works: Works,
        orders: Orders,
        registry: Registry,
        runners: Runners,
        runs: Runs,
        config: Arc<Config>,
        tasks: TaskTracker,
    ) -> Self {
        Self(Arc::new(Inner {
            accept: attempt::accept(registry.me()),
            transport,
            works,
            orders,
            registry,
            runners,
            runs,
            config,
            tasks,
            running: Mutex::default(),
            freed: watch::Sender::new(0),
            taking: tokio::sync::Mutex::default(),
            held_ms: AtomicI64::new(now().as_millis()),
            lend_at: Mutex::new(Instant::now()),
            found: Mutex::default(),
            only: Mutex::default(),
        }))
    }

    /// From now on takes nothing but these works.
    pub fn keep_to(&self, works: Vec<WorkId>) {
        *self.0.only.lock().unwrap_or_else(PoisonError::into_inner) = Some(works);
        self.0.freed.send_modify(|count| *count += 1);
    }

    /// How many attempts run in this process.
    pub fn running(&self) -> usize {
        self.0.running().len()
    }

    /// Takes and runs work until cancelled; what runs then goes on until `drain`. A taking that is under way is always finished.
    pub async fn run(&self, cancel: CancellationToken) {
        let _taking = self.0.taking.lock().await;
        tokio::join!(self.take_on(&cancel), self.sweep_on(&cancel));
    }

    /// Extends what this process holds, until cancelled: as long as anything runs.
    pub async fn attend(&self, cancel: CancellationToken) {
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.hold_on() => {}
        }
    }

    /// Gives running work its grace, less of it in a hurry, then stops it and hands it back. Returns when nothing of it runs.
    pub async fn drain(&self, grace: Duration, hurry: &CancellationToken) {
        // Whoever is still taking starts what it took first.
        drop(self.0.taking.lock().await);
        self.tell_all(&Word::Rest);
        tokio::select! {
            () = self.idle() => return,
            () = tokio::time::sleep(grace) => {}
            () = hurry.cancelled() => {}
        }
        self.tell_all(&Word::HandBack);
        let patience = self.0.config.lattice.work.kill_after.get() + Duration::from_secs(5);
        let _ = tokio::time::timeout(patience, self.idle()).await;
    }

    fn tell_all(&self, word: &Word) {
        let running: Vec<_> = self.0.running().values().map(|running| running.words.clone()).collect();
        for words in running {
            let _ = words.try_send(word.clone());
        }
    }

    /// Waits until nothing runs.
    async fn idle(&self) {
        let mut freed = self.0.freed.subscribe();
        while self.running() > 0 && freed.changed().await.is_ok() {}
    }

    async fn take_on(&self, cancel: &CancellationToken) {
        let station = &self.0.registry.me().station;
        let mut signal = self.0.transport.queue.signal(station);
        let mut changes = self.0.registry.changes();
        let mut freed = self.0.freed.subscribe();
        // Whoever is told of what comes need not look for it, but now and then.
        let mut look = true;
        // Beside the taking: it may take long to find out who can lend its place.
        let (mut lending, mut lent) = (None, Vec::new());
        while !cancel.is_cancelled() {
            let next_at = match self.take(std::mem::take(&mut look), std::mem::take(&mut lent)).await {
                Ok(Some(next_at)) => next_at,
                Ok(None) => continue,
                Err(error) => {
                    tracing::error!(%error, "could not take work; trying again");
                    look = true;
                    Some(now().after(TROUBLE_PAUSE))
                }
            };
            if lending.is_none() && self.may_lend() {
                lending = Some(self.lent().boxed());
            }
            let wake = next_at.map_or(LOOK_EVERY, |at| at.since(now()).min(LOOK_EVERY));
            tokio::select! {
                () = cancel.cancelled() => {}
                found = async { match &mut lending { Some(lending) => lending.await, None => std::future::pending().await } } => {
                    (lending, lent) = (None, found);
                }
                () = signal.changed() => {}
                _ = changes.changed() => look = true,
                _ = freed.changed() => {}
                () = tokio::time::sleep(wake) => look = true,
            }
        }
    }

    /// Takes as much as there is room for, and one of each group of works that have a place lent. `None`: something was taken, and
    /// there may be more.
    async fn take(&self, look: bool, lent: Vec<Vec<WorkId>>) -> Result<Option<Option<Timestamp>>> {
        let all = Room { places: self.room(), only: self.0.only.lock().unwrap_or_else(PoisonError::into_inner).clone() };
        let takes_all = all.only.is_none();
        let (mut some, mut next_at) = self.fill(all, look).await?;
        if takes_all && self.room() == 0 {
            for works in lent {
                some |= self.fill(Room { places: 1, only: Some(works) }, look).await?.0;
            }
            next_at = next_at.into_iter().chain([now().after(lend::EVERY)]).min();
        }
        Ok(if some { None } else { Some(next_at) })
    }

    /// Takes what there is room for; whether that was anything, and when something becomes free.
    async fn fill(&self, mut free: Room, look: bool) -> Result<(bool, Option<Timestamp>)> {
        let (mut some, mut next_at) = (false, None::<Timestamp>);
        // One group after the other, so that an agent with a lane in each keeps to its limit.
        for lanes in self.0.registry.served() {
            let Some((mut want, definitions)) = self.want(lanes, &free) else { continue };
            want.look = look;
            if let Err(failure) = self.0.runners.attest().await {
                tracing::debug!(reason = failure.message, "others cannot see whether this process lives");
            }
            // After a sleep, ours or the machine's, what runs here is held again before anybody could take it for dead.
            if now().since(self.0.held_at()) > want.lease / 2 {
                match self.hold().await {
                    // What lives on a server that is away can't be held now, and nobody takes it from there either. What waits here can run.
                    Err(Error::Unreachable(_) | Error::Unanswered(_)) => {}
                    held => held?,
                }
            }
            let take = self.0.transport.queue.take(&self.0.registry.me().station, &want).await?;
            tracing::trace!(taken = take.taken.len(), lapsed = take.lapsed.len(), "looked at the hook");
            some |= !take.taken.is_empty();
            free.places = free.places.saturating_sub(take.taken.len());
            next_at = next_at.into_iter().chain(take.next_at).min();
            for taken in take.taken {
                match definitions.get(&taken.lane) {
                    Some(definition) => self.start(taken, definition.clone()),
                    None => tracing::error!(lane = taken.lane, "took work of a lane that was not wanted"),
                }
            }
            some |= self.look_at(take.lapsed, &want, &definitions).await;
        }
        Ok((some, next_at))
    }

    /// The room that is left in these lanes; none when there is none.
    fn want(&self, served: Vec<Lane>, free: &Room) -> Option<(Want, HashMap<String, Arc<Definition>>)> {
        let running = self.0.running();
        let room = free.places;
        let mut by_agent: HashMap<&str, usize> = HashMap::new();
        for attempt in running.values() {
            *by_agent.entry(attempt.definition.manifest.name.as_str()).or_default() += 1;
        }
        let mut lanes = Vec::with_capacity(served.len());
        let mut definitions = HashMap::with_capacity(served.len());
        let mut per_minute = Vec::new();
        for lane in served {
            let manifest = &lane.definition.manifest;
            let cap = manifest.limits.max_parallel.map_or(usize::MAX, |cap| cap as usize);
            let left = cap.saturating_sub(by_agent.get(manifest.name.as_str()).copied().unwrap_or(0)).min(room);
            if left > 0 {
                lanes.push((lane.name.clone(), u32::try_from(left).unwrap_or(u32::MAX)));
                per_minute.extend(manifest.limits.per_minute.map(|count| (lane.name.clone(), count)));
                definitions.insert(lane.name, lane.definition);
            }
        }
        let want = Want {
            holder: self.0.registry.me().instance,
            lanes,
            room: u32::try_from(room).unwrap_or(u32::MAX),
            per_minute,
            ageing: self.0.config.lattice.work.ageing.get(),
            lease: self.0.config.lattice.work.lease.get(),
            accept: self.0.accept.clone(),
            only: free.only.clone(),
            over: Some(self.over()),
            look: true,
        };
        (!want.lanes.is_empty()).then_some((want, definitions))
    }

    fn start(&self, taken: Taken, definition: Arc<Definition>) {
        let (words, inbox) = mpsc::channel(WORDS_MAX);
        let delivery = taken.delivery.clone();
        let id = delivery.id;
        // An earlier attempt of ours that lost its hold makes way.
        let run_id = attempt::run_of(&taken.body);
        let running = Running { delivery: delivery.clone(), run_id, definition: definition.clone(), words, looked_at: Instant::now() };
        let earlier = self.0.running().insert(id, running);
        if let Some(earlier) = earlier {
            let _ = earlier.words.try_send(Word::Lost);
        }
        let leaf = self.clone();
        self.0.tasks.spawn(async move {
            attempt::run(&leaf.0, taken, definition, inbox).await;
            let mut running = leaf.0.running();
            if running.get(&id).is_some_and(|current| current.delivery == delivery) {
                running.remove(&id);
            }
            drop(running);
            leaf.0.freed.send_modify(|count| *count += 1);
        });
    }

    async fn sweep_on(&self, cancel: &CancellationToken) {
        // What somebody held whose time is up indeed.
        let mut over = Vec::new();
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(SWEEP_EVERY) => {}
            }
            let (queue, lease) = (&self.0.transport.queue, self.0.config.lattice.work.lease.get());
            // What was found holds for one look: whoever slept may have gone on by the next.
            let found = Some(std::mem::take(&mut over));
            match queue.take_expired(self.0.registry.me().instance, lease, EXPIRED_MAX, found).await {
                Ok(expired) => {
                    for taken in expired.taken {
                        expire::expire(&self.0, &taken).await;
                    }
                    over = expire::over(&self.0, expired.lapsed).await;
                }
                Err(error) => tracing::warn!(%error, "could not look for works whose time is up"),
            }
        }
    }

    /// Holds on to what runs here, and looks whether anything was said of it that it did not hear.
    async fn hold_on(&self) {
        let mut tick = tokio::time::interval(self.0.config.lattice.work.lease.get() / 4);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut reach = self.0.transport.reach.clone();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                // Others wait for us to say, once the server is back, that we live.
                Ok(()) = reach.changed() => {}
            }
            if let Err(error) = self.hold().await {
                tracing::warn!(%error, "could not extend the attempts that run here");
            }
            if let Err(error) = self.look_again().await {
                tracing::warn!(%error, "could not look after the attempts that run here");
            }
        }
    }

    /// Extends what is held; a later attempt elsewhere makes ours stop, and the end of the work too.
    async fn hold(&self) -> Result<()> {
        let mut held: Vec<Delivery> = self.0.running().values().map(|running| running.delivery.clone()).collect();
        let at = now();
        while !held.is_empty() {
            let lost = self.0.transport.queue.extend(&held, self.0.config.lattice.work.lease.get(), None).await?;
            if lost.is_empty() {
                break;
            }
            for delivery in &lost {
                match self.0.works.get(delivery.id).await {
                    Ok(Some(work)) if policy::goes_on(&work, delivery.attempt) => {
                        tracing::debug!(work_id = %delivery.id, "a hold is lost, and to no later attempt: this one goes on");
                        self.tell(delivery, Word::Stands(work));
                    }
                    Ok(_) => self.tell(delivery, Word::Lost),
                    Err(error) => tracing::warn!(work_id = %delivery.id, %error, "a hold is lost, and it is not known to whom"),
                }
            }
            // What is lost is told whatever becomes of the others, so that those may not have been extended: once more without it.
            held.retain(|delivery| !lost.contains(delivery));
        }
        self.0.held_ms.store(at.as_millis(), Ordering::Relaxed);
        Ok(())
    }

    async fn look_again(&self) -> Result<()> {
        let due: Vec<Delivery> = {
            let mut running = self.0.running();
            let due = running.values_mut().filter(|running| running.looked_at.elapsed() >= LOOK_EVERY);
            due.map(|running| {
                running.looked_at = Instant::now();
                running.delivery.clone()
            })
            .collect()
        };
        for delivery in due {
            if let Some(work) = self.0.works.get(delivery.id).await? {
                self.tell(&delivery, Word::Stands(work));
            }
        }
        Ok(())
    }

    fn tell(&self, delivery: &Delivery, word: Word) {
        let held = |running: &&Running| running.delivery == *delivery;
        let words = self.0.running().get(&delivery.id).filter(held).map(|running| running.words.clone());
        if let Some(words) = words
            && words.try_send(word).is_err()
        {
            tracing::warn!(work_id = %delivery.id, "a running attempt does not listen");
        }
    }
}

impl Inner {
    fn held_at(&self) -> Timestamp {
        Timestamp::from_millis(self.held_ms.load(Ordering::Relaxed))
    }

    /// What holds for the attempts of an agent's works: the agent's own word, where it has one.
    fn policy(&self, definition: &Definition) -> Policy {
        let manifest = &definition.manifest;
        self.config.lattice.retry.policy().with(&manifest.retry, &manifest.limits)
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<WorkId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
