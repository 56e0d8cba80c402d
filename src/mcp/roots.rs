//! One reader of all works for everybody who listens to runs: they are woken by what happens under their own root only.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::model::id::RunId;
use crate::transport::{Error, Filter, Follow, Log, Result};
use crate::works::event_of;

/// How many words under one root wait for a listener; one that misses some is told that something changed.
const KEPT: usize = 16;
/// How long the reader waits before it begins anew after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// The run to which something happened; none when nobody knows which.
type Word = Option<RunId>;

/// Who listens to what happens under which root.
#[derive(Default)]
pub(super) struct Roots {
    heard: Arc<Mutex<Heard>>,
    /// Somebody has stopped listening.
    gone: Arc<Notify>,
    opening: tokio::sync::Mutex<()>,
}

/// Listens to what happens under a root; the reader ends with the last one.
pub(super) struct Listener {
    words: Option<broadcast::Receiver<Word>>,
    gone: Arc<Notify>,
}

impl Listener {
    /// Waits for a word that is `enough`; what waits behind it counts as told with it. A failure when nothing comes any more.
    pub(super) async fn next(&mut self, enough: impl Fn(&Word) -> bool) -> Result<()> {
        let Some(words) = &mut self.words else { return Err(Error::Closed) };
        loop {
            match words.recv().await {
                Ok(word) if !enough(&word) => continue,
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Err(Error::Closed),
            }
            while words.try_recv().is_ok() {}
            return Ok(());
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        drop(self.words.take());
        self.gone.notify_one();
    }
}

#[derive(Default)]
struct Heard {
    roots: HashMap<RunId, broadcast::Sender<Word>>,
    /// Whether there is a reader.
    reads: bool,
}

impl Roots {
    /// The runs to which something happens from now on, under the root of this one.
    pub(super) async fn listen(&self, log: &Arc<dyn Log>, tasks: &TaskTracker, stop: &CancellationToken, run: &RunId) -> Result<Listener> {
        let _one = self.opening.lock().await;
        let (listener, reads) = {
            let mut heard = lock(&self.heard);
            let words = heard.roots.entry(run.root()).or_insert_with(|| broadcast::Sender::new(KEPT)).subscribe();
            (Listener { words: Some(words), gone: Arc::clone(&self.gone) }, heard.reads)
        };
        if !reads {
            let follow = follow(&**log).await?;
            lock(&self.heard).reads = true;
            let (heard, gone, log, stop) = (Arc::clone(&self.heard), Arc::clone(&self.gone), Arc::clone(log), stop.clone());
            tasks.spawn(async move {
                let over = tokio::select! {
                    () = stop.cancelled() => true,
                    over = read(&heard, &gone, &*log, follow) => over,
                };
                if over {
                    // Whoever listens still hears that nothing comes any more.
                    *lock(&heard) = Heard::default();
                }
            });
        }
        Ok(listener)
    }
}

async fn follow(log: &dyn Log) -> Result<Box<dyn Follow>> {
    log.follow(Filter::AllWork, log.head().await?).await
}

/// Tells what the log says, until the log is closed (true) or nobody listens.
async fn read(heard: &Mutex<Heard>, gone: &Notify, log: &dyn Log, mut reader: Box<dyn Follow>) -> bool {
    loop {
        let entries = tokio::select! {
            entries = reader.next() => entries,
            () = gone.notified() => {
                let mut heard = lock(heard);
                heard.roots.retain(|_, listeners| listeners.receiver_count() > 0);
                if heard.roots.is_empty() {
                    heard.reads = false;
                    return false;
                }
                continue;
            }
        };
        match entries {
            Ok(entries) => {
                let mut heard = lock(heard);
                entries.iter().filter_map(event_of).for_each(|event| heard.tell(&event.run_id));
            }
            Err(Error::Closed) => return true,
            Err(error) => {
                tracing::warn!(%error, "lost track of runs that clients listen to; beginning anew");
                reader = loop {
                    tokio::time::sleep(RETRY).await;
                    match follow(log).await {
                        Ok(reader) => break reader,
                        Err(Error::Closed) => return true,
                        Err(_) => {}
                    }
                };
                // What came in between is not known.
                for listeners in lock(heard).roots.values() {
                    _ = listeners.send(None);
                }
            }
        }
    }
}

impl Heard {
    fn tell(&mut self, run: &RunId) {
        if let Entry::Occupied(listeners) = self.roots.entry(run.root())
            && listeners.get().send(Some(run.clone())).is_err()
        {
            listeners.remove();
        }
    }
}

fn lock(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}
