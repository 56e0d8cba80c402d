//! What the server says again of works, heard once in a process and handed to all who go along with a work or with all of them.
//!
//! It loses what a listener has no room for, and the listener finds that out: the stream has it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_nats::Subscriber;
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::link::Background;
use super::stream::Stored;
use crate::model::id::WorkId;
use crate::transport::Wire;

/// How much of one work may wait for its listener, and how much of all works.
const ONE_MAX: usize = 64;
const ALL_MAX: usize = 8_192;

/// Everybody who listens.
#[derive(Default)]
struct Listeners {
    next: u64,
    works: HashMap<WorkId, Vec<(u64, mpsc::Sender<Stored>)>>,
    all: Vec<(u64, mpsc::Sender<Stored>)>,
    /// Nothing comes any more.
    over: bool,
}

/// The one who hears, and hands on.
pub(super) struct Told(Arc<Mutex<Listeners>>);

/// What one listener hears; whoever drops it hears no more.
pub(super) struct Heard {
    id: u64,
    work: Option<WorkId>,
    news: mpsc::Receiver<Stored>,
    listeners: Arc<Mutex<Listeners>>,
}

impl Told {
    /// Hands on what comes from a subscription to all works of a stream.
    pub(super) fn new(mut said: Subscriber, stream: String, wire: Wire, background: &Background) -> Self {
        let told = Self(Arc::default());
        let listeners = Arc::clone(&told.0);
        let cancel = background.cancel.clone();
        background.tasks.spawn(async move {
            loop {
                let message = tokio::select! {
                    () = cancel.cancelled() => break,
                    message = said.next() => message,
                };
                let Some(message) = message else { break };
                if let Some(stored) = Stored::read(&stream, message) {
                    let work = wire.parse_record(&stored.subject).and_then(|(subject, _)| subject.work());
                    lock(&listeners).hand_on(work, stored);
                }
            }
            *lock(&listeners) = Listeners { over: true, ..Listeners::default() };
        });
        told
    }

    /// Listens to one work, or to all.
    pub(super) fn listen(&self, work: Option<WorkId>) -> Heard {
        let (told, news) = mpsc::channel(if work.is_some() { ONE_MAX } else { ALL_MAX });
        let mut listeners = lock(&self.0);
        listeners.next += 1;
        let id = listeners.next;
        match work {
            _ if listeners.over => {}
            Some(work) => listeners.works.entry(work).or_default().push((id, told)),
            None => listeners.all.push((id, told)),
        }
        Heard { id, work, news, listeners: Arc::clone(&self.0) }
    }

    /// Whether nothing comes any more.
    pub(super) fn is_over(&self) -> bool {
        lock(&self.0).over
    }
}

impl Listeners {
    fn hand_on(&mut self, work: Option<WorkId>, stored: Stored) {
        // Whoever has no room left is told by the end of what it hears.
        let told = |listener: &(u64, mpsc::Sender<Stored>)| listener.1.try_send(stored.clone()).is_ok();
        if let Some(work) = work
            && let Some(listeners) = self.works.get_mut(&work)
        {
            listeners.retain(told);
            if listeners.is_empty() {
                self.works.remove(&work);
            }
        }
        self.all.retain(told);
    }
}

impl Heard {
    /// What is said next; none when something may have been missed.
    pub(super) async fn next(&mut self) -> Option<Stored> {
        self.news.recv().await
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        let mut listeners = lock(&self.listeners);
        let id = self.id;
        let Some(work) = self.work else {
            listeners.all.retain(|(other, _)| *other != id);
            return;
        };
        if let Some(others) = listeners.works.get_mut(&work) {
            others.retain(|(other, _)| *other != id);
            if others.is_empty() {
                listeners.works.remove(&work);
            }
        }
    }
}

fn lock(listeners: &Mutex<Listeners>) -> MutexGuard<'_, Listeners> {
    listeners.lock().unwrap_or_else(PoisonError::into_inner)
}
