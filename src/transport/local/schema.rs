//! The file: how it is opened, checked and migrated, and what its errors mean. It does not know who uses a connection.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::config::Durability;
use crate::transport::{Error, Result};

/// Marks the file as ours: "LATM".
const APPLICATION_ID: i32 = 0x4c41_544d;
/// How long a connection waits for another process's transaction.
const BUSY_MAX: Duration = Duration::from_secs(30);
/// How soon a switch that was refused meanwhile is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(1);
const PREPARED_MAX: usize = 96;
const CHECKPOINT_PAGES: u32 = 4000;

/// Each step brings a store from its index to the next version; released steps never change.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;

    CREATE TABLE log (
        seq INTEGER PRIMARY KEY, work BLOB, channel INTEGER NOT NULL, at INTEGER NOT NULL, audit TEXT, body BLOB NOT NULL
    );
    CREATE INDEX log_work ON log (work) WHERE work IS NOT NULL;
    CREATE INDEX log_audit ON log (seq) WHERE channel = 2;

    CREATE TABLE hook (
        id INTEGER PRIMARY KEY, station TEXT NOT NULL UNIQUE,
        waiting INTEGER NOT NULL DEFAULT 0, raised INTEGER NOT NULL DEFAULT 0
    );
    CREATE TABLE lane (
        id INTEGER PRIMARY KEY, hook INTEGER NOT NULL, name TEXT NOT NULL,
        waiting INTEGER NOT NULL DEFAULT 0, held INTEGER NOT NULL DEFAULT 0,
        UNIQUE (hook, name)
    );
    CREATE TABLE item (
        id INTEGER PRIMARY KEY, work BLOB NOT NULL, hook INTEGER NOT NULL, lane INTEGER NOT NULL, priority INTEGER NOT NULL,
        state INTEGER NOT NULL, due INTEGER, deadline INTEGER NOT NULL, attempt INTEGER NOT NULL, holder BLOB
    );
    CREATE UNIQUE INDEX item_work ON item (work, hook);
    CREATE INDEX item_ready ON item (lane, priority DESC) WHERE state = 0;
    CREATE INDEX item_due ON item (lane, due) WHERE due IS NOT NULL;
    CREATE INDEX item_deadline ON item (deadline);
    CREATE TABLE body (item INTEGER PRIMARY KEY, body BLOB NOT NULL);

    CREATE TABLE clock (bucket TEXT PRIMARY KEY, revision INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE cell (
        bucket TEXT NOT NULL, key TEXT NOT NULL, revision INTEGER NOT NULL, expires INTEGER, value BLOB NOT NULL,
        PRIMARY KEY (bucket, key)
    ) WITHOUT ROWID;
    CREATE INDEX cell_expires ON cell (expires) WHERE expires IS NOT NULL;
    CREATE TABLE change (
        bucket TEXT NOT NULL, revision INTEGER NOT NULL, at INTEGER NOT NULL, key TEXT NOT NULL, value BLOB,
        PRIMARY KEY (bucket, revision)
    ) WITHOUT ROWID;
    CREATE TABLE number (
        bucket TEXT NOT NULL, key TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (bucket, key)
    ) WITHOUT ROWID;
",
    "
    ALTER TABLE item ADD COLUMN origin TEXT NOT NULL DEFAULT '-';
    ALTER TABLE item ADD COLUMN urgency INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE item ADD COLUMN since INTEGER NOT NULL DEFAULT 0;
    UPDATE item SET urgency = priority;
    DROP INDEX item_ready;
    CREATE INDEX item_line ON item (lane, origin, urgency DESC, id) WHERE state = 0;
    CREATE INDEX item_top ON item (lane, origin, priority) WHERE state = 0;
    ALTER TABLE lane ADD COLUMN paused INTEGER;
    CREATE TABLE served (hook INTEGER NOT NULL, origin TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY (hook, origin)) WITHOUT ROWID;
    CREATE TABLE start (lane INTEGER NOT NULL, second INTEGER NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (lane, second)) WITHOUT ROWID;
",
    "
    ALTER TABLE hook ADD COLUMN held_back INTEGER NOT NULL DEFAULT 0;
    UPDATE item SET state = 4, due = deadline WHERE state = 1 AND attempt = 0 AND due = deadline
        OR state = 0 AND lane IN (SELECT id FROM lane WHERE name = '*map');
    UPDATE hook SET held_back = (SELECT count(*) FROM item WHERE item.hook = hook.id AND item.state = 4);
",
    "
    ALTER TABLE item ADD COLUMN lease INTEGER;
",
];

/// The file of a store, and what its errors mean.
#[derive(Debug, Clone)]
pub(super) struct File {
    path: Arc<Path>,
    max_pages: Option<u32>,
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Write(Durability),
    Read,
}

impl File {
    pub(super) fn new(dir: &Path, max_pages: Option<u32>) -> Self {
        Self { path: dir.join("lattice.db").into(), max_pages }
    }

    /// Opens the file for writing, makes it if it is missing, checks it and brings it to our version.
    pub(super) fn open(&self, durability: Durability) -> Result<Connection> {
        let mut conn = self.connect(OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE, Use::Write(durability))?;
        // Nothing is checkpointed into a file that has not been recognised yet.
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(|e| self.error(&e))?;
        let version = self.version(&conn)?;
        if conn.is_readonly("main").map_err(|e| self.error(&e))? {
            return Err(self.says("can't be written: check the permissions of the file and its folder"));
        }
        self.write_ahead(&conn)?;
        if version < MIGRATIONS.len() {
            self.migrate(&mut conn)?;
        }
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false).map_err(|e| self.error(&e))?;
        Ok(conn)
    }

    /// Opens one more connection that reads; the file must be there and of our version.
    pub(super) fn open_reader(&self) -> Result<Connection> {
        if !self.path.is_file() {
            return Err(self.says("does not exist: there is no store here yet; start a station with this data folder first"));
        }
        let conn = self.connect(OpenFlags::SQLITE_OPEN_READ_WRITE, Use::Read)?;
        match self.version(&conn)? {
            version if version == MIGRATIONS.len() => Ok(conn),
            0 => Err(self.says("holds no store yet: start a station with this data folder first")),
            version => Err(self.says(&format!(
                "is a store of version {version}, this program needs version {}: start a station of this version with it first",
                MIGRATIONS.len()
            ))),
        }
    }

    fn connect(&self, flags: OpenFlags, purpose: Use) -> Result<Connection> {
        let flags = flags | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut conn = Connection::open_with_flags(&self.path, flags).map_err(|e| self.error(&e))?;
        self.tune(&mut conn, purpose).map_err(|e| self.error(&e))?;
        Ok(conn)
    }

    fn tune(&self, conn: &mut Connection, purpose: Use) -> rusqlite::Result<()> {
        let mut since = None;
        conn.busy_handler(Some(move |count| {
            let since: &mut Option<std::time::Instant> = &mut since;
            if count == 0 || since.is_none() {
                *since = Some(std::time::Instant::now());
            }
            let waited = since.map_or(Duration::ZERO, |since| since.elapsed());
            // SQLite tells nobody when another process is done, and its own handler soon sleeps for far longer than a commit takes.
            std::thread::sleep(if waited < Duration::from_millis(100) { Duration::from_micros(100) } else { Duration::from_millis(1) });
            waited < BUSY_MAX
        }))?;
        conn.set_prepared_statement_cache_capacity(PREPARED_MAX);
        // Otherwise a statement whose plan could look at a bound value is planned again for each value.
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
        conn.pragma_update(None, "temp_store", "MEMORY")?;
        match purpose {
            Use::Write(durability) => {
                conn.pragma_update(None, "cache_size", -8192)?;
                conn.pragma_update(None, "synchronous", if durability == Durability::Power { "FULL" } else { "NORMAL" })?;
                conn.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
                conn.pragma_update(None, "journal_size_limit", i64::from(CHECKPOINT_PAGES) * 2 * 4096)?;
                if let Some(pages) = self.max_pages {
                    conn.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?;
                }
            }
            Use::Read => {
                conn.pragma_update(None, "cache_size", -2048)?;
                conn.pragma_update(None, "query_only", true)?;
            }
        }
        Ok(())
    }

    /// The store's version: 0 for a new file. Errors when it is not ours or newer than ours.
    fn version(&self, conn: &Connection) -> Result<usize> {
        // One transaction, unless there is one already: another process may be making the store just now.
        let _moment = if conn.is_autocommit() { Some(conn.unchecked_transaction().map_err(|e| self.error(&e))?) } else { None };
        let number = |pragma: &str| conn.query_row(&format!("PRAGMA {pragma}"), [], |row| row.get::<_, i32>(0)).map_err(|e| self.error(&e));
        let objects: i64 = conn.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(|e| self.error(&e))?;
        let version = number("user_version")?;
        let ours = number("application_id")? == APPLICATION_ID;
        if (!ours && objects > 0) || (ours && (version == 0 || objects == 0)) {
            return Err(self.says("is a database of something else: move it away, or name another data folder"));
        }
        let known = MIGRATIONS.len();
        match usize::try_from(version) {
            Ok(version) if version <= known => Ok(version),
            _ => Err(self.says(&format!(
                "is a store of version {version}, this program knows versions up to {known}: use the newer program, or another data folder"
            ))),
        }
    }

    fn write_ahead(&self, conn: &Connection) -> Result<()> {
        match write_ahead(conn).map_err(|e| self.error(&e))? {
            mode if mode == "wal" => Ok(()),
            mode => {
                Err(self
                    .says(&format!("can't use write-ahead logging here (it stays in mode {mode:?}): put the data folder on a local disk")))
            }
        }
    }

    fn migrate(&self, conn: &mut Connection) -> Result<()> {
        let tx = conn.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).map_err(|e| self.error(&e))?;
        let from = self.version(&tx)?;
        for step in &MIGRATIONS[from..] {
            tx.execute_batch(step).map_err(|e| self.error(&e))?;
        }
        let set = |pragma: &str, value: i32| tx.pragma_update(None, pragma, value).map_err(|e| self.error(&e));
        set("application_id", APPLICATION_ID)?;
        set("user_version", i32::try_from(MIGRATIONS.len()).unwrap_or(i32::MAX))?;
        tx.commit().map_err(|e| self.error(&e))
    }

    /// An error of the store, with the file and what to do.
    pub(super) fn error(&self, error: &rusqlite::Error) -> Error {
        let advice = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => "could not grow, the disk is full: nothing of this was written; free some space and try again",
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                "is damaged: restore it from a backup, or move it away to start with an empty store"
            }
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
                "can't be opened or written: check that its folder exists, and the permissions of both"
            }
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                "was locked by another process for too long: look for one that hangs, then try again"
            }
            Some(ErrorCode::SystemIoFailure) => "could not be read or written: check the disk, and whether it is full",
            _ => "refused",
        };
        self.says(&format!("{advice} ({error})"))
    }

    /// An error that begins with the file's name.
    pub(super) fn says(&self, text: &str) -> Error {
        Error::Store(format!("{} {text}", self.path.display()).into())
    }

    pub(super) fn path(&self) -> PathBuf {
        self.path.to_path_buf()
    }
}

/// Switches to write-ahead logging; gives the mode that the file is in then.
///
/// Of several processes that open a new file at once some are refused at once, whatever the timeout, and SQLite tells nobody when
/// another process is done: hence the short sleeps.
pub(crate) fn write_ahead(conn: &Connection) -> rusqlite::Result<String> {
    let start = std::time::Instant::now();
    loop {
        match conn.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)) {
            Err(e) if e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) && start.elapsed() < BUSY_MAX => {
                std::thread::sleep(BUSY_PAUSE);
            }
            other => return other,
        }
    }
}
