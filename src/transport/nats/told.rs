//! What the server says again of works, heard once in a process and handed to all who go along with a work or with all of them.
//!
//! It loses what a listener has no room for, and the listener finds that out: the stream has it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_nats::Subscriber;
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::link::Link;
use super::log::{BODY, FROM};
use super::stream::Stored;
use crate::model::id::WorkId;

/// How much of one work may wait for its listener, and how much of all works.
const ONE_MAX: usize = 64;
const ALL_MAX: usize = 8_192;
/// Of how many works it remembers what was said lately, how much of each, and how large that may be.
const WORKS_MAX: usize = 2_048;
const SAID_MAX: usize = 32;
const BODY_MAX: usize = 8 << 10;

/// Everybody who listens.
#[derive(Default)]
struct Listeners {
    next: u64,
    works: HashMap<WorkId, Vec<(u64, mpsc::Sender<Stored>)>>,
    all: Vec<(u64, mpsc::Sender<Stored>)>,
    lately: Lately,
    /// Nothing comes any more.
    over: bool,
}

/// What was said of works lately: whoever begins to listen to a young work has not missed its beginning.
#[derive(Default)]
struct Lately {
    works: HashMap<WorkId, Vec<Stored>>,
    order: VecDeque<WorkId>,
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
    pub(super) fn new(mut said: Subscriber, stream: String, link: &Link) -> Self {
        let told = Self(Arc::default());
        let listeners = Arc::clone(&told.0);
        let (cancel, wire, mut interruptions) = (link.background.cancel.clone(), link.wire.clone(), link.interruptions.clone());
        link.background.tasks.spawn(async move {
            loop {
                let message = tokio::select! {
                    biased;
                    () = cancel.cancelled() => break,
                    // What is remembered may have a gap now.
                    Ok(()) = interruptions.changed() => {
                        lock(&listeners).lately = Lately::default();
                        continue;
                    }
                    message = said.next() => message,
                };
                let Some(message) = message else { break };
                if let Some(mut stored) = Stored::read(&stream, message) {
                    // Of a record's headers these alone say anything; the rest would be carried about for nothing.
                    if stored.header(BODY).is_none() && stored.header(FROM).is_none() {
                        stored.headers = None;
                    }
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

    /// Listens to a work, and gives what was said of it lately.
    pub(super) fn listen_lately(&self, work: WorkId) -> (Vec<Stored>, Heard) {
        // Who listens first hears twice, and not too little.
        let heard = self.listen(Some(work));
        (lock(&self.0).lately.works.get(&work).cloned().unwrap_or_default(), heard)
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
        if let Some(work) = work {
            self.lately.remember(work, &stored);
        }
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

impl Lately {
    fn remember(&mut self, work: WorkId, stored: &Stored) {
        let said = self.works.entry(work).or_insert_with(|| {
            self.order.push_back(work);
            Vec::new()
        });
        if stored.body.len() > BODY_MAX || said.len() >= SAID_MAX {
            // It has a gap from here on, and no beginning.
            said.clear();
        } else {
            said.push(stored.clone());
        }
        if self.order.len() > WORKS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.works.remove(&oldest);
        }
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
