//! The rows of both sides: sessions are this machine's, keys are on both, the others are the server's.
//!
//! A key is bound here first and then on the server. The row here decides among the processes of this folder, whichever of them can
//! reach the server: who has not bound the key here, or taken it over here, pushes nothing under it. Whose row is bound on the server
//! as well pushes there and nowhere else; who bound it while the server was away says in the row that its work lives here, before it
//! pushes it here, and from then on nobody pushes it elsewhere.

use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{CHILDREN_APART, Far, HOMES_MAX, Home, Mesh, Noted};
use crate::model::id::WorkId;
use crate::model::time::Timestamp;
use crate::telemetry::now;
use crate::transport::{Bucket, Change, Error, Expect, Filter, Position, Result, Row, SEAL, Table, Transport, Watch};

/// The names of the keys that were used while the server was away, until that has them.
const APART: &str = "mesh.apart";
/// How often it is tried to put such a key there, because somebody else used it at the same time.
const UNITE_TRIES_MAX: u32 = 16;

#[async_trait]
impl Table for Mesh {
    async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<Row>> {
        match bucket {
            Bucket::Sessions => self.local.table.get(bucket, key).await,
            Bucket::Keys => self.keyed(key).await,
            _ => self.far()?.table.get(bucket, key).await,
        }
    }

    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64> {
        match bucket {
            Bucket::Sessions => self.local.table.put(bucket, key, value, expect, ttl).await,
            Bucket::Keys => match (work_of(&value), expect) {
                (Some(id), Expect::Absent) => self.bind(id, key, value, ttl).await,
                (Some(id), Expect::Revision(found)) => self.take_over(id, key, value, found, ttl).await,
                (Some(id), Expect::Any) => self.note_done(id, key, value, ttl).await,
                (None, _) => self.put_plain(key, value, expect, ttl).await,
            },
            _ => self.far()?.table.put(bucket, key, value, expect, ttl).await,
        }
    }

    async fn remove(&self, bucket: Bucket, key: &str, expect: Expect) -> Result<bool> {
        match bucket {
            Bucket::Sessions => self.local.table.remove(bucket, key, expect).await,
            Bucket::Keys => self.free(key, expect).await,
            _ => self.far()?.table.remove(bucket, key, expect).await,
        }
    }

    async fn list(&self, bucket: Bucket) -> Result<Vec<Row>> {
        match bucket {
            Bucket::Sessions => self.local.table.list(bucket).await,
            _ => self.far()?.table.list(bucket).await,
        }
    }

    async fn list_of(&self, bucket: Bucket, head: &str) -> Result<Vec<Row>> {
        match bucket {
            Bucket::Sessions => self.local.table.list_of(bucket, head).await,
            _ => self.far()?.table.list_of(bucket, head).await,
        }
    }

    async fn watch(&self, bucket: Bucket) -> Result<Box<dyn Watch>> {
        match bucket {
            Bucket::Sessions => self.local.table.watch(bucket).await,
            _ => Ok(Box::new(Opening { bucket, opened: self.far.clone(), inner: None })),
        }
    }

    async fn next(&self, bucket: Bucket, key: &str, floor: u64, count: u64) -> Result<u64> {
        let far = match self.far() {
            Ok(far) => far.table.next(bucket, key, floor, count).await,
            Err(away) => Err(away),
        };
        match far {
            Err(Error::Unreachable(_)) => {
                // Each process counts in a range of its own: no other can have the same number.
                let apart = CHILDREN_APART + (u64::from_be_bytes(self.instance.low_bytes()) & 0xf_ffff) * (1 << 24);
                let own = format!("{key}@{}", self.instance);
                self.local.table.next(bucket, &own, floor.max(apart), count).await
            }
            other => other,
        }
    }
}

impl Mesh {
    pub(super) fn noted(&self) -> MutexGuard<'_, HashMap<WorkId, Noted>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, id: WorkId, noted: Noted) {
        let mut all = self.noted();
        if all.len() >= HOMES_MAX {
            all.clear();
        }
        all.insert(id, noted);
    }

    /// Binds a key to a work of this process: first here, which decides among the processes of this folder, be the server there for all
    /// of them or not; then on the server.
    async fn bind(&self, id: WorkId, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64> {
        let revision = self.local.table.put(Bucket::Keys, key, value.clone(), Expect::Absent, ttl).await?;
        let far = match self.far() {
            Ok(far) => far.table.put(Bucket::Keys, key, value.clone(), Expect::Absent, ttl).await,
            Err(away) => Err(away),
        };
        let home = match far {
            Ok(far) => Home::There(far),
            Err(Error::Unreachable(_)) => Home::Here,
            Err(error) => {
                // The work is nowhere, whatever has become of the server's row. Who has taken the order over meanwhile keeps the key.
                if let Err(error) = self.local.table.remove(Bucket::Keys, key, Expect::Revision(revision)).await {
                    tracing::debug!(%error, "a key that could not be bound on the server stays bound here");
                }
                return Err(error);
            }
        };
        let given = here(revision);
        self.note(id, Noted { key: key.to_owned(), value, ttl, revision, given, home });
        Ok(given)
    }

    /// Takes an order over from whoever bound its key: first here, so that from then on nobody of this folder gives it a home here,
    /// unless somebody has said before that this is where it lives. The server's row follows, so that whoever bound it there does not
    /// free it any more.
    async fn take_over(&self, id: WorkId, key: &str, value: Bytes, found: u64, ttl: Option<Duration>) -> Result<u64> {
        let changed = || Error::Conflict { bucket: Bucket::Keys.name(), key: key.to_owned() };
        let local = &self.local.table;
        let row = local.get(Bucket::Keys, key).await?;
        let same = row.as_ref().filter(|row| work_of(&row.value) == Some(id));
        if is_of_here(found) && same.is_none_or(|row| here(row.revision) != found) || !is_of_here(found) && same.is_some() {
            return Err(changed());
        }
        let is_bound_here = match &row {
            Some(row) => self.is_bound_here(&row.value).await?,
            None => false,
        };
        let expect = row.as_ref().map_or(Expect::Absent, |row| Expect::Revision(row.revision));
        let note = |revision, home| {
            let given = here(revision);
            self.note(id, Noted { key: key.to_owned(), value: value.clone(), ttl, revision, given, home });
            given
        };
        if is_bound_here && same.is_some() {
            let revision = local.put(Bucket::Keys, key, claimed(&value), expect, ttl).await?;
            return Ok(note(revision, Home::Here));
        }
        if is_bound_here {
            return Err(Error::Unreachable("another process of this station gives an order with this key out; ask again".into()));
        }
        let far = self.far()?;
        let there = match far.table.get(Bucket::Keys, key).await? {
            None if same.is_some() => Expect::Absent,
            Some(row) if same.is_some() && work_of(&row.value) == Some(id) => Expect::Revision(row.revision),
            Some(row) if same.is_none() && row.revision == found => Expect::Revision(found),
            _ => return Err(changed()),
        };
        let revision = local.put(Bucket::Keys, key, value.clone(), expect, ttl).await?;
        let far = far.table.put(Bucket::Keys, key, value.clone(), there, ttl).await?;
        Ok(note(revision, Home::There(far)))
    }

    /// Notes in the row where its work lives that it has been given out.
    async fn note_done(&self, id: WorkId, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64> {
        self.noted().remove(&id);
        if !self.is_local(id).await? {
            return self.far()?.table.put(Bucket::Keys, key, value, Expect::Any, ttl).await;
        }
        match self.local.table.get(Bucket::Keys, key).await? {
            Some(row) if work_of(&row.value) == Some(id) => {
                let expect = Expect::Revision(row.revision);
                self.local.table.put(Bucket::Keys, key, claimed(&value), expect, ttl).await.map(here)
            }
            _ => Err(Error::Conflict { bucket: Bucket::Keys.name(), key: key.to_owned() }),
        }
    }

    /// Writes a row that names no work: to the server, or, if that is away or has it not, here.
    async fn put_plain(&self, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64> {
        let local = &self.local.table;
        let is_here = match expect {
            Expect::Absent => false,
            Expect::Any => local.get(Bucket::Keys, key).await?.is_some(),
            Expect::Revision(found) => is_of_here(found),
        };
        if is_here {
            return local.put(Bucket::Keys, key, value, there(expect), ttl).await.map(here);
        }
        let put = match self.far() {
            Ok(far) => far.table.put(Bucket::Keys, key, value.clone(), expect, ttl).await,
            Err(away) => Err(away),
        };
        match put {
            // What is known by a revision is the server's, and stays so.
            Err(Error::Unreachable(_)) if !matches!(expect, Expect::Revision(_)) => {
                local.put(Bucket::Keys, key, value, expect, ttl).await.map(here)
            }
            other => other,
        }
    }

    /// Removes a row. A key of which nothing was given out is freed on the server first: then whoever finds it here alone goes on with
    /// its order, and nobody makes a second one.
    async fn free(&self, key: &str, expect: Expect) -> Result<bool> {
        let row = match (self.local.table.get(Bucket::Keys, key).await?, expect) {
            (_, Expect::Revision(found)) if !is_of_here(found) => return self.far()?.table.remove(Bucket::Keys, key, expect).await,
            (None, Expect::Revision(_)) => return Ok(false),
            (None, _) => return self.far()?.table.remove(Bucket::Keys, key, expect).await,
            (Some(row), _) => row,
        };
        let id = work_of(&row.value);
        let noted = id.and_then(|id| self.noted().get(&id).cloned()).filter(|noted| noted.revision == row.revision);
        if let Expect::Revision(found) = expect
            && found != here(row.revision)
            && noted.as_ref().is_none_or(|noted| noted.given != found)
        {
            return Err(Error::Conflict { bucket: Bucket::Keys.name(), key: key.to_owned() });
        }
        if let Some(Home::There(far)) = noted.map(|noted| noted.home) {
            match self.far()?.table.remove(Bucket::Keys, key, Expect::Revision(far)).await {
                // Somebody elsewhere goes on with the order.
                Err(error @ Error::Conflict { .. }) => return Err(error),
                Err(error) => tracing::debug!(%error, "a key that is free here cannot be freed on the server now"),
                Ok(_) => {}
            }
        }
        if let Some(id) = id {
            self.noted().remove(&id);
        }
        self.local.table.remove(Bucket::Keys, key, Expect::Revision(row.revision)).await
    }

    /// Says in the row of a work's key that the work lives here, unless another process has taken the order over.
    pub(super) async fn claim(&self, id: WorkId, noted: Noted) -> Result<()> {
        let Noted { key, value, ttl, revision, .. } = &noted;
        let until = ttl.map(|ttl| now().after(ttl).as_millis().to_string()).unwrap_or_default();
        self.local.table.put(Bucket::Keys, &format!("{APART}.{key}"), Bytes::from(until), Expect::Any, *ttl).await?;
        match self.local.table.put(Bucket::Keys, key, claimed(value), Expect::Revision(*revision), *ttl).await {
            Ok(revision) => {
                self.note(id, Noted { revision, ..noted });
                Ok(())
            }
            Err(Error::Conflict { .. }) => {
                let row = self.local.table.get(Bucket::Keys, key).await?;
                if row.is_some_and(|row| work_of(&row.value) == Some(id) && lives_here(&row.value)) {
                    return Ok(());
                }
                Err(Error::Unreachable("another process of this station gives this order out; ask again".into()))
            }
            Err(error) => Err(error),
        }
    }

    /// A row of `Keys`. Of one that names a work both sides may have a word: whose work is here, or is about to be, is believed here
    /// unless the server's has been given out as well; otherwise the server's word counts, if it has one.
    async fn keyed(&self, key: &str) -> Result<Option<Row>> {
        let known = self.local.table.get(Bucket::Keys, key).await?.map(|row| Row { revision: here(row.revision), ..row });
        let is_bound_here = match &known {
            // It is where it was noted.
            Some(row) if work_of(&row.value).is_none() => return Ok(known),
            Some(row) => self.is_bound_here(&row.value).await?,
            None => false,
        };
        let far = self.far();
        let there = match &far {
            Ok(far) => far.table.get(Bucket::Keys, key).await,
            Err(away) => Err(away.clone()),
        };
        let there = match there {
            Err(Error::Unreachable(_)) => None,
            Err(Error::Unanswered(_)) if is_bound_here => None,
            there => there?,
        };
        let (Some(row), Some(there), Ok(far)) = (&known, &there, &far) else { return Ok(known.or(there)) };
        if work_of(&row.value) == work_of(&there.value) {
            let value = if is_done(&there.value) { there.value.clone() } else { row.value.clone() };
            return Ok(known.map(|row| Row { value, ..row }));
        }
        if !is_bound_here {
            return Ok(Some(there.clone()));
        }
        match stands(far, &there.value).await {
            Ok(true) => Ok(Some(there.clone())),
            // What is here goes on without the server.
            Ok(false) | Err(Error::Unreachable(_) | Error::Unanswered(_)) => Ok(known),
            Err(error) => Err(error),
        }
    }

    /// Whether a row names a work that lives here, or is about to. That is looked up each time: another process may be pushing it.
    async fn is_bound_here(&self, value: &[u8]) -> Result<bool> {
        match work_of(value) {
            Some(_) if lives_here(value) => Ok(true),
            Some(id) => self.has(id).await,
            None => Ok(false),
        }
    }

    /// Whether this machine's store has a work.
    async fn has(&self, id: WorkId) -> Result<bool> {
        Ok(!self.local.log.read(Filter::Work(id), Position::default(), 1).await?.is_empty())
    }

    /// Lets everybody find by their keys what was ordered while the server was away.
    pub(super) async fn unite_keys(&self, far: &Transport) -> Result<()> {
        for apart in self.local.table.list_of(Bucket::Keys, APART).await? {
            let key = apart.key.get(APART.len() + 1..).unwrap_or_default();
            let until = std::str::from_utf8(&apart.value).ok().and_then(|text| text.parse().ok()).map(Timestamp::from_millis);
            match self.unite(far, key, until).await {
                Ok(true) => match self.local.table.remove(Bucket::Keys, &apart.key, Expect::Revision(apart.revision)).await {
                    Ok(_) | Err(Error::Conflict { .. }) => {}
                    Err(error) => return Err(error),
                },
                // Its work is about to be pushed.
                Ok(false) => {}
                Err(error @ (Error::Unreachable(_) | Error::Unanswered(_))) => return Err(error),
                Err(error) => tracing::debug!(%error, "an idempotency key of this machine cannot be told to the lattice"),
            }
        }
        Ok(())
    }

    /// Puts a key on the server that was used here while that was away. If it has led to another work there by then, it leads to that
    /// one for everybody; both works go on. False if nothing can be said of it yet.
    async fn unite(&self, far: &Transport, key: &str, until: Option<Timestamp>) -> Result<bool> {
        let Some(row) = self.local.table.get(Bucket::Keys, key).await? else { return Ok(true) };
        let Some(id) = work_of(&row.value) else { return Ok(true) };
        if !self.has(id).await? {
            return Ok(!lives_here(&row.value));
        }
        let ttl = until.map(|until| until.since(now()));
        let value = done(&row.value);
        for _ in 0..UNITE_TRIES_MAX {
            let there = far.table.get(Bucket::Keys, key).await?;
            let expect = match &there {
                None => Expect::Absent,
                Some(there) if work_of(&there.value) == Some(id) => return Ok(true),
                Some(there) if stands(far, &there.value).await? => {
                    let work = work_of(&there.value).map(|work| work.to_string()).unwrap_or_default();
                    tracing::warn!(work_id = %id, "an idempotency key was used here and elsewhere while the server was away: it leads to work {work} now");
                    return match self.local.table.put(Bucket::Keys, key, there.value.clone(), Expect::Revision(row.revision), ttl).await {
                        Ok(_) => Ok(true),
                        Err(Error::Conflict { .. }) => Ok(false),
                        Err(error) => Err(error),
                    };
                }
                // It was bound there and came to nothing.
                Some(there) => Expect::Revision(there.revision),
            };
            match far.table.put(Bucket::Keys, key, value.clone(), expect, ttl).await {
                Ok(_) => return Ok(true),
                Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Brings the lattice's seal together: the server's is everybody's, and what was used here while that was away stands beside it, so
    /// that everybody can open what was sealed with it.
    pub(super) async fn unite_seal(&self, far: &Transport) -> Result<()> {
        match self.tell_seal(far).await {
            Err(error @ (Error::Unreachable(_) | Error::Unanswered(_))) => Err(error),
            Err(error) => {
                tracing::debug!(%error, "what seals here cannot be told to the lattice");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    async fn tell_seal(&self, far: &Transport) -> Result<()> {
        let Some(row) = self.local.table.get(Bucket::Keys, SEAL).await? else { return Ok(()) };
        match far.table.put(Bucket::Keys, SEAL, row.value.clone(), Expect::Absent, None).await {
            Err(Error::Conflict { .. }) => {}
            told => return told.map(|_| ()),
        }
        let Some(there) = far.table.get(Bucket::Keys, SEAL).await? else { return Ok(()) };
        if there.value == row.value {
            return Ok(());
        }
        let beside = format!("{SEAL}.{}", hex(&Sha256::digest(&row.value)));
        far.table.put(Bucket::Keys, &beside, row.value, Expect::Any, None).await?;
        match self.local.table.put(Bucket::Keys, SEAL, there.value, Expect::Revision(row.revision), None).await {
            // Another process of this folder was first.
            Ok(_) | Err(Error::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Marks the revision of a row of this machine's: the two sides count apart.
const OF_HERE: u64 = 1 << 62;

const fn here(revision: u64) -> u64 {
    revision | OF_HERE
}

const fn is_of_here(revision: u64) -> bool {
    revision & OF_HERE != 0
}

/// What this machine's own table is to expect.
const fn there(expect: Expect) -> Expect {
    match expect {
        Expect::Revision(revision) => Expect::Revision(revision & !OF_HERE),
        other => other,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether the work of a server's row has been given out.
async fn stands(far: &Transport, value: &[u8]) -> Result<bool> {
    if is_done(value) {
        return Ok(true);
    }
    let Some(id) = work_of(value) else { return Ok(true) };
    Ok(!far.log.read(Filter::Work(id), Position::default(), 1).await?.is_empty())
}

/// The work that a row names.
fn work_of(value: &[u8]) -> Option<WorkId> {
    #[derive(serde::Deserialize)]
    struct Named {
        work_id: WorkId,
    }
    serde_json::from_slice(value).ok().map(|named: Named| named.work_id)
}

/// The mark of a row whose work lives in this machine's store.
const HERE: &str = "here";
/// The mark of a row whose work has been given out.
const DONE: &str = "done";

fn is_marked(value: &[u8], mark: &str) -> bool {
    serde_json::from_slice::<Value>(value).is_ok_and(|row| row[mark] == true)
}

/// Whether a row says that its work lives here.
fn lives_here(value: &[u8]) -> bool {
    is_marked(value, HERE)
}

fn is_done(value: &[u8]) -> bool {
    is_marked(value, DONE)
}

/// The same row, which says that its work lives here.
fn claimed(value: &Bytes) -> Bytes {
    changed(value, |row| _ = row.insert(HERE.to_owned(), true.into()))
}

/// The same row as everybody may read it, which says that its work has been given out.
fn done(value: &Bytes) -> Bytes {
    changed(value, |row| {
        row.remove(HERE);
        row.insert(DONE.to_owned(), true.into());
    })
}

fn changed(value: &Bytes, change: impl FnOnce(&mut Map<String, Value>)) -> Bytes {
    match serde_json::from_slice::<Value>(value) {
        Ok(Value::Object(mut row)) => {
            change(&mut row);
            Bytes::from(Value::Object(row).to_string())
        }
        _ => value.clone(),
    }
}

/// A watch that begins when the server has been reached.
struct Opening {
    bucket: Bucket,
    opened: Far,
    inner: Option<Box<dyn Watch>>,
}

#[async_trait]
impl Watch for Opening {
    async fn next(&mut self) -> Result<Vec<Change>> {
        loop {
            if let Some(inner) = &mut self.inner {
                return inner.next().await;
            }
            let far = self.opened.borrow_and_update().clone();
            match far {
                Some(far) => self.inner = Some(far.table.watch(self.bucket).await?),
                None => self.opened.changed().await.map_err(|_| Error::Closed)?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;
    use tokio_util::sync::CancellationToken;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::config::Config;
    use crate::model::turn::Turn;
    use crate::telemetry::{new_instance, new_work_id, now};
    use crate::transport::mesh::{Place, compose};
    use crate::transport::{Item, Pushed, Reach, Record, Subject, Transport, local};

    /// Two processes of a station, with one store between them: the server is away for the first one only.
    struct Folder {
        near: local::Local,
        far: local::Local,
        cut_off: Transport,
        connected: Transport,
        server: watch::Sender<Option<Transport>>,
        _dirs: [tempfile::TempDir; 2],
    }

    fn here_station() -> crate::model::id::StationId {
        "here".parse().unwrap()
    }

    fn process(near: &local::Local, far: watch::Receiver<Option<Transport>>, forwards: bool) -> Transport {
        let place = Place { station: here_station(), instance: new_instance(), forwards };
        compose(near.transport(), far, watch::channel(Reach::Connected).1, place, TaskTracker::new(), CancellationToken::new())
    }

    impl Folder {
        fn new() -> Self {
            let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
            let settings = Config::default().lattice.storage;
            let [near, far] = dirs.each_ref().map(|dir| local::open(dir.path(), &settings).unwrap());
            let (server, opened) = watch::channel(None);
            let cut_off = process(&near, opened, false);
            let connected = process(&near, watch::channel(Some(far.transport())).1, false);
            Self { near, far, cut_off, connected, server, _dirs: dirs }
        }

        /// Another process, which forwards, of the same folder.
        fn forwarding(&self) -> Transport {
            process(&self.near, watch::channel(Some(self.far.transport())).1, true)
        }

        async fn homes(&self, id: WorkId) -> (bool, bool) {
            let has = async |store: &Transport| !store.log.read(Filter::Work(id), Position::default(), 9).await.unwrap().is_empty();
            (has(&self.near.transport()).await, has(&self.far.transport()).await)
        }

        /// Waits until a row of the server's, or of this machine's, names a work.
        async fn names(&self, side: &local::Local, key: &str, id: WorkId) -> Row {
            let mut watch = side.transport().table.watch(Bucket::Keys).await.unwrap();
            let found = async {
                loop {
                    for change in watch.next().await.unwrap() {
                        if let Change::Put(row) = change
                            && row.key == key
                            && work_of(&row.value) == Some(id)
                        {
                            return row;
                        }
                    }
                }
            };
            tokio::time::timeout(Duration::from_secs(20), found).await.expect("the row comes to name the work")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            self.near.close();
            self.far.close();
        }
    }

    fn row(id: WorkId) -> Bytes {
        Bytes::from(serde_json::json!({ "work_id": id, "done": false }).to_string())
    }

    async fn bind(process: &Transport, key: &str) -> Result<(WorkId, u64)> {
        let id = new_work_id();
        process.table.put(Bucket::Keys, key, row(id), Expect::Absent, None).await.map(|revision| (id, revision))
    }

    async fn bound(process: &Transport, key: &str) -> Option<WorkId> {
        process.table.get(Bucket::Keys, key).await.unwrap().and_then(|row| work_of(&row.value))
    }

    async fn take_over(process: &Transport, key: &str, id: WorkId) -> Result<u64> {
        let found = process.table.get(Bucket::Keys, key).await.unwrap().expect("it is noted");
        assert_eq!(work_of(&found.value), Some(id));
        process.table.put(Bucket::Keys, key, row(id), Expect::Revision(found.revision), None).await
    }

    async fn push(process: &Transport, id: WorkId) -> Result<Pushed> {
        let turn = Turn::new("me", 0, now(), Duration::from_secs(60));
        let body = Bytes::from_static(b"{}");
        let item =
            Item { id, lane: "a".into(), turn, deadline: now().after(Duration::from_secs(60)), held_back: false, beside: None, body };
        let announce = Record { subject: Subject::Status(id), body: "{}".into() };
        process.queue.push(&here_station(), item, 9, Some(announce)).await
    }

    async fn note_done(process: &Transport, key: &str, id: WorkId) {
        let value = Bytes::from(serde_json::json!({ "work_id": id, "done": true }).to_string());
        process.table.put(Bucket::Keys, key, value, Expect::Any, None).await.unwrap();
    }

    fn is_conflict<T>(result: &Result<T>) -> bool {
        matches!(result, Err(Error::Conflict { .. }))
    }

    #[tokio::test]
    async fn a_key_has_one_work_in_a_folder_though_the_server_is_away_for_one_of_its_processes() {
        let folder = Folder::new();
        let Folder { near, far, cut_off, connected, .. } = &folder;
        // Who reaches the server is first.
        let (id, _) = bind(connected, "first").await.unwrap();
        assert!(is_conflict(&bind(cut_off, "first").await), "two works under one key");
        assert_eq!(bound(cut_off, "first").await, Some(id));
        assert!(matches!(take_over(cut_off, "first", id).await, Err(Error::Unreachable(_))), "it may be on its way to the server");
        assert!(matches!(push(connected, id).await, Ok(Pushed::New)));
        note_done(connected, "first", id).await;
        assert!(is_conflict(&bind(cut_off, "first").await), "nor later");
        // Who does not is.
        let (id, revision) = bind(cut_off, "second").await.unwrap();
        assert!(is_conflict(&bind(connected, "second").await), "two works under one key");
        assert_eq!(bound(connected, "second").await, Some(id));
        // It gives up: the key is free for both.
        assert!(cut_off.table.remove(Bucket::Keys, "second", Expect::Revision(revision)).await.unwrap());
        let (id, revision) = bind(connected, "second").await.unwrap();
        assert_eq!(bound(cut_off, "second").await, Some(id));
        assert!(connected.table.remove(Bucket::Keys, "second", Expect::Revision(revision)).await.unwrap());
        for side in [near, far] {
            assert!(side.transport().table.get(Bucket::Keys, "second").await.unwrap().is_none());
        }
        // Another station was first on the server: the key is that one's, and this machine's row is not in its way.
        let theirs = new_work_id();
        far.transport().table.put(Bucket::Keys, "third", row(theirs), Expect::Absent, None).await.unwrap();
        assert!(is_conflict(&bind(connected, "third").await));
        assert_eq!(bound(connected, "third").await, Some(theirs));
        assert!(near.transport().table.get(Bucket::Keys, "third").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_key_of_a_process_that_died_leads_to_its_order_and_to_no_second_work() {
        let folder = Folder::new();
        let Folder { near, far, cut_off, connected, .. } = &folder;
        // Between the row here and the server's.
        let id = new_work_id();
        near.transport().table.put(Bucket::Keys, "first", row(id), Expect::Absent, None).await.unwrap();
        take_over(connected, "first", id).await.unwrap();
        assert_eq!(work_of(&far.transport().table.get(Bucket::Keys, "first").await.unwrap().unwrap().value), Some(id));
        assert!(matches!(push(connected, id).await, Ok(Pushed::New)));
        // Between both rows and the hook: whoever goes on with it must have the row here first.
        let (id, _) = bind(connected, "second").await.unwrap();
        let again = process(near, watch::channel(Some(far.transport())).1, false);
        take_over(&again, "second", id).await.unwrap();
        assert!(matches!(push(&again, id).await, Ok(Pushed::New)));
        assert!(matches!(push(connected, id).await, Ok(Pushed::Known)), "it was not dead after all");
        // An older program knows the server's row only.
        let id = new_work_id();
        far.transport().table.put(Bucket::Keys, "third", row(id), Expect::Absent, None).await.unwrap();
        take_over(connected, "third", id).await.unwrap();
        assert!(is_conflict(&bind(cut_off, "third").await), "two works under one key");
        // It noted the key while the server was away, and another station has used it since.
        let (_, revision) = bind(cut_off, "fourth").await.unwrap();
        let theirs = new_work_id();
        far.transport().table.put(Bucket::Keys, "fourth", row(theirs), Expect::Absent, None).await.unwrap();
        take_over(connected, "fourth", theirs).await.unwrap();
        assert!(is_conflict(&cut_off.table.remove(Bucket::Keys, "fourth", Expect::Revision(revision)).await));
    }

    #[tokio::test]
    async fn what_the_server_knows_by_its_key_never_gets_a_home_here() {
        let folder = Folder::new();
        let (id, revision) = {
            folder.server.send_replace(Some(folder.far.transport()));
            bind(&folder.cut_off, "k").await.unwrap()
        };
        folder.server.send_replace(None);
        assert!(matches!(push(&folder.cut_off, id).await, Err(Error::Unreachable(_))));
        assert_eq!(folder.homes(id).await, (false, false));
        // Nothing was done: it may be ordered anew, here.
        folder.server.send_replace(Some(folder.far.transport()));
        assert!(folder.cut_off.table.remove(Bucket::Keys, "k", Expect::Revision(revision)).await.unwrap());
        folder.server.send_replace(None);
        let (id, _) = bind(&folder.cut_off, "k").await.unwrap();
        assert!(matches!(push(&folder.cut_off, id).await, Ok(Pushed::New)));
        assert_eq!(folder.homes(id).await, (true, false));
    }

    #[tokio::test]
    async fn keys_that_were_used_on_both_sides_of_an_outage_lead_everybody_to_one_work() {
        let folder = Folder::new();
        let Folder { near, far, cut_off, connected, .. } = &folder;
        let mut here = Vec::new();
        for key in ["alone", "both", "ghost"] {
            let (id, _) = bind(cut_off, key).await.unwrap();
            assert!(matches!(push(cut_off, id).await, Ok(Pushed::New)));
            note_done(cut_off, key, id).await;
            here.push(id);
        }
        // Elsewhere one key leads to a work too, and one to nothing: whoever bound it has died.
        let (theirs, ghost) = (new_work_id(), new_work_id());
        let elsewhere = far.transport();
        elsewhere.table.put(Bucket::Keys, "both", row(theirs), Expect::Absent, None).await.unwrap();
        elsewhere.table.put(Bucket::Keys, "ghost", row(ghost), Expect::Absent, None).await.unwrap();
        push(&elsewhere, theirs).await.unwrap();
        assert_eq!(bound(connected, "ghost").await, Some(here[2]), "what was made here counts, and no second one");

        let _forwarding = folder.forwarding();
        for (key, id) in [("alone", here[0]), ("ghost", here[2])] {
            let told = folder.names(far, key, id).await;
            assert!(is_done(&told.value) && !lives_here(&told.value), "nobody takes it for an order to go on with: {:?}", told.value);
        }
        folder.names(near, "both", theirs).await;
        for process in [cut_off, connected] {
            assert_eq!(bound(process, "both").await, Some(theirs));
        }
        assert_eq!(work_of(&elsewhere.table.get(Bucket::Keys, "both").await.unwrap().unwrap().value), Some(theirs));
        assert_eq!((folder.homes(here[1]).await.0, folder.homes(theirs).await), (true, (false, true)), "both go on");
    }

    #[tokio::test]
    async fn a_seal_that_was_made_while_the_server_was_away_gives_way_to_the_lattices_and_is_kept_beside_it() {
        let folder = Folder::new();
        let (near, far) = (folder.near.transport(), folder.far.transport());
        folder.cut_off.table.put(Bucket::Keys, SEAL, "ours".into(), Expect::Absent, None).await.unwrap();
        far.table.put(Bucket::Keys, SEAL, "theirs".into(), Expect::Absent, None).await.unwrap();
        let mut watch = near.table.watch(Bucket::Keys).await.unwrap();
        let _forwarding = folder.forwarding();
        let is_united = |change: &Change| matches!(change, Change::Put(row) if row.key == SEAL && row.value == "theirs");
        let united = async { while !watch.next().await.unwrap().iter().any(is_united) {} };
        tokio::time::timeout(Duration::from_secs(20), united).await.expect("the seal comes together");
        for process in [&folder.cut_off, &folder.connected, &far] {
            assert_eq!(process.table.get(Bucket::Keys, SEAL).await.unwrap().unwrap().value, "theirs");
        }
        let beside = folder.connected.table.list_of(Bucket::Keys, SEAL).await.unwrap();
        assert_eq!(beside.iter().map(|row| &row.value[..]).collect::<Vec<_>>(), [b"ours"]);
    }

    #[tokio::test]
    async fn a_work_whose_key_was_noted_while_the_server_was_away_gets_one_home() {
        let folder = Folder::new();
        let Folder { cut_off, connected, .. } = &folder;
        // It is taken over before whoever noted it has pushed it.
        let (id, revision) = bind(cut_off, "first").await.unwrap();
        take_over(connected, "first", id).await.unwrap();
        assert!(matches!(push(connected, id).await, Ok(Pushed::New)));
        assert!(matches!(push(cut_off, id).await, Err(Error::Unreachable(_))));
        assert_eq!(folder.homes(id).await, (false, true));
        let forgotten = cut_off.table.remove(Bucket::Keys, "first", Expect::Revision(revision)).await;
        assert!(matches!(forgotten, Err(Error::Conflict { .. })), "the key is not its own any more: {forgotten:?}");

        // And after that.
        let (id, _) = bind(cut_off, "second").await.unwrap();
        assert!(matches!(push(cut_off, id).await, Ok(Pushed::New)));
        take_over(connected, "second", id).await.unwrap();
        assert!(matches!(push(connected, id).await, Ok(Pushed::Known)));
        assert_eq!(folder.homes(id).await, (true, false));
    }
}
