//! The embedded transport: one SQLite file and a folder of blobs, shared by all processes that open the same folder.
//!
//! One thread writes, two read, one watches for what other processes wrote, one keeps the store within its limits.

mod blobs;
mod hook;
mod hub;
mod keeper;
mod log;
mod queue;
mod reader;
mod schema;
mod steady;
mod table;
mod watcher;
mod writer;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::SystemTime;

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use self::hub::{Hub, lock};
use self::reader::Question;
use self::schema::File;
pub(crate) use self::schema::write_ahead;
use self::steady::Steady;
use self::writer::{Batch, Committed, Job, Step};
use super::{Bucket, Error, Result, Transport};
use crate::config::Storage;
use crate::model::time::Timestamp;

/// Tells the time.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// What a test may set besides the settings.
#[derive(Clone)]
pub struct Options {
    /// Tells the time, for leases, deadlines and expiry.
    pub clock: Clock,
    /// Whether that clock may jump, which makes no hold old.
    pub jumps: bool,
    /// How many pages the file may have; a full disk in effect.
    pub max_pages: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self { clock: Arc::new(wall_clock), jumps: false, max_pages: None }
    }
}

fn wall_clock() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// An open store; dropping it closes it.
pub struct Local {
    shared: Arc<Shared>,
    transport: Transport,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Opens the store in a folder, and makes both if they are missing.
///
/// # Errors
/// `Store` when the file is damaged, of a newer version, of something else or can't be written; it is left as it was.
pub fn open(dir: &Path, settings: &Storage) -> Result<Local> {
    open_with(dir, settings, Options::default())
}

/// Opens the store in a folder, with another clock or limit.
///
/// # Errors
/// As `open`.
pub fn open_with(dir: &Path, settings: &Storage, options: Options) -> Result<Local> {
    let folder = |path: &Path| {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| {
            Error::Store(
                format!("the folder {} can't be made: {error}; choose another data folder or mend its permissions", path.display()).into(),
            )
        })
    };
    folder(dir)?;
    let file = File::new(dir, options.max_pages);
    let writer = file.open(settings.durability)?;
    folder(&dir.join("blobs").join("tmp"))?;
    Local::start(dir, file, Some(writer), settings, options)
}

/// Opens a store that is there to look at it; every change is refused, and nothing is made.
///
/// # Errors
/// `Store` when there is none, or as `open`.
pub fn open_read_only(dir: &Path) -> Result<Local> {
    let options = Options::default();
    let file = File::new(dir, options.max_pages);
    Local::start(dir, file, None, &Storage::default(), options)
}

impl Local {
    fn start(dir: &Path, file: File, writer: Option<Connection>, settings: &Storage, options: Options) -> Result<Self> {
        let first = file.open_reader()?;
        let watching = file.open_reader()?;
        let head = log::head(&watching).map_err(|e| file.error(&e))?;
        let (jobs, waiting_jobs) = mpsc::channel(writer::WAITING_MAX);
        let (questions, waiting_questions) = mpsc::channel(reader::WAITING_MAX);
        let read_only = writer.is_none();
        let shared = Arc::new(Shared {
            file,
            steady: options.jumps.then(|| Steady::new((options.clock)())),
            clock: options.clock,
            hub: Hub::new(u64::try_from(head).unwrap_or(0)),
            jobs: RwLock::new(Some(jobs)),
            questions: RwLock::new(Some(questions)),
            read_only,
            stopping: AtomicBool::new(false),
        });
        let blobs = Arc::new(blobs::Folder::new(dir.join("blobs"), settings.durability, Arc::clone(&shared)));
        let transport = Transport {
            log: Arc::new(log::LocalLog(Arc::clone(&shared))),
            queue: Arc::new(queue::LocalQueue(Arc::clone(&shared))),
            table: Arc::new(table::LocalTable(Arc::clone(&shared))),
            blobs: Arc::clone(&blobs) as Arc<dyn super::Blobs>,
            reach: tokio::sync::watch::channel(super::Reach::Alone).1,
        };
        let local = Self { shared: Arc::clone(&shared), transport, threads: Mutex::default() };
        let waiting_questions = Arc::new(Mutex::new(waiting_questions));
        let questions = Arc::clone(&waiting_questions);
        local.spawn("store-read", move |_| reader::run(&questions, &first))?;
        for _ in 1..reader::READERS {
            let questions = Arc::clone(&waiting_questions);
            // Whoever starts us waits for one reader only.
            local.spawn("store-read", move |shared| match shared.file.open_reader() {
                Ok(conn) => reader::run(&questions, &conn),
                Err(error) => tracing::warn!(%error, "the store has a reader less"),
            })?;
        }
        local.spawn("store-watch", move |shared| watcher::run(&watching, shared))?;
        if let Some(conn) = writer {
            local.spawn("store-write", move |shared| writer::run(waiting_jobs, conn, shared))?;
            let limits = keeper::Limits {
                max_age: settings.max_age.get(),
                blob_max_age: settings.blob_max_age.get(),
                max_bytes: settings.max_bytes.get(),
            };
            local.spawn("store-keep", move |shared| keeper::run(&limits, &blobs, shared))?;
        }
        Ok(local)
    }

    fn spawn(&self, name: &str, run: impl FnOnce(&Arc<Shared>) + Send + 'static) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || run(&shared));
        let thread = thread.map_err(|error| self.shared.file.says(&format!("can't be served, no thread could be started: {error}")))?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// The four primitives.
    pub fn transport(&self) -> Transport {
        self.transport.clone()
    }

    /// Carries out what was asked before, ends every wait, stops the threads and folds the write-ahead log into the file.
    /// Blocks until that is done; later calls do nothing, and the primitives say `Closed`.
    pub fn close(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        let threads = std::mem::take(&mut *lock(&self.threads));
        // Once no sender is left, the threads end when everything before has been carried out.
        self.shared.jobs.write().unwrap_or_else(PoisonError::into_inner).take();
        self.shared.questions.write().unwrap_or_else(PoisonError::into_inner).take();
        for thread in threads {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("a thread of the store {} panicked", self.shared.file.path().display());
            }
        }
        self.shared.hub.close();
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.close();
    }
}

/// What the primitives and the threads share.
pub(in crate::transport::local) struct Shared {
    file: File,
    clock: Clock,
    steady: Option<Steady>,
    hub: Hub,
    jobs: RwLock<Option<mpsc::Sender<Box<dyn Job>>>>,
    questions: RwLock<Option<mpsc::Sender<Question>>>,
    read_only: bool,
    stopping: AtomicBool,
}

impl Shared {
    fn now(&self) -> Timestamp {
        (self.clock)()
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn jobs(&self) -> Result<mpsc::Sender<Box<dyn Job>>> {
        if self.read_only {
            return Err(self.file.says("was opened to look at it only: nothing can be changed through this command"));
        }
        self.jobs.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or(Error::Closed)
    }

    /// Does a part of a transaction. Once the request is on its way it is carried out, also when this future is dropped.
    async fn write<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnMut(&mut Batch<'_>) -> Step<T> + Send + 'static,
    {
        let jobs = self.jobs()?;
        let (job, answer) = writer::call(work);
        jobs.send(job).await.map_err(|_| Error::Closed)?;
        drop(jobs);
        answer.await.map_err(|_| Error::Closed)?
    }

    /// Does a part of a transaction from one of our own threads.
    fn write_blocking<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnMut(&mut Batch<'_>) -> Step<T> + Send + 'static,
    {
        let (job, answer) = writer::call(work);
        self.jobs()?.blocking_send(job).map_err(|_| Error::Closed)?;
        answer.blocking_recv().map_err(|_| Error::Closed)?
    }

    /// Reads what has been committed by now.
    async fn read<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let questions = self.questions.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or(Error::Closed)?;
        let (reply, answer) = oneshot::channel();
        let question: Question = Box::new(move |conn| {
            if !reply.is_closed() {
                // Whoever asked may have gone.
                let _ = reply.send(work(conn));
            }
        });
        questions.send(question).await.map_err(|_| Error::Closed)?;
        drop(questions);
        answer.await.map_err(|_| Error::Closed)?.map_err(|e| self.file.error(&e))
    }

    /// Tells everybody in this process what a transaction of ours did.
    fn publish(&self, conn: &Connection, committed: Committed) {
        if let (Some(first), Some(last)) = (committed.entries.first(), committed.entries.last())
            && !self.hub.dispatch(first.position.seq, &committed.entries, last.position.seq)
            && let Err(error) = self.catch_up(conn)
        {
            // The watcher tries again.
            tracing::warn!(%error, "the log could not be read");
        }
        for (station, count) in &committed.raised {
            self.hub.raised(station, *count);
        }
        for bucket in Bucket::ALL {
            if let Some(revision) = committed.revisions[bucket as usize] {
                self.hub.changed(bucket, revision);
            }
        }
    }

    /// Hands out what stands in the log and was not handed out yet.
    fn catch_up(&self, conn: &Connection) -> rusqlite::Result<()> {
        let head = u64::try_from(log::head(conn)?).unwrap_or(0);
        loop {
            let dispatched = self.hub.dispatched();
            if dispatched >= head || self.hub.skip_to(head) {
                return Ok(());
            }
            let page = log::page_of_all(conn, dispatched)?;
            let last = page.entries.last().map_or(0, |entry| entry.position.seq);
            let last = if page.end { last.max(head) } else { last };
            self.hub.dispatch(dispatched + 1, &page.entries, last);
        }
    }
}
