//! Tells what happens to the lattice itself: each fact goes to the log once, in the background.
//!
//! It knows the log and the facts, and not who finds them. Telling never disturbs the work: what cannot be written after a
//! few tries is dropped with a warning.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use crate::model::audit::{Fact, Kind};
use crate::model::id::{InstanceId, LatticeId, StationId};
use crate::telemetry::now;
use crate::transport::{Log, Record, Subject};

/// How many facts may wait to be written; a station of as many agents tells them all at once.
const WAITING_MAX: usize = 4096;
const BATCH_MAX: usize = 128;
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// What one process tells; cheap to clone.
#[derive(Clone)]
pub struct Audit(Arc<Inner>);

struct Inner {
    log: Arc<dyn Log>,
    lattice: LatticeId,
    said: Mutex<Said>,
    news: Notify,
}

#[derive(Default)]
struct Said {
    waiting: VecDeque<Record>,
    /// Nothing more will be said.
    over: bool,
}

impl Audit {
    /// Tells this log of this lattice; somebody has to `write`.
    pub fn new(log: Arc<dyn Log>, lattice: LatticeId) -> Self {
        Self(Arc::new(Inner { log, lattice, said: Mutex::default(), news: Notify::new() }))
    }

    /// Says what happened to a station's process; returns at once.
    pub fn say(&self, station: &StationId, instance: InstanceId, kind: Kind) {
        let (noun, verb) = kind.noun_and_verb();
        let subject = Subject::Audit { noun: noun.to_owned().into(), verb: verb.to_owned().into() };
        let fact = Fact { at: now(), lattice: self.0.lattice.clone(), station: station.clone(), instance, kind };
        let mut said = self.said();
        if said.waiting.len() >= WAITING_MAX {
            tracing::warn!(what = fact.kind.wire_type(), "an audit record is dropped: {WAITING_MAX} wait to be written");
            return;
        }
        said.waiting.push_back(Record { subject, body: Bytes::from(fact.to_bytes()) });
        drop(said);
        self.0.news.notify_one();
    }

    /// Nothing more will be said: `write` ends once it has written the rest.
    pub fn close(&self) {
        self.said().over = true;
        self.0.news.notify_one();
    }

    /// Writes what is said, in order, until `close`. Dropped halfway, a record may be lost, and none is written twice by us.
    pub async fn write(&self) {
        loop {
            let batch: Vec<Record> = {
                let mut said = self.said();
                let some = said.waiting.len().min(BATCH_MAX);
                said.waiting.drain(..some).collect()
            };
            if !batch.is_empty() {
                self.append(batch).await;
            } else if self.said().over {
                return;
            } else {
                self.0.news.notified().await;
            }
        }
    }

    async fn append(&self, batch: Vec<Record>) {
        for tries in 1..=TRIES {
            let Err(error) = self.0.log.append(batch.clone()).await else { return };
            // A process that leaves does not stay for this.
            if tries == TRIES || self.said().over {
                tracing::warn!(%error, records = batch.len(), "audit records could not be written and are dropped");
                return;
            }
            tokio::time::sleep(PAUSE * tries).await;
        }
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.0.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
