//! One subscription for the answers to all batched gets of a process. One for each get would make the server forget, each time,
//! what it has worked out about subscriptions.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_nats::{Client, Message, SubscribeError};
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

type Waiting = Mutex<HashMap<u64, mpsc::Sender<Message>>>;

/// Where the answers to batched gets arrive.
pub(super) struct Pages {
    inbox: String,
    next: AtomicU64,
    waiting: Arc<Waiting>,
}

/// The answers to one get; whoever drops this hears no more of them.
pub(super) struct Answers {
    /// Where the server is to answer.
    pub(super) inbox: String,
    id: u64,
    heard: mpsc::Receiver<Message>,
    waiting: Arc<Waiting>,
}

impl Pages {
    pub(super) async fn open(client: &Client, tasks: &TaskTracker, cancel: CancellationToken) -> Result<Self, SubscribeError> {
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(format!("{inbox}.*")).await?;
        let waiting: Arc<Waiting> = Arc::default();
        let known = Arc::clone(&waiting);
        tasks.spawn(async move {
            loop {
                let answer = tokio::select! {
                    () = cancel.cancelled() => break,
                    answer = answers.next() => answer,
                };
                let Some(answer) = answer else { break };
                let id = answer.subject.rsplit('.').next().and_then(|id| id.parse().ok());
                let Some(id) = id else { continue };
                let asker = lock(&known).get(&id).cloned();
                // Whoever gets more than was asked for has stopped listening: it asks again.
                if asker.is_some_and(|asker| asker.try_send(answer).is_err()) {
                    lock(&known).remove(&id);
                }
            }
            lock(&known).clear();
        });
        Ok(Self { inbox, next: AtomicU64::new(1), waiting })
    }

    /// Listens for up to so many answers.
    pub(super) fn listen(&self, count: usize) -> Answers {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (told, heard) = mpsc::channel(count);
        lock(&self.waiting).insert(id, told);
        Answers { inbox: format!("{}.{id}", self.inbox), id, heard, waiting: Arc::clone(&self.waiting) }
    }
}

impl Answers {
    /// The next answer; none when no more can come.
    pub(super) async fn next(&mut self) -> Option<Message> {
        self.heard.recv().await
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        lock(&self.waiting).remove(&self.id);
    }
}

fn lock(waiting: &Waiting) -> MutexGuard<'_, HashMap<u64, mpsc::Sender<Message>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}
