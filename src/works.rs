//! Works, read off the log: the only way from events to a work's state.
//!
//! It knows the log and the fold. A settled work never changes its status, so its fold may be remembered.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::model::event::{Event, Side};
use crate::model::id::WorkId;
use crate::model::work::Work;
use crate::transport::{Entry, Filter, Follow, Log, Position, Record, Result, Subject};

/// How many settled works are remembered.
const REMEMBERED_MAX: usize = 4096;
/// A settled work with more text than this is read again each time.
const REMEMBERED_TEXT_MAX: usize = 4096;
const READ_BATCH: usize = 1024;

/// Folds works from the log; cheap to clone.
#[derive(Clone)]
pub struct Works {
    log: Arc<dyn Log>,
    settled: Arc<Mutex<Remembered>>,
}

#[derive(Default)]
struct Remembered {
    works: HashMap<WorkId, Arc<Work>>,
    order: VecDeque<WorkId>,
}

impl Works {
    /// Reads from this log.
    pub fn new(log: Arc<dyn Log>) -> Self {
        Self { log, settled: Arc::default() }
    }

    /// The work as of now, from the whole lattice's events.
    pub async fn get(&self, id: WorkId) -> Result<Option<Arc<Work>>> {
        if let Some(work) = self.recall(id) {
            return Ok(Some(work));
        }
        Ok(self.history(id).await?.1.map(|work| self.remember(work)))
    }

    /// All events of a work, in the log's order, and their fold.
    pub async fn history(&self, id: WorkId) -> Result<(Vec<Event>, Option<Work>)> {
        let (mut events, mut after) = (Vec::new(), Position::default());
        loop {
            let entries = self.log.read(Filter::Work(id), after, READ_BATCH).await?;
            let Some(last) = entries.last() else { break };
            after = after.join(last.position);
            let full = entries.len() == READ_BATCH;
            events.extend(entries.iter().filter_map(event_of));
            if !full {
                break;
            }
        }
        let work = Work::fold(&events);
        Ok((events, work))
    }

    /// A work as of now, and a reader that goes along with it; none when nothing is known of it.
    pub async fn follow(&self, id: WorkId) -> Result<Option<Following>> {
        let (entries, follow) = self.log.replay(Filter::Work(id)).await?;
        let events: Vec<Event> = entries.iter().filter_map(event_of).collect();
        Ok(Work::fold(&events).map(|work| Following { follow, work, works: Some(self.clone()) }))
    }

    /// As `follow`, for a work that has just begun: with what this process has heard of it, as soon as that is enough, and the rest
    /// soon after it.
    pub async fn follow_young(&self, id: WorkId, patience: Duration, enough: impl Fn(&Work) -> bool) -> Result<Option<Following>> {
        let Some((entries, mut follow)) = self.log.lately(Filter::Work(id)).await? else { return self.follow(id).await };
        let mut events: Vec<Event> = entries.iter().filter_map(event_of).collect();
        let until = Instant::now() + patience;
        loop {
            if let Some(work) = Work::fold(&events).filter(&enough) {
                return Ok(Some(Following { follow, work, works: None }));
            }
            match tokio::time::timeout_at(until, follow.next()).await {
                Ok(Ok(more)) => events.extend(more.iter().filter_map(event_of)),
                Ok(Err(_)) | Err(_) => return self.follow(id).await,
            }
        }
    }

    /// The settled work, if it is remembered.
    pub fn recall(&self, id: WorkId) -> Option<Arc<Work>> {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner).works.get(&id).cloned()
    }

    fn remember(&self, work: Work) -> Arc<Work> {
        let work = Arc::new(work);
        if work.status.is_settled() && work.text_len() <= REMEMBERED_TEXT_MAX {
            let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
            if settled.works.insert(work.work_id, work.clone()).is_none() {
                settled.order.push_back(work.work_id);
                if settled.order.len() > REMEMBERED_MAX
                    && let Some(oldest) = settled.order.pop_front()
                {
                    settled.works.remove(&oldest);
                }
            }
        }
        work
    }
}

/// A reader that goes along with one work.
pub struct Following {
    follow: Box<dyn Follow>,
    work: Work,
    /// Where the work is remembered, if nothing of it may be missing here.
    works: Option<Works>,
}

impl Following {
    /// The work as it was last seen.
    pub fn work(&self) -> Arc<Work> {
        match &self.works {
            Some(works) => works.remember(self.work.clone()),
            None => Arc::new(self.work.clone()),
        }
    }

    /// Waits for the next events that count; gives them, and the work after them. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<(Vec<Event>, Arc<Work>)> {
        loop {
            let mut events = Vec::new();
            for event in self.follow.next().await?.iter().filter_map(event_of) {
                if self.work.heeds(&event) {
                    self.work.apply(&event);
                    events.push(event);
                }
            }
            if events.is_empty() {
                continue;
            }
            let now = self.work();
            return Ok((events, now));
        }
    }
}

/// The event in an entry; a garbled one is skipped and logged, since nothing later may be lost for it.
pub fn event_of(entry: &Entry) -> Option<Event> {
    let side = match entry.subject {
        Subject::Response(_) => Side::Leaf,
        Subject::Status(_) if entry.is_forwarded => Side::Heard,
        Subject::Status(_) => Side::Assigner,
        Subject::Audit { .. } => return None,
    };
    match Event::from_bytes(&entry.body, side) {
        Ok(event) if entry.by.as_ref().is_some_and(|by| *by != event.station) => {
            tracing::warn!(position = ?entry.position, by = ?entry.by, claims = %event.station, "skipped an event of a station that says it is another one");
            None
        }
        Ok(event) if entry.subject.work() != Some(event.work_id) => {
            tracing::warn!(position = ?entry.position, subject = %entry.subject, claims = %event.work_id, "skipped an event of a work that stands where another one's belong");
            None
        }
        Ok(event) => Some(event),
        Err(error) => {
            tracing::warn!(position = ?entry.position, %error, "skipped a record that is not an event");
            None
        }
    }
}

/// Whether a work of which this was said waits for nobody's word: all that its agent asked is answered, or it is called off.
pub fn goes_on(said: &[Entry]) -> bool {
    let events: Vec<Event> = said.iter().filter_map(event_of).collect();
    Work::fold(&events).is_none_or(|work| work.open_question().is_none() || work.is_called_off())
}

/// The record of an event, under the subject where its side writes.
pub fn record(event: Event) -> Record {
    let subject = match event.side {
        Side::Leaf => Subject::Response(event.work_id),
        Side::Assigner | Side::Heard => Subject::Status(event.work_id),
    };
    Record { subject, body: Bytes::from(event.into_bytes()) }
}
