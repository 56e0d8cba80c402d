//! The rows of `Keys`, which are on both sides. Most of them are idempotency keys, and name a work.
//!
//! A key is bound here first and then on the server. The row here decides among the processes of this folder, whichever of them can
//! reach the server: who has not bound the key here, or taken it over here, pushes nothing under it. Whose row is bound on the server
//! as well pushes there and nowhere else; who bound it while the server was away says in the row that its work lives here, before it
//! pushes it here, and from then on nobody pushes it elsewhere.

use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::{HOMES_MAX, Home, Mesh, Noted};
use crate::model::id::WorkId;
use crate::model::keyed::{claimed, done, is_done, lives_here, work_of};
use crate::model::time::Timestamp;
use crate::telemetry::now;
use crate::transport::{Bucket, Error, Expect, Filter, Position, Result, Row, Transport};

/// The names of the keys that were used while the server was away, until that has them.
const APART: &str = "mesh.apart";
/// How often it is tried to put such a key there, because somebody else used it at the same time.
const UNITE_TRIES_MAX: u32 = 16;

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
    pub(super) async fn bind(&self, id: WorkId, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64> {
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
    pub(super) async fn take_over(&self, id: WorkId, key: &str, value: Bytes, found: u64, ttl: Option<Duration>) -> Result<u64> {
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
    pub(super) async fn note_done(&self, id: WorkId, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64> {
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
    pub(super) async fn put_plain(&self, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> Result<u64> {
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
    pub(super) async fn free(&self, key: &str, expect: Expect) -> Result<bool> {
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
    pub(super) async fn keyed(&self, key: &str) -> Result<Option<Row>> {
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
        // Whoever has said that it lives here may not have come to push it, nor to say so in its row.
        if !self.has(id).await? {
            return Ok(false);
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

/// Whether the work of a server's row has been given out.
async fn stands(far: &Transport, value: &[u8]) -> Result<bool> {
    if is_done(value) {
        return Ok(true);
    }
    let Some(id) = work_of(value) else { return Ok(true) };
    Ok(!far.log.read(Filter::Work(id), Position::default(), 1).await?.is_empty())
}

#[cfg(test)]
mod tests;
