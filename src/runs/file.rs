//! The file of the run store, `runs.db`: how it is opened and brought up to date, and the threads that use it.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::{Error, Result, Runs, waits};
use crate::transport::{Log, local};

/// How long another process may keep the file to itself.
const BUSY_MAX: Duration = Duration::from_secs(10);
const CALLS_MAX: usize = 1024;

/// A run store that is being opened while something else is done.
pub struct Opening(std::thread::JoinHandle<Result<(Connection, Connection)>>);

impl Opening {
    /// Begins to open `runs.db` in a folder; both are made if they are missing.
    pub fn begin(dir: &Path) -> Self {
        let dir = dir.to_owned();
        Self(std::thread::spawn(move || {
            let file = dir.join("runs.db");
            DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|error| {
                Error::Store(format!("the folder {} can't be made: {error}; choose another data folder", dir.display()).into())
            })?;
            let (writer, version) = connect(&file).map_err(|error| refused(&file, &error))?;
            if let Err(text) = version {
                return Err(Error::Store(format!("{}: {text}", file.display()).into()));
            }
            let reader = connect(&file).map_err(|error| refused(&file, &error))?.0;
            Ok((reader, writer))
        }))
    }

    /// The store, as the fold of this log.
    ///
    /// # Errors
    /// `Store`, with the file's name and what to do.
    pub fn finish(self, log: Arc<dyn Log>) -> Result<Runs> {
        let (reader, writer) = self.0.join().map_err(|_| Error::Closed)??;
        Ok(Runs {
            reader: Thread::start("runs-read", reader)?,
            writer: Thread::start("runs-write", writer)?,
            log,
            state: Arc::default(),
            stirred: Arc::default(),
        })
    }
}

/// Opens a connection and brings the schema up to date; the inner error is a version that is newer than ours.
pub(super) fn connect(file: &Path) -> rusqlite::Result<(Connection, std::result::Result<(), String>)> {
    let mut db = Connection::open(file)?;
    db.busy_timeout(BUSY_MAX)?;
    let version: i64 = db.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if version > VERSION {
        return Ok((db, Err(format!("the run store has version {version}, and this program knows up to {VERSION}: update lattice-mcp"))));
    }
    local::write_ahead(&db)?;
    db.pragma_update(None, "synchronous", "NORMAL")?;
    db.pragma_update(None, "cache_size", -2048)?;
    db.pragma_update(None, "wal_autocheckpoint", 4000)?;
    if version < VERSION {
        let tx = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        // Another process may have been first.
        let version = tx.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))?;
        if version == 0 {
            tx.execute_batch(SCHEMA)?;
        }
        if version < VERSION {
            let known = usize::try_from(version.max(1) - 1).unwrap_or(0);
            ADDED.iter().skip(known).try_for_each(|added| tx.execute_batch(added))?;
            tx.pragma_update(None, "user_version", VERSION)?;
        }
        tx.commit()?;
    }
    Ok((db, Ok(())))
}

fn refused(file: &Path, error: &rusqlite::Error) -> Error {
    Error::Store(
        format!("{}: {error}; the run store can be rebuilt from the log: move this file away and start again", file.display()).into(),
    )
}

type Call = Box<dyn FnOnce(&mut Connection) + Send>;

/// A connection on a thread of its own.
#[derive(Clone)]
pub(super) struct Thread(mpsc::Sender<Call>);

impl Thread {
    fn start(name: &str, mut db: Connection) -> Result<Self> {
        let (sender, mut calls) = mpsc::channel::<Call>(CALLS_MAX);
        let run = move || {
            db.set_prepared_statement_cache_capacity(64);
            while let Some(call) = calls.blocking_recv() {
                call(&mut db);
            }
        };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(run)
            .map_err(|error| Error::Store(format!("no thread for the run store: {error}").into()))?;
        Ok(Self(sender))
    }

    pub(super) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let call: Call = Box::new(move |db| {
            let _ = reply.send(work(db));
        });
        self.0.send(call).await.map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)?.map_err(|error| Error::Store(format!("the run store refuses: {error}").into()))
    }
}

pub(super) const VERSION: i64 = 1 + ADDED.len() as i64;

pub(super) const SCHEMA: &str = "
    CREATE TABLE runs (
        local INTEGER PRIMARY KEY,
        work BLOB NOT NULL,
        run TEXT NOT NULL,
        parent TEXT,
        root TEXT NOT NULL,
        origin TEXT NOT NULL,
        target TEXT NOT NULL,
        trace TEXT NOT NULL,
        agent TEXT NOT NULL,
        task TEXT NOT NULL,
        status TEXT NOT NULL,
        event TEXT NOT NULL,
        assigned_at INTEGER NOT NULL,
        accepted_at INTEGER,
        settled_at INTEGER,
        attempt INTEGER NOT NULL,
        duration_ms INTEGER,
        outcome TEXT,
        dead INTEGER NOT NULL,
        seen INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX runs_work ON runs (work);
    CREATE INDEX runs_run ON runs (run);
    CREATE INDEX runs_parent ON runs (parent);
    CREATE INDEX runs_root ON runs (root, local);
    CREATE INDEX runs_open ON runs (local) WHERE settled_at IS NULL;
    CREATE INDEX runs_settled ON runs (settled_at) WHERE settled_at IS NOT NULL;
    CREATE INDEX runs_dead ON runs (local) WHERE dead = 1;
    CREATE TABLE folded (one INTEGER PRIMARY KEY CHECK (one = 1), upto INTEGER NOT NULL);
    INSERT INTO folded VALUES (1, 0);
";

/// What the second version has besides: whose works are whose, and up to where each owner has been told what settled.
const OWNERS: &str = "
    ALTER TABLE runs ADD COLUMN owner TEXT;
    ALTER TABLE runs ADD COLUMN label TEXT NOT NULL DEFAULT '';
    ALTER TABLE runs ADD COLUMN settled_no INTEGER;
    UPDATE runs SET label = CASE
        WHEN status LIKE '%Pending%' THEN 'PENDING' WHEN status LIKE '%Accepted%' THEN 'ACCEPTED'
        WHEN status LIKE '%Escalated%' THEN 'ESCALATED' ELSE upper(trim(status, '\"')) END;
    CREATE INDEX runs_owner_open ON runs (owner, label, local) WHERE settled_at IS NULL;
    CREATE INDEX runs_owner_settled ON runs (owner, settled_no) WHERE settled_no IS NOT NULL;
    CREATE TABLE looks (owner TEXT PRIMARY KEY, upto INTEGER NOT NULL) WITHOUT ROWID;
";
/// What each later version adds; the first of them leads from version 1 to 2.
const ADDED: [&str; 7] = [
    OWNERS,
    "ALTER TABLE runs ADD COLUMN checks TEXT",
    "ALTER TABLE runs ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE runs ADD COLUMN cost REAL NOT NULL DEFAULT 0;
     ALTER TABLE runs ADD COLUMN turns INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE runs ADD COLUMN budget TEXT",
    waits::SCHEMA,
    "ALTER TABLE runs ADD COLUMN principal TEXT",
    APART,
    MARKED,
];
/// Which entry of the server's log was the last that was folded: a server may lose its store, and count anew.
const MARKED: &str = "
    ALTER TABLE folded ADD COLUMN marked INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE folded ADD COLUMN mark TEXT;
";
/// A number for each log, where one stood for both: the server's above the lower 28 bits and a mark, or this machine's without it.
/// What was folded on such a number may have left out the one log for the other: all is folded again. `upto` and `seen` stay for
/// an earlier version that still runs.
const APART: &str = "
    ALTER TABLE folded ADD COLUMN seq INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE folded ADD COLUMN far INTEGER NOT NULL DEFAULT 0;
    UPDATE folded SET seq = upto WHERE upto < 1 << 62;
    ALTER TABLE runs ADD COLUMN seen_seq INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN seen_far INTEGER NOT NULL DEFAULT 0;
    UPDATE runs SET seen_seq = seen WHERE seen < 1 << 62;
    UPDATE runs SET seen_seq = seen & ((1 << 28) - 1), seen_far = (seen - (1 << 62)) >> 28 WHERE seen >= 1 << 62;
";
