//! Works on their way into the store: folds of those that have not settled.

use std::collections::hash_map::Entry as Slot;
use std::collections::{HashMap, HashSet};

use super::Result;
use super::rows::Folded;
use crate::model::event::{Event, Kind};
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
    /// When it was looked at whether the server's log still has what was folded of it.
    pub(super) epoch: Option<u64>,
    open: HashMap<WorkId, (Work, Position)>,
}

impl Folds {
    /// Folds a batch; gives each work that it touched, as it is then.
    pub(super) async fn take_in(&mut self, log: &dyn Log, entries: &[Entry]) -> Result<Vec<Folded>> {
        let mut touched: HashMap<WorkId, (Work, Position)> = HashMap::new();
        let mut order = Vec::new();
        let events: Vec<(&Entry, Event)> = entries.iter().filter_map(|entry| Some((entry, event_of(entry)?))).collect();
        // An assigner's order begins a work, whatever stands before it: a leaf may be quicker with its first word. One that a leaf
        // repeats, as it found none, stands under its attempt.
        let is_order = |event: &Event| event.attempt == 0 && matches!(event.kind, Kind::Assigned(_));
        let begun: HashSet<WorkId> = events.iter().filter(|(_, event)| is_order(event)).map(|(_, event)| event.work_id).collect();
        for (entry, event) in events {
            let (work, seen) = match touched.entry(event.work_id) {
                Slot::Occupied(slot) => slot.into_mut(),
                Slot::Vacant(slot) => {
                    order.push(event.work_id);
                    match self.open.remove(&event.work_id) {
                        Some(known) => slot.insert(known),
                        None if begun.contains(&event.work_id) => slot.insert((Work::begin(&event), Position::default())),
                        None => match read(log, event.work_id).await? {
                            Some(known) => slot.insert(known),
                            None => continue,
                        },
                    }
                }
            };
            // Its first word came before its order, to a process that is gone, or was dropped from memory.
            let has_gap = event.attempt > 0
                && !matches!(event.kind, Kind::Accepted | Kind::Assigned(_))
                && work.attempts.iter().all(|attempt| attempt.number != event.attempt);
            if has_gap && let Some(known) = read(log, event.work_id).await? {
                (*work, *seen) = known;
            }
            if !seen.reaches(entry.position) {
                work.apply(&event);
                *seen = seen.join(entry.position);
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

    /// Whether the places that it has come to are of the log as it is in this epoch.
    pub(super) fn is_of(&self, epoch: u64) -> bool {
        self.epoch == Some(epoch)
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
        after = after.past(&entries);
        for event in entries.iter().filter_map(event_of) {
            work.get_or_insert_with(|| Work::begin(&event)).apply(&event);
        }
        if entries.len() < READ_BATCH {
            break;
        }
    }
    Ok(work.map(|work| (work, after)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::model::assignment::Assignment;
    use crate::model::event::Side;
    use crate::model::output::Output;
    use crate::telemetry::{new_instance, new_root, new_work_id, now};
    use crate::transport::local;
    use crate::works::record;

    #[tokio::test]
    async fn a_first_word_before_the_order_is_not_forgotten_by_who_comes_later() {
        let dir = tempfile::tempdir().unwrap();
        let store = local::open(dir.path(), &Config::default().lattice.storage).unwrap();
        let log = store.transport().log;
        let assignment: Assignment = serde_json::from_value(serde_json::json!({
            "work_id": new_work_id(), "orchestrator_run_id": new_root().child(1), "originating_station": "here", "target_station": "here",
            "agent_name": "a", "task": "x", "assigned_at": now(), "timeout": "5m", "trace_id": "", "span_id": ""
        }))
        .unwrap();
        let event = |side, attempt, kind| Event {
            work_id: assignment.work_id,
            run_id: assignment.orchestrator_run_id.clone(),
            at: now(),
            station: "here".parse().unwrap(),
            instance: new_instance(),
            side,
            attempt,
            kind,
        };
        let accepted = event(Side::Leaf, 1, Kind::Accepted);
        let order = event(Side::Assigner, 0, Kind::Assigned(Box::new(assignment.clone())));
        let done = event(Side::Leaf, 1, Kind::Complete { result: Output::Inline("y".into()), duration_ms: 1, checks: Vec::new() });
        for event in [&accepted, &order, &done] {
            log.append(vec![record(event.clone())]).await.unwrap();
        }
        let entries = log.read(Filter::AllWork, Position::default(), 9).await.unwrap();
        // One after the other, and by two processes, the second of which comes after the first word.
        for parts in [vec![&entries[..]], vec![&entries[..1], &entries[1..]], vec![&entries[1..2], &entries[2..]], vec![&entries[1..]]] {
            let mut folds = Folds::default();
            let mut rows = Vec::new();
            for part in parts {
                rows = folds.take_in(&*log, part).await.unwrap();
            }
            let [row] = rows.as_slice() else { panic!("one work") };
            assert!(row.work.status.is_settled());
            assert_eq!(row.work.attempts.len(), 1);
        }
        store.close();
    }
}
