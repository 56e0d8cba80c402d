//! A hook as a fold over its stream: items that were pushed, and operations that were agreed upon.
//!
//! Pure: whoever proposes an operation decides with its own clock, and has seen every earlier one, since the server takes an operation
//! only right after the last one that its proposer knew. So every process folds the same state.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::model::id::{InstanceId, StationId, WorkId};
use crate::model::time::Timestamp;
use crate::transport::{Delivery, LaneLoad, Want};

/// The version of the operations' form.
const VERSION: u32 = 1;
/// How many bytes of bodies are kept at hand, in all and of one item.
const BODIES_MAX: usize = 16 << 20;
const BODY_MAX: usize = 64 << 10;

/// What is agreed upon of an item, which is named by the sequence of its message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Op {
    /// Held by somebody until a moment: a new attempt.
    #[serde(rename = "t")]
    Take { seq: u64, holder: InstanceId, until: Timestamp },
    /// Held on to.
    #[serde(rename = "x")]
    Extend { seq: u64, until: Timestamp, deadline: Option<Timestamp> },
    /// Free again, not before a moment.
    #[serde(rename = "r")]
    Release { seq: u64, at: Option<Timestamp>, deadline: Option<Timestamp> },
    /// Its deadline was moved.
    #[serde(rename = "m")]
    Move { seq: u64, deadline: Timestamp },
    /// Gone.
    #[serde(rename = "d")]
    Drop { seq: u64 },
}

/// A message about a hook's items.
#[derive(Debug, Serialize, Deserialize)]
struct Message {
    v: u32,
    #[serde(default)]
    ops: Vec<Op>,
    #[serde(default)]
    all: Option<Snapshot>,
}

/// What every message has, of whatever version.
#[derive(Deserialize)]
struct Form {
    v: u32,
}

/// All items that live, so that what was said before may be forgotten.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Snapshot {
    /// Items up to here that are not listed are gone.
    upto: u64,
    items: Vec<(u64, u32, State, Timestamp)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
enum State {
    #[serde(rename = "f")]
    Free(Option<Timestamp>),
    #[serde(rename = "h")]
    Held(InstanceId, Timestamp),
}

/// What an item's message says of it, in a header.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Label {
    pub(super) id: WorkId,
    pub(super) priority: i32,
    pub(super) deadline: Timestamp,
    pub(super) lane: String,
}

impl Label {
    /// As a header's text: whatever is not plain in the lane is escaped.
    pub(super) fn to_header(&self) -> String {
        let plain = |b: u8| b.is_ascii_graphic() && b != b'%';
        let lane: String = self.lane.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02x}") }).collect();
        format!("{} {} {} {lane}", self.id, self.priority, self.deadline.as_millis())
    }

    pub(super) fn from_header(text: &str) -> Option<Self> {
        let mut parts = text.splitn(4, ' ');
        let (id, priority, deadline) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let mut lane = Vec::new();
        let mut rest = parts.next()?.bytes();
        while let Some(b) = rest.next() {
            lane.push(if b == b'%' {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            } else {
                b
            });
        }
        Some(Self { id, priority, deadline: Timestamp::from_millis(deadline), lane: String::from_utf8(lane).ok()? })
    }
}

#[derive(Debug, Clone)]
struct Slot {
    label: Label,
    attempt: u32,
    state: State,
    body: Option<Bytes>,
}

/// What a taker gets; the body is missing where it is not at hand.
#[derive(Debug, Clone)]
pub(super) struct Grant {
    pub(super) seq: u64,
    pub(super) delivery: Delivery,
    pub(super) lane: String,
    pub(super) deadline: Timestamp,
    pub(super) body: Option<Bytes>,
}

/// How an item was before an operation.
pub(super) struct Undo(u64, Option<Slot>);

/// A hook as it is now.
pub(super) struct Hook {
    station: StationId,
    /// Whether bodies are kept at hand.
    serves: bool,
    slots: BTreeMap<u64, Slot>,
    by_id: HashMap<WorkId, u64>,
    ready: HashMap<String, BTreeSet<(Reverse<i32>, u64)>>,
    timers: BTreeSet<(Timestamp, u64)>,
    deadlines: BTreeSet<(Timestamp, u64)>,
    held: usize,
    bodies: usize,
    /// The sequence of the last operation that was folded.
    pub(super) last_op: u64,
    /// The form of a message that a newer program wrote: what it says of the items is not known here.
    pub(super) newer: Option<u32>,
    pub(super) ops_since_snapshot: usize,
    /// Items up to here are gone unless they are here.
    upto: u64,
    /// Until then nobody takes over what somebody held: its holder could not say that it lives.
    spared: Timestamp,
}

impl Hook {
    pub(super) fn new(station: StationId, serves: bool) -> Self {
        Self {
            station,
            serves,
            slots: BTreeMap::new(),
            by_id: HashMap::new(),
            ready: HashMap::new(),
            timers: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            held: 0,
            bodies: 0,
            last_op: 0,
            newer: None,
            ops_since_snapshot: 0,
            upto: 0,
            spared: Timestamp::from_millis(0),
        }
    }

    pub(super) fn knows(&self, id: WorkId) -> bool {
        self.by_id.contains_key(&id)
    }

    /// How many items nobody holds.
    pub(super) fn waiting(&self) -> usize {
        self.slots.len() - self.held
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The first item that lives.
    pub(super) fn first(&self) -> Option<u64> {
        self.slots.keys().next().copied()
    }

    /// Whose hook it is.
    pub(super) fn station(&self) -> &StationId {
        &self.station
    }

    /// Whether a wanted lane has something that is free.
    pub(super) fn has_ready(&self, want: &Want) -> bool {
        want.lanes.iter().any(|(lane, room)| *room > 0 && self.ready.contains_key(lane))
    }

    /// Puts an item that was pushed, with its body if that is at hand. False when its work has another item already, or it is gone.
    pub(super) fn put_stored(&mut self, seq: u64, label: Label, body: Option<Bytes>) -> bool {
        if self.slots.contains_key(&seq) {
            return true;
        }
        if seq <= self.upto || self.by_id.contains_key(&label.id) {
            return false;
        }
        let body = body.filter(|body| self.serves && body.len() <= BODY_MAX && self.bodies + body.len() <= BODIES_MAX);
        self.set(seq, Some(Slot { label, attempt: 0, state: State::Free(None), body }));
        true
    }

    /// Replaces a slot, keeping every index right; gives what was there.
    fn set(&mut self, seq: u64, slot: Option<Slot>) -> Option<Slot> {
        let before = self.slots.remove(&seq);
        if let Some(slot) = &before {
            self.by_id.remove(&slot.label.id);
            self.deadlines.remove(&(slot.label.deadline, seq));
            self.bodies -= slot.body.as_ref().map_or(0, Bytes::len);
            match slot.state {
                State::Free(Some(due)) => _ = self.timers.remove(&(due, seq)),
                State::Free(None) => {}
                State::Held(_, until) => {
                    self.held -= 1;
                    self.timers.remove(&(until, seq));
                }
            }
            if let Some(lane) = self.ready.get_mut(&slot.label.lane) {
                lane.remove(&(Reverse(slot.label.priority), seq));
                if lane.is_empty() {
                    self.ready.remove(&slot.label.lane);
                }
            }
        }
        if let Some(slot) = slot {
            self.by_id.insert(slot.label.id, seq);
            self.deadlines.insert((slot.label.deadline, seq));
            self.bodies += slot.body.as_ref().map_or(0, Bytes::len);
            match slot.state {
                State::Free(Some(due)) => _ = self.timers.insert((due, seq)),
                State::Free(None) => self.make_ready(&slot.label, seq),
                State::Held(_, until) => {
                    self.held += 1;
                    self.timers.insert((until, seq));
                }
            }
            self.slots.insert(seq, slot);
        }
        before
    }

    fn make_ready(&mut self, label: &Label, seq: u64) {
        self.ready.entry(label.lane.clone()).or_default().insert((Reverse(label.priority), seq));
    }

    /// Lets nobody take over, until this moment, what somebody held.
    pub(super) fn spare(&mut self, until: Timestamp) {
        self.spared = self.spared.max(until);
    }

    /// Whether somebody holds an item, or may not have been able to say so.
    fn is_held(&self, slot: &Slot, now: Timestamp) -> bool {
        matches!(slot.state, State::Held(_, until) if until > now || self.spared > now)
    }

    /// Makes free what is due; says whether anything was.
    pub(super) fn promote(&mut self, now: Timestamp) -> bool {
        let mut any = false;
        while let Some(&(due, seq)) = self.timers.first()
            && due <= now
        {
            self.timers.remove(&(due, seq));
            if let Some(slot) = self.slots.get(&seq) {
                let label = slot.label.clone();
                self.make_ready(&label, seq);
                any = true;
            }
        }
        any
    }

    /// When something becomes free.
    pub(super) fn next_timer(&self) -> Option<Timestamp> {
        self.timers.first().map(|(due, _)| *due)
    }

    /// Carries out an operation; gives how the item was before, unless it is gone.
    pub(super) fn apply(&mut self, op: &Op) -> Option<Undo> {
        let seq = match op {
            Op::Take { seq, .. } | Op::Extend { seq, .. } | Op::Release { seq, .. } | Op::Move { seq, .. } | Op::Drop { seq } => *seq,
        };
        let mut slot = self.slots.get(&seq)?.clone();
        let after = match op {
            Op::Take { holder, until, .. } => {
                slot.attempt += 1;
                slot.state = State::Held(*holder, *until);
                Some(slot)
            }
            Op::Extend { until, deadline, .. } => {
                if let State::Held(holder, _) = slot.state {
                    slot.state = State::Held(holder, *until);
                }
                slot.label.deadline = deadline.unwrap_or(slot.label.deadline);
                Some(slot)
            }
            Op::Release { at, deadline, .. } => {
                slot.state = State::Free(*at);
                slot.label.deadline = deadline.unwrap_or(slot.label.deadline);
                Some(slot)
            }
            Op::Move { deadline, .. } => {
                slot.label.deadline = *deadline;
                Some(slot)
            }
            Op::Drop { .. } => None,
        };
        let before = self.set(seq, after);
        Some(Undo(seq, before))
    }

    /// Takes operations back, the last one first.
    pub(super) fn undo(&mut self, undo: Vec<Undo>) {
        for Undo(seq, slot) in undo.into_iter().rev() {
            self.set(seq, slot);
        }
    }

    /// Folds a message about items. Ours, already carried out, is known by its sequence.
    ///
    /// # Errors
    /// Why it can't be read.
    pub(super) fn fold(&mut self, seq: u64, body: &[u8]) -> Result<(), String> {
        if seq <= self.last_op {
            return Ok(());
        }
        // What says nothing has its place all the same.
        self.last_op = seq;
        let Form { v } = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        if v > VERSION {
            self.newer = Some(v);
            return Err(format!("it has the form of version {v}, and this program knows up to {VERSION}"));
        }
        let message: Message = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        self.ops_since_snapshot += 1;
        if let Some(all) = message.all {
            self.reset(all);
        }
        for op in &message.ops {
            self.apply(op);
        }
        Ok(())
    }

    fn reset(&mut self, all: Snapshot) {
        self.ops_since_snapshot = 0;
        self.upto = self.upto.max(all.upto);
        let listed: BTreeSet<u64> = all.items.iter().map(|(seq, ..)| *seq).collect();
        let gone: Vec<u64> = self.slots.range(..=all.upto).map(|(seq, _)| *seq).filter(|seq| !listed.contains(seq)).collect();
        for seq in gone {
            self.set(seq, None);
        }
        for (seq, attempt, state, deadline) in all.items {
            if let Some(mut slot) = self.slots.get(&seq).cloned() {
                (slot.attempt, slot.state, slot.label.deadline) = (attempt, state, deadline);
                self.set(seq, Some(slot));
            }
        }
    }

    /// Everything that lives, as a message. Items up to `upto` have all been seen.
    pub(super) fn snapshot(&self, upto: u64) -> Vec<u8> {
        let items = self.slots.iter().map(|(seq, slot)| (*seq, slot.attempt, slot.state, slot.label.deadline)).collect();
        let message = Message { v: VERSION, ops: Vec::new(), all: Some(Snapshot { upto, items }) };
        serde_json::to_vec(&message).unwrap_or_default()
    }

    /// Operations as a message.
    pub(super) fn message(ops: Vec<Op>) -> Vec<u8> {
        serde_json::to_vec(&Message { v: VERSION, ops, all: None }).unwrap_or_default()
    }

    /// The most urgent free items of the wanted lanes, in order.
    pub(super) fn urgent(&mut self, want: &Want, now: Timestamp) -> Vec<u64> {
        self.promote(now);
        let mut candidates: Vec<(Reverse<i32>, u64)> = Vec::new();
        for (lane, room) in &want.lanes {
            let room = (*room).min(want.room) as usize;
            let Some(ready) = self.ready.get(lane) else { continue };
            let (mut found, mut expired) = (Vec::new(), Vec::new());
            for entry in ready {
                if found.len() >= room {
                    break;
                }
                let Some(slot) = self.slots.get(&entry.1) else { continue };
                if self.is_held(slot, now) {
                    continue;
                }
                if slot.label.deadline <= now {
                    expired.push(*entry);
                } else if want.only.as_ref().is_none_or(|only| only.contains(&slot.label.id)) {
                    found.push(*entry);
                }
            }
            candidates.extend(found);
            // Nobody has to meet them again: `take_expired` finds them by their deadline.
            if let Some(ready) = self.ready.get_mut(lane) {
                expired.iter().for_each(|entry| _ = ready.remove(entry));
            }
        }
        candidates.sort_unstable();
        candidates.dedup();
        candidates.truncate(want.room as usize);
        candidates.into_iter().map(|(_, seq)| seq).collect()
    }

    /// When a delayed or held item of these lanes becomes free at the earliest.
    pub(super) fn next_free(&self, lanes: &[(String, u32)], now: Timestamp) -> Option<Timestamp> {
        let wanted = |seq: &u64| self.slots.get(seq).is_some_and(|slot| lanes.iter().any(|(lane, _)| *lane == slot.label.lane));
        let next = self.timers.iter().find(|(_, seq)| wanted(seq)).map(|(due, _)| *due);
        next.into_iter().chain((self.held > 0 && self.spared > now).then_some(self.spared)).min()
    }

    /// Free items whose deadline has passed.
    pub(super) fn expired(&self, now: Timestamp, limit: usize) -> Vec<u64> {
        let passed = self.deadlines.iter().take_while(|(deadline, _)| *deadline <= now);
        passed.map(|(_, seq)| *seq).filter(|seq| self.slots.get(seq).is_some_and(|slot| !self.is_held(slot, now))).take(limit).collect()
    }

    /// What the taker of an item that was just taken gets.
    pub(super) fn grant(&self, seq: u64) -> Option<Grant> {
        let slot = self.slots.get(&seq)?;
        let delivery = Delivery { station: self.station.clone(), id: slot.label.id, attempt: slot.attempt };
        Some(Grant { seq, delivery, lane: slot.label.lane.clone(), deadline: slot.label.deadline, body: slot.body.clone() })
    }

    /// The item of a delivery, unless the delivery is void.
    pub(super) fn of(&self, delivery: &Delivery) -> Option<u64> {
        let seq = *self.by_id.get(&delivery.id)?;
        let slot = self.slots.get(&seq)?;
        (slot.attempt == delivery.attempt && matches!(slot.state, State::Held(..))).then_some(seq)
    }

    /// An item, and whether somebody holds it now.
    pub(super) fn find(&self, id: WorkId, now: Timestamp) -> Option<(u64, bool)> {
        let seq = *self.by_id.get(&id)?;
        Some((seq, self.is_held(self.slots.get(&seq)?, now)))
    }

    /// How full the lanes are.
    pub(super) fn load(&self, now: Timestamp) -> Vec<LaneLoad> {
        let mut lanes: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
        for slot in self.slots.values() {
            let (waiting, held) = lanes.entry(&slot.label.lane).or_default();
            *(if self.is_held(slot, now) { held } else { waiting }) += 1;
        }
        lanes.into_iter().map(|(lane, (waiting, held))| LaneLoad { lane: lane.to_owned(), waiting, held }).collect()
    }
}

/// Until when something is held.
pub(super) fn until(now: Timestamp, lease: Duration) -> Timestamp {
    now.after(lease)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_survive_any_lane() {
        for lane in ["a", "a b~%\u{e9}\n", "", "100%"] {
            let id = WorkId::new(uuid::Uuid::now_v7());
            let label = Label { id, priority: -7, deadline: Timestamp::from_millis(9), lane: lane.to_owned() };
            let text = label.to_header();
            assert!(text.bytes().all(|b| b == b' ' || b.is_ascii_graphic()), "{text:?}");
            assert_eq!(Label::from_header(&text), Some(label));
        }
    }
}
