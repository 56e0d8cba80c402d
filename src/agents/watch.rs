//! Follows folders of agent files: what is saved is in force within a second, and what is broken stays as it was.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Catalog, files, load_after, unavailable};
use crate::config;

/// How often folders are looked at anew because they changed meanwhile.
const LOOKS_MAX: usize = 8;

/// How patient a watcher is.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How long files must be quiet before they are read.
    pub quiet: Duration,
    /// How long they may be unquiet before they are read all the same.
    pub quiet_max: Duration,
    /// How often they are looked at although nothing was noticed.
    pub poll: Duration,
    /// The same where the system notices nothing for us.
    pub poll_alone: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            quiet: Duration::from_millis(100),
            quiet_max: Duration::from_millis(500),
            poll: Duration::from_secs(2),
            poll_alone: Duration::from_millis(500),
        }
    }
}

/// Keeps a catalog up to date with its folders.
pub struct Watcher {
    reader: Reader,
    pace: Pace,
    sent: watch::Sender<Arc<Catalog>>,
}

/// What reading the folders takes, and how they looked when they were read last.
#[derive(Clone)]
struct Reader {
    dirs: Vec<PathBuf>,
    settings: config::Agents,
    path_env: Option<OsString>,
    looks: files::Looks,
}

impl Watcher {
    /// Reads the folders once, and gives the watcher and the handle on its catalogs.
    pub fn new(
        dirs: &[PathBuf],
        settings: config::Agents,
        path_env: Option<OsString>,
        pace: Pace,
    ) -> (Self, watch::Receiver<Arc<Catalog>>) {
        // Events carry absolute paths.
        let dirs: Vec<_> = dirs.iter().map(|dir| std::path::absolute(dir).unwrap_or_else(|_| dir.clone())).collect();
        let looks = files::looks(&dirs);
        let reader = Reader { dirs, settings, path_env, looks };
        let (sent, catalogs) = watch::channel(Arc::new(reader.read(&Catalog::default())));
        (Self { reader, pace, sent }, catalogs)
    }

    /// Follows the folders until it is cancelled or nobody holds the handle any more. Cancellation loses nothing.
    pub async fn run(mut self, cancel: CancellationToken) {
        let (noticed, mut notices) = mpsc::channel(1);
        let mut eyes = Eyes::open(&self.reader.dirs, noticed);
        loop {
            eyes = match blocking(move || eyes.follow()).await {
                Some(eyes) => eyes,
                None => return,
            };
            // Whatever happened before the eyes were on it is seen now.
            self.refresh().await;
            let poll = if eyes.see_all() { self.pace.poll } else { self.pace.poll_alone };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.sent.closed() => return,
                () = tokio::time::sleep(poll) => {}
                notice = notices.recv() => match notice {
                    Some(()) => self.settle(&mut notices).await,
                    None => tokio::time::sleep(poll).await,
                },
            }
        }
    }

    /// Waits until writers are done.
    async fn settle(&self, notices: &mut mpsc::Receiver<()>) {
        let calm = async { while tokio::time::timeout(self.pace.quiet, notices.recv()).await.is_ok_and(|notice| notice.is_some()) {} };
        _ = tokio::time::timeout(self.pace.quiet_max, calm).await;
    }

    async fn refresh(&mut self) {
        let previous = self.sent.borrow().clone();
        let (reader, quiet) = (self.reader.clone(), self.pace.quiet);
        let Some(Some((looks, mut catalog))) = blocking({
            let previous = Arc::clone(&previous);
            move || reader.changed(&previous)
        })
        .await
        else {
            return;
        };
        self.reader.looks = looks;
        let left = |catalog: &Catalog| previous.definitions.keys().any(|name| !catalog.definitions.contains_key(name));
        if left(&catalog) {
            // Some editors move a file away before they write it anew: an agent goes only when it stays away.
            tokio::time::sleep(quiet).await;
            let (reader, previous) = (self.reader.clone(), Arc::clone(&previous));
            let Some((looks, again)) = blocking(move || (files::looks(&reader.dirs), reader.read(&previous))).await else { return };
            self.reader.looks = looks;
            catalog = again;
        }
        let catalog = catalog.keeping(&previous);
        for problem in catalog.problems.iter().filter(|problem| !previous.problems.contains(problem)) {
            tracing::warn!("{problem}");
        }
        self.sent.send_if_modified(|current| {
            let is_new = **current != catalog;
            if is_new {
                *current = Arc::new(catalog);
            }
            is_new
        });
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

impl Reader {
    fn read(&self, previous: &Catalog) -> Catalog {
        load_after(&self.dirs, &self.settings, self.path_env.as_deref(), previous)
    }

    /// The folders as they are, when they or the programs that their agents need have changed.
    fn changed(&self, previous: &Catalog) -> Option<(files::Looks, Catalog)> {
        // Looks are taken before the files are read: a write in between is seen the next time.
        let looks = files::looks(&self.dirs);
        let moved = previous.definitions.values().any(|definition| self.can_run_differently(definition));
        (looks != self.looks || moved).then(|| (looks, self.read(previous)))
    }

    fn can_run_differently(&self, definition: &crate::model::agent::Definition) -> bool {
        use crate::model::agent::RunnerSpec;
        let Some(file) = &definition.source else { return false };
        match &definition.runner {
            RunnerSpec::Missing(_) => {
                file.extension().is_some_and(|extension| extension == "md")
                    && super::program::find("claude", self.path_env.as_deref()).is_some()
            }
            runner => unavailable(runner, file, self.path_env.as_deref()) != definition.manifest.unavailable,
        }
    }
}

/// Which folder this is: numbers are used again, so the birth counts as well.
fn identity(dir: &Path) -> Option<(u64, Option<SystemTime>)> {
    let meta = dir.metadata().ok().filter(std::fs::Metadata::is_dir)?;
    Some((files::inode_number(&meta), meta.created().ok()))
}

/// The system's notices about the folders, and about the nearest folder that exists above a missing one.
struct Eyes {
    dirs: Vec<PathBuf>,
    watcher: Option<RecommendedWatcher>,
    /// What is watched, and which folder that was.
    on: BTreeMap<PathBuf, (u64, Option<SystemTime>)>,
    blind: bool,
}

impl Eyes {
    fn open(dirs: &[PathBuf], noticed: mpsc::Sender<()>) -> Self {
        let ours = dirs.to_vec();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let matters = |path: &PathBuf| ours.iter().any(|dir| path.starts_with(dir) || dir.starts_with(path));
            let is_read = |event: &notify::Event| matches!(event.kind, notify::EventKind::Access(access) if !matches!(access, notify::event::AccessKind::Close(notify::event::AccessMode::Write)));
            let is_news = event.map_or(true, |event| !is_read(&event) && (event.paths.is_empty() || event.paths.iter().any(matters)));
            if is_news {
                // A full channel holds a notice already.
                _ = noticed.try_send(());
            }
        });
        let watcher = watcher.inspect_err(|error| tracing::warn!(%error, "agent files are polled: the system gives no notices"));
        Self { dirs: dirs.to_vec(), watcher: watcher.ok(), on: BTreeMap::new(), blind: false }
    }

    /// Whether a change is noticed without polling.
    fn see_all(&self) -> bool {
        self.watcher.is_some() && !self.blind
    }

    /// Looks at what exists now: folders come, go and are replaced, also while we look.
    fn follow(mut self) -> Self {
        let mut seen = self.sight();
        for _ in 0..LOOKS_MAX {
            self = self.look();
            let now = self.sight();
            if now == seen {
                return self;
            }
            seen = now;
        }
        // Something keeps changing: it is looked at again soon.
        self.blind = true;
        self
    }

    /// Which of the folders are there, and which ones they are.
    fn sight(&self) -> Vec<Option<(u64, Option<SystemTime>)>> {
        let above = self.dirs.iter().flat_map(|dir| dir.ancestors().skip(1));
        self.dirs.iter().map(PathBuf::as_path).chain(above).map(identity).collect()
    }

    fn look(mut self) -> Self {
        self.blind = false;
        let gone: Vec<PathBuf> = self.on.keys().filter(|dir| !dir.is_dir()).cloned().collect();
        for dir in gone {
            self.forget(&dir);
        }
        let dirs = self.dirs.clone();
        for dir in dirs.iter().filter(|dir| dir.is_dir()) {
            self.watch(dir, RecursiveMode::Recursive);
        }
        for dir in &dirs {
            // The folder above notices when this one comes, goes or is replaced.
            if let Some(above) = dir.ancestors().skip(1).find(|above| above.is_dir()) {
                self.watch(above, RecursiveMode::NonRecursive);
            }
        }
        self
    }

    fn forget(&mut self, dir: &Path) {
        if self.on.remove(dir).is_some()
            && let Some(watcher) = &mut self.watcher
        {
            _ = watcher.unwatch(dir);
        }
    }

    fn watch(&mut self, dir: &Path, mode: RecursiveMode) {
        let id = identity(dir).unwrap_or_default();
        if self.on.get(dir) == Some(&id) {
            return;
        }
        self.forget(dir);
        let Some(watcher) = &mut self.watcher else { return };
        // One folder may be another one's parent: the wider view stays.
        let inside_wider = self.on.keys().any(|other| other != dir && self.dirs.contains(other) && dir.starts_with(other));
        match watcher.watch(dir, mode) {
            Ok(()) => _ = self.on.insert(dir.to_owned(), id),
            Err(error) if !inside_wider => {
                tracing::debug!(%error, dir = %dir.display(), "the folder is polled");
                self.blind = true;
            }
            Err(_) => {}
        }
    }
}
