//! The sessions of older clients: which are in use, how long they last, and what of them outlives this process.
//!
//! A session's `initialize` parameters stand in the store's `sessions` table, so that a restarted server takes the session up again
//! at its next request. Newer clients have no sessions.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::StatusCode;
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::session::{SessionManager as _, SessionState, SessionStore, SessionStoreError};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::OwnedMutexGuard;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::refusal::Refusal;
use crate::config;
use crate::model::access::Principal;
use crate::model::hex::hex;
use crate::transport::{Bucket, Expect, Table};

/// The longest session id that is looked up.
const ID_MAX: usize = 128;
/// How long opening a session, or taking one up again, may take.
pub(super) const OPEN_MAX: Duration = Duration::from_secs(20);
/// How long rmcp may have a session that nobody here knows: longer than it takes to open one.
const STRANGER_MAX: Duration = Duration::from_secs(60);
/// How often the sessions are gone through, at most and at least.
const ROUND_MIN: Duration = Duration::from_millis(50);
const ROUND_MAX: Duration = Duration::from_secs(60);

/// The sessions that this process serves.
pub(super) struct Sessions {
    pub(super) manager: Arc<LocalSessionManager>,
    store: Store,
    idle: Duration,
    max: usize,
    max_each: usize,
    known: Mutex<Known>,
    /// The sessions that are being taken up, each by one request at a time.
    turns: Mutex<HashMap<Arc<str>, Arc<tokio::sync::Mutex<()>>>>,
}

#[derive(Default)]
struct Known {
    by_id: HashMap<Arc<str>, Seen>,
    /// Those that are being opened.
    joining: HashMap<Option<Principal>, usize>,
}

struct Seen {
    /// Requests and streams that are open now: while there are any, the session is not idle, however silent.
    open: usize,
    last: Instant,
    saved: Instant,
    /// It was opened before this process served it.
    from_before: bool,
    /// Whose it is.
    who: Option<Principal>,
}

tokio::task_local! {
    /// Who comes with the request that is served now: rmcp is not told, but asks the store on the request's own task.
    pub(super) static WHO: Option<Principal>;
}

impl Sessions {
    pub(super) fn new(table: Arc<dyn Table>, config: &config::Http) -> Self {
        let mut manager = LocalSessionManager::default();
        // rmcp would count a silent tool call as idle; `keep` counts what is open.
        manager.session_config.keep_alive = None;
        // Some clients lose all tools to the empty event that primes a stream.
        manager.session_config.sse_retry = None;
        let idle = config.session_idle.get();
        Self {
            manager: Arc::new(manager),
            store: Store { table, ttl: idle + idle / 4 },
            idle,
            max: config.sessions_max as usize,
            max_each: config.sessions_per_principal as usize,
            known: Mutex::default(),
            turns: Mutex::default(),
        }
    }

    /// What rmcp keeps sessions in.
    pub(super) fn store(&self) -> Arc<dyn SessionStore> {
        Arc::new(self.store.clone())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for a new session. When all are taken, or all of one principal's, the one of them that has been idle for longest ends.
    ///
    /// # Errors
    /// When every session is in use.
    pub(super) async fn admit(self: &Arc<Self>, who: Option<&Principal>) -> Result<Joining, Refusal> {
        let evicted = {
            let mut known = self.known();
            let mut evicted = None;
            let own = |seen: &Seen| who.is_some() && seen.who.as_ref() == who;
            let joining = known.joining.get(&who.cloned()).copied().unwrap_or(0);
            let has_enough = who.is_some() && known.by_id.values().filter(|seen| own(seen)).count() + joining >= self.max_each;
            if has_enough || known.by_id.len() + known.joining.values().sum::<usize>() >= self.max {
                let idle = known.by_id.iter().filter(|(_, seen)| seen.open == 0 && (!has_enough || own(seen)));
                let idlest = idle.min_by_key(|(_, seen)| seen.last);
                let max = if has_enough { self.max_each } else { self.max };
                let id = idlest.map(|(id, _)| id.clone()).ok_or_else(|| Refusal::too_many_sessions(max))?;
                known.by_id.remove(&id);
                evicted = Some(id);
            }
            *known.joining.entry(who.cloned()).or_default() += 1;
            evicted
        };
        let joining = Joining(self.clone(), who.cloned());
        if let Some(id) = evicted {
            tracing::info!(session = %short(&id), max = self.max, "ended the idlest session to make room for a new one");
            self.end(&id).await;
        }
        Ok(joining)
    }

    /// Brings a request or stream into a session: into one that this process serves, or to the taking up of one that it does not.
    ///
    /// # Errors
    /// When the session is somebody else's, or others take it up for too long.
    pub(super) async fn enter(self: &Arc<Self>, id: &str, who: Option<&Principal>) -> Result<Entry, Refusal> {
        if id.is_empty() || id.len() > ID_MAX {
            return Err(Refusal::no_session());
        }
        if let Some(open) = self.open(id, who).await? {
            return Ok(Entry::Open(open));
        }
        let turn = timeout(OPEN_MAX, self.turn(id)).await.map_err(|_| too_slow())?;
        Ok(match self.open(id, who).await? {
            Some(open) => Entry::Open(open),
            None => Entry::TakeUp(turn),
        })
    }

    async fn open(self: &Arc<Self>, id: &str, who: Option<&Principal>) -> Result<Option<Open>, Refusal> {
        let open = {
            let mut known = self.known();
            let Some((id, seen)) = known.by_id.get_key_value(id) else { return Ok(None) };
            if seen.who.as_ref() != who {
                return Err(Refusal::others_session());
            }
            let id = id.clone();
            known.by_id.entry(id.clone()).and_modify(Seen::enter);
            Open { sessions: self.clone(), id }
        };
        // Its server may have ended by itself.
        Ok(self.serves(id).await.then_some(open))
    }

    /// Waits until nobody else takes this session up.
    async fn turn(self: &Arc<Self>, id: &str) -> Turn {
        let mut turn = Turn { sessions: self.clone(), id: id.into(), held: None };
        let mutex = self.turns().entry(turn.id.clone()).or_default().clone();
        turn.held = Some(mutex.lock_owned().await);
        turn
    }

    fn turns(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<tokio::sync::Mutex<()>>>> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a request or stream of a session that was opened or taken up again just now.
    pub(super) fn join(self: &Arc<Self>, id: &str, from_before: bool, who: Option<Principal>) -> Open {
        let id: Arc<str> = id.into();
        let now = Instant::now();
        let mut known = self.known();
        let seen = known.by_id.entry(id.clone()).or_insert(Seen { open: 0, last: now, saved: now, from_before, who });
        seen.from_before = from_before;
        seen.enter();
        drop(known);
        Open { sessions: self.clone(), id }
    }

    /// Forgets a session that has ended.
    pub(super) fn forget(&self, id: &str) {
        self.known().by_id.remove(id);
    }

    /// Whether rmcp has the session.
    pub(super) async fn serves(&self, id: &str) -> bool {
        matches!(self.manager.has_session(&id.into()).await, Ok(true))
    }

    /// Whether a session was opened before this process served it.
    pub(super) fn is_from_before(&self, id: &str) -> bool {
        self.known().by_id.get(id).is_none_or(|seen| seen.from_before)
    }

    /// Whether a session that this process does not serve may be taken up again: by whom its row names.
    pub(super) async fn is_kept_for(&self, id: &str, who: Option<&Principal>) -> Result<(), Refusal> {
        match self.store.kept(id).await {
            Ok(Some(kept)) if kept.who.as_ref() == who => Ok(()),
            Ok(Some(_)) => Err(Refusal::others_session()),
            Ok(None) => {
                self.forget(id);
                Err(Refusal::no_session())
            }
            Err(error) => Err(Refusal::from_rmcp(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string())),
        }
    }

    /// Ends sessions that have been idle for too long and keeps the others' rows alive, until `end`.
    pub(super) async fn keep(self: Arc<Self>, end: CancellationToken) {
        let mut round = tokio::time::interval((self.idle / 10).clamp(ROUND_MIN, ROUND_MAX));
        round.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut strangers = HashMap::new();
        loop {
            tokio::select! {
                () = end.cancelled() => return,
                _ = round.tick() => {}
            }
            for id in self.take_idle() {
                tracing::info!(session = %short(&id), idle = ?self.idle, "ended an idle session");
                self.end(&id).await;
            }
            self.close_strangers(&mut strangers).await;
            self.refresh(self.idle / 8).await;
        }
    }

    /// Closes what rmcp has had for long though nobody here knows it, for example a session that was not opened in time.
    async fn close_strangers(self: &Arc<Self>, since: &mut HashMap<Arc<str>, Instant>) {
        let mut strangers: HashSet<Arc<str>> = self.manager.sessions.read().await.keys().cloned().collect();
        strangers.retain(|id| !self.knows(id));
        since.retain(|id, _| strangers.contains(id));
        for id in strangers {
            since.entry(id).or_insert_with(Instant::now);
        }
        let old: Vec<_> = since.extract_if(|_, since| since.elapsed() >= STRANGER_MAX).collect();
        for (id, _) in old {
            let _turn = self.turn(&id).await;
            if !self.knows(&id) {
                tracing::info!(session = %short(&id), "closed a session that was not opened to the end");
                self.close(&id).await;
            }
        }
    }

    fn knows(&self, id: &str) -> bool {
        self.known().by_id.contains_key(id)
    }

    fn take_idle(&self) -> Vec<Arc<str>> {
        let mut known = self.known();
        let idle = known.by_id.extract_if(|_, seen| seen.open == 0 && seen.last.elapsed() >= self.idle);
        idle.map(|(id, _)| id).collect()
    }

    /// Ends a session that was put away, unless a request has taken it up again meanwhile.
    async fn end(self: &Arc<Self>, id: &Arc<str>) {
        let _turn = self.turn(id).await;
        if self.knows(id) {
            return;
        }
        self.close(id).await;
        if let Err(error) = self.store.delete(id).await {
            tracing::warn!(session = %short(id), %error, "cannot remove a session's row: it expires by itself");
        }
    }

    /// Takes a session from rmcp; its row stays.
    pub(super) async fn close(&self, id: &str) {
        if let Err(error) = self.manager.close_session(&id.into()).await {
            tracing::debug!(session = %short(id), %error, "closing a session");
        }
    }

    /// Moves the expiry of all rows that were used since they were written.
    pub(super) async fn save(&self) {
        self.refresh(Duration::ZERO).await;
    }

    async fn refresh(&self, age: Duration) {
        let due: Vec<_> = {
            let mut known = self.known();
            let used = known.by_id.iter_mut().filter(|(_, seen)| seen.saved.elapsed() >= age && (seen.open > 0 || seen.last > seen.saved));
            used.map(|(id, seen)| (seen.saved = Instant::now(), id.clone()).1).collect()
        };
        for id in due {
            if let Err(error) = self.store.touch(&id).await {
                tracing::warn!(session = %short(&id), %error, "cannot move a session's expiry");
            }
        }
    }
}

impl Seen {
    fn enter(&mut self) {
        self.open += 1;
        self.last = Instant::now();
    }
}

/// A session that is being opened: its place is taken while this lives.
pub(super) struct Joining(Arc<Sessions>, Option<Principal>);

impl Drop for Joining {
    fn drop(&mut self) {
        let mut known = self.0.known();
        if let Some(joining) = known.joining.get_mut(&self.1) {
            *joining -= 1;
            if *joining == 0 {
                known.joining.remove(&self.1);
            }
        }
    }
}

/// How a request comes into its session.
pub(super) enum Entry {
    /// This process serves it.
    Open(Open),
    /// It has to be taken up from its row, which nobody else does meanwhile.
    TakeUp(Turn),
}

/// The taking up of a session: while this lives, nobody else takes it up.
pub(super) struct Turn {
    sessions: Arc<Sessions>,
    id: Arc<str>,
    held: Option<OwnedMutexGuard<()>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = self.sessions.turns();
        self.held = None;
        // Others are only added under this lock: whoever is the last sees that nobody waits.
        if turns.get(&self.id).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            turns.remove(&self.id);
        }
    }
}

/// A session that was not opened or taken up in time.
pub(super) fn too_slow() -> Refusal {
    Refusal::from_rmcp(StatusCode::SERVICE_UNAVAILABLE, "a session was not opened in time")
}

/// An open request or stream of a session: while this lives, the session is not idle.
pub(super) struct Open {
    sessions: Arc<Sessions>,
    id: Arc<str>,
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(seen) = self.sessions.known().by_id.get_mut(&self.id) {
            seen.open = seen.open.saturating_sub(1);
            seen.last = Instant::now();
        }
    }
}

/// rmcp's store of sessions, on the lattice's own table.
#[derive(Clone)]
struct Store {
    table: Arc<dyn Table>,
    ttl: Duration,
}

impl Store {
    async fn kept(&self, id: &str) -> Result<Option<Kept>, crate::transport::Error> {
        let Some(row) = self.table.get(Bucket::Sessions, id).await? else { return Ok(None) };
        let kept = serde_json::from_slice(&row.value).inspect_err(|error| {
            tracing::warn!(session = %short(id), %error, "cannot read a session's row: the client has to initialize again");
        });
        Ok(kept.ok())
    }

    async fn touch(&self, id: &str) -> Result<(), crate::transport::Error> {
        let Some(row) = self.table.get(Bucket::Sessions, id).await? else { return Ok(()) };
        match self.table.put(Bucket::Sessions, id, row.value, Expect::Revision(row.revision), Some(self.ttl)).await {
            Ok(_) | Err(crate::transport::Error::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// A session's row.
#[derive(Serialize, Deserialize)]
struct Kept {
    #[serde(flatten)]
    state: SessionState,
    /// Whose it is.
    #[serde(default, rename = "lattice_principal", skip_serializing_if = "Option::is_none")]
    who: Option<Principal>,
}

/// A session as the log names it: its id lets whoever reads it speak in it.
fn short(id: &str) -> String {
    hex(&Sha256::digest(id)[..6])
}

fn who() -> Option<Principal> {
    WHO.try_with(Clone::clone).ok().flatten()
}

#[async_trait]
impl SessionStore for Store {
    async fn load(&self, id: &str) -> Result<Option<SessionState>, SessionStoreError> {
        match self.kept(id).await? {
            Some(kept) if kept.who != who() => {
                tracing::warn!(session = %short(id), "somebody asked for a session that is another principal's");
                Ok(None)
            }
            kept => Ok(kept.map(|kept| kept.state)),
        }
    }

    async fn store(&self, id: &str, state: &SessionState) -> Result<(), SessionStoreError> {
        let value = Bytes::from(serde_json::to_vec(&Kept { state: state.clone(), who: who() })?);
        // rmcp serves the session all the same, and would say so with its id.
        if let Err(error) = self.table.put(Bucket::Sessions, id, value, Expect::Any, Some(self.ttl)).await {
            tracing::warn!(session = %short(id), %error, "cannot keep a session's row: the session ends with this process");
        }
        Ok(())
    }

    async fn delete(&self, id: &str) -> Result<(), SessionStoreError> {
        self.table.remove(Bucket::Sessions, id, Expect::Any).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{Error, Result, Row, Watch};

    /// A table that nobody asks.
    struct Away;

    #[async_trait]
    impl Table for Away {
        async fn get(&self, _: Bucket, _: &str) -> Result<Option<Row>> {
            Err(Error::Closed)
        }

        async fn put(&self, _: Bucket, _: &str, _: Bytes, _: Expect, _: Option<Duration>) -> Result<u64> {
            Err(Error::Closed)
        }

        async fn remove(&self, _: Bucket, _: &str, _: Expect) -> Result<bool> {
            Err(Error::Closed)
        }

        async fn list(&self, _: Bucket) -> Result<Vec<Row>> {
            Err(Error::Closed)
        }

        async fn watch(&self, _: Bucket) -> Result<Box<dyn Watch>> {
            Err(Error::Closed)
        }

        async fn next(&self, _: Bucket, _: &str, _: u64, _: u64) -> Result<u64> {
            Err(Error::Closed)
        }
    }

    fn sessions() -> Arc<Sessions> {
        Arc::new(Sessions::new(Arc::new(Away), &config::Http::default()))
    }

    #[tokio::test(start_paused = true)]
    async fn what_rmcp_has_and_nobody_knows_is_closed_in_the_end() {
        let sessions = sessions();
        let (stranger, _worker) = sessions.manager.create_session().await.unwrap();
        let (known, _other) = sessions.manager.create_session().await.unwrap();
        drop(sessions.join(&known, false, None));
        let end = CancellationToken::new();
        let look = async {
            tokio::time::sleep(STRANGER_MAX / 2).await;
            let at_first = sessions.serves(&stranger).await;
            tokio::time::sleep(STRANGER_MAX + 2 * ROUND_MAX).await;
            end.cancel();
            (at_first, sessions.serves(&stranger).await, sessions.serves(&known).await)
        };
        let ((), looked) = tokio::join!(sessions.clone().keep(end.clone()), look);
        assert_eq!(looked, (true, false, true));
        assert!(sessions.turns().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_that_is_taken_up_while_it_ends_goes_on() {
        let sessions = sessions();
        let (id, _worker) = sessions.manager.create_session().await.unwrap();
        drop(sessions.join(&id, false, None));
        sessions.known().by_id.clear();
        let Ok(Entry::TakeUp(turn)) = sessions.enter(&id, None).await else { panic!("it is put away") };
        let taken_up = async {
            tokio::task::yield_now().await;
            let open = sessions.join(&id, true, None);
            drop(turn);
            open
        };
        let (_open, ()) = tokio::join!(taken_up, sessions.end(&id));
        assert!(sessions.serves(&id).await && sessions.turns().is_empty());
        sessions.forget(&id);
        sessions.end(&id).await;
        assert!(!sessions.serves(&id).await);
    }

    #[tokio::test(start_paused = true)]
    async fn one_at_a_time_takes_a_session_up_and_nothing_is_left_of_the_turns() {
        let sessions = sessions();
        let Ok(Entry::TakeUp(first)) = sessions.enter("a", None).await else { panic!("it is free") };
        assert!(matches!(sessions.enter("b", None).await, Ok(Entry::TakeUp(_))), "another session is another matter");
        let (late, given_up) = tokio::join!(sessions.enter("a", None), timeout(OPEN_MAX / 2, sessions.enter("a", None)));
        assert!(late.is_err() && given_up.is_err(), "each has waited for as long as it would");
        let second = async {
            let entered = sessions.enter("a", None).await;
            assert!(matches!(entered, Ok(Entry::TakeUp(_))));
        };
        tokio::join!(second, async { drop(first) });
        assert!(sessions.turns().is_empty());
        assert!(sessions.enter(&"x".repeat(ID_MAX + 1), None).await.is_err());
    }
}
