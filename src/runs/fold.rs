//! Works on their way into the store: folds of those that have not settled.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use super::Result;
use super::rows::Folded;
use crate::model::event::Kind;
use crate::model::id::WorkId;
use crate::model::work::Work;
use crate::transport::{Entry, Filter, Log, Position};
use crate::works::event_of;

/// How many unsettled works are kept in memory; others are read again when something happens to them.
const OPEN_MAX: usize = 10_000;
const READ_BATCH: usize = 1024;

/// The folds, and the position up to which they are written.
#[derive(Default)]
pub(super) struct Folds {
    pub(super) upto: Position,
    open: HashMap<WorkId, (Work, Position)>,
}

impl Folds {
    /// Folds a batch; gives each work that it touched, as it is then.
    pub(super) async fn take_in(&mut self, log: &dyn Log, entries: &[Entry]) -> Result<Vec<Folded>> {
        let mut touched: HashMap<WorkId, (Work, Position)> = HashMap::new();
        let mut order = Vec::new();
        for entry in entries {
            let Some(event) = event_of(entry) else { continue };
            let (work, seen) = match touched.entry(event.work_id) {
                Slot::Occupied(slot) => slot.into_mut(),
                Slot::Vacant(slot) => {
                    order.push(event.work_id);
                    match self.open.remove(&event.work_id) {
                        Some(known) => slot.insert(known),
                        // An assigner's order is a work's first event; a leaf that found none repeats it under its attempt.
                        None if event.attempt == 0 && matches!(event.kind, Kind::Assigned(_)) => {
                            slot.insert((Work::begin(&event), Position::default()))
                        }
                        None => match read(log, event.work_id).await? {
                            Some(known) => slot.insert(known),
                            None => continue,
                        },
                    }
                }
            };
            if *seen < entry.position {
                work.apply(&event);
                *seen = entry.position;
            }
        }
        if self.open.len() > OPEN_MAX {
            self.open.clear();
        }
        let mut rows = Vec::with_capacity(touched.len());
        // In the log's order, so that local numbers rise with it.
        for id in order {
            let Some((work, upto)) = touched.remove(&id) else { continue };
            if !work.status.is_settled() {
                self.open.insert(id, (work.clone(), upto));
            }
            rows.push(Folded { work, upto });
        }
        Ok(rows)
    }

    /// Drops everything.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}

async fn read(log: &dyn Log, id: WorkId) -> Result<Option<(Work, Position)>> {
    let (mut work, mut after) = (None::<Work>, Position::default());
    loop {
        let entries = log.read(Filter::Work(id), after, READ_BATCH).await?;
        let Some(last) = entries.last() else { break };
        after = last.position;
        for event in entries.iter().filter_map(event_of) {
            work.get_or_insert_with(|| Work::begin(&event)).apply(&event);
        }
        if entries.len() < READ_BATCH {
            break;
        }
    }
    Ok(work.map(|work| (work, after)))
}
