//! A hook as a fold over its stream: items that were pushed, and operations that were agreed upon.
//!
//! Pure: whoever proposes an operation decides with its own clock, and has seen every earlier one, since the server takes an operation
//! only right after the last one that its proposer knew. So every process folds the same state.

mod wire;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use self::wire::{Form, Message, Snapshot, State, VERSION, VERSION_WITHOUT_PAUSE};
pub(super) use self::wire::{Label, Op};
use crate::model::id::{StationId, WorkId};
use crate::model::pace::Pace;
use crate::model::time::Timestamp;
use crate::model::turn::Lines;
use crate::transport::{Delivery, LaneLoad, Lapsed, Waits, Want};

/// How many bytes of bodies are kept at hand, in all and of one item.
const BODIES_MAX: usize = 16 << 20;
const BODY_MAX: usize = 64 << 10;
/// How many names of lanes and orchestrators are kept at hand.
const NAMES_MAX: usize = 4096;
/// For how long it is remembered when an orchestrator was served.
const SERVED_KEPT: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone)]
pub(super) struct Slot {
    label: Label,
    attempt: u32,
    state: State,
    body: Option<Bytes>,
}

impl Slot {
    /// Whether it waits until somebody wakes it.
    fn is_held_back(&self) -> bool {
        self.attempt == 0 && self.state == State::Free(Some(self.label.deadline))
    }
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

/// How it was before an operation.
pub(super) enum Undo {
    /// An item, and what its taking has used up.
    Slot(u64, Option<Slot>, Option<Used>),
    /// A lane's pause.
    Pause(Arc<str>, Option<Timestamp>),
}

/// The turn, and the place in the pace of a lane, that a taking has used up.
pub(super) struct Used {
    origin: Arc<str>,
    served: Option<Timestamp>,
    start: Option<(Arc<str>, Timestamp)>,
}

/// A hook as it is now.
pub(super) struct Hook {
    station: StationId,
    /// Whether bodies are kept at hand.
    serves: bool,
    slots: BTreeMap<u64, Slot>,
    by_id: HashMap<WorkId, u64>,
    ready: HashMap<Arc<str>, Lines>,
    /// Until when lanes are paused.
    paused: HashMap<Arc<str>, Timestamp>,
    /// When orchestrators were served last.
    served: HashMap<Arc<str>, Timestamp>,
    /// The starts of the last minute, by lane.
    paces: HashMap<Arc<str>, Pace>,
    /// The names of lanes and orchestrators, each once.
    names: HashSet<Arc<str>>,
    timers: BTreeSet<(Timestamp, u64)>,
    /// What is held although its hold has run out.
    lapsed: BTreeSet<u64>,
    deadlines: BTreeSet<(Timestamp, u64)>,
    held: usize,
    held_back: usize,
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
            paused: HashMap::new(),
            served: HashMap::new(),
            paces: HashMap::new(),
            names: HashSet::new(),
            timers: BTreeSet::new(),
            lapsed: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            held: 0,
            held_back: 0,
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

    /// How many items wait for this.
    pub(super) fn waiting(&self, waits: Waits) -> usize {
        match waits {
            Waits::HeldBack => self.held_back,
            Waits::ToStart => self.slots.len() - self.held - self.held_back,
        }
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

    /// Whether a wanted lane has something that is free, or may be taken over.
    pub(super) fn has_ready(&self, want: &Want) -> bool {
        want.lanes.iter().any(|(lane, room)| *room > 0 && self.ready.contains_key(lane.as_str()))
            || self.lapsed_in(want).any(|(_, slot)| want.takes_over(slot.label.id, slot.attempt))
    }

    /// What has lapsed in the wanted lanes.
    fn lapsed_in<'a>(&'a self, want: &'a Want) -> impl Iterator<Item = (u64, &'a Slot)> {
        let slots = self.lapsed.iter().filter_map(|seq| Some((*seq, self.slots.get(seq)?)));
        slots.filter(|(_, slot)| want.lanes.iter().any(|(lane, room)| *room > 0 && **lane == *slot.label.lane))
    }

    /// Makes ready what this taker may take over, until that is withdrawn.
    pub(super) fn offer(&mut self, want: &Want, now: Timestamp) -> Vec<u64> {
        self.promote(now);
        let over = self.lapsed_in(want).filter(|(_, slot)| want.takes_over(slot.label.id, slot.attempt));
        let over: Vec<(u64, Label)> = over.map(|(seq, slot)| (seq, slot.label.clone())).collect();
        over.iter().for_each(|(seq, label)| self.make_ready(label, *seq));
        over.into_iter().map(|(seq, _)| seq).collect()
    }

    /// Takes an offer back where it was not taken up: others decide for themselves.
    pub(super) fn withdraw(&mut self, offered: &[u64]) {
        for seq in offered {
            if self.lapsed.contains(seq)
                && let Some(label) = self.slots.get(seq).map(|slot| slot.label.clone())
            {
                self.make_unready(&label, *seq);
            }
        }
    }

    /// What may not be taken over, though its hold has run out.
    pub(super) fn left(&self, want: &Want, now: Timestamp) -> Vec<Lapsed> {
        let left = self.lapsed_in(want).filter(|(_, slot)| !self.is_held(slot, now) && !want.takes_over(slot.label.id, slot.attempt));
        left.filter_map(|(seq, _)| self.lapse_of(seq)).collect()
    }

    /// Whose an item is that is held, and whose hold is known to have run out.
    pub(super) fn lapse_of(&self, seq: u64) -> Option<Lapsed> {
        let slot = self.slots.get(&seq).filter(|slot| matches!(slot.state, State::Held(..)))?;
        let delivery = Delivery { station: self.station.clone(), id: slot.label.id, attempt: slot.attempt };
        Some(Lapsed { delivery, lane: slot.label.lane.to_string() })
    }

    /// Puts an item that was pushed, with its body if that is at hand. False when its work has another item already, or it is gone.
    pub(super) fn put_stored(&mut self, seq: u64, mut label: Label, body: Option<Bytes>, now: Timestamp) -> bool {
        if self.slots.contains_key(&seq) {
            return true;
        }
        if seq <= self.upto || self.by_id.contains_key(&label.id) {
            return false;
        }
        // Whose clock is ahead has not waited less than nothing.
        label.turn.since = label.turn.since.min(now);
        (label.lane, label.turn.origin) = (self.name(&label.lane), self.name(&label.turn.origin));
        let body = body.filter(|body| self.serves && body.len() <= BODY_MAX && self.bodies + body.len() <= BODIES_MAX);
        let due = label.held_back.then_some(label.deadline);
        self.set(seq, Some(Slot { label, attempt: 0, state: State::Free(due), body }));
        true
    }

    /// A name, kept once.
    fn name(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.names.get(name) {
            return Arc::clone(known);
        }
        if self.names.len() >= NAMES_MAX {
            self.names.clear();
        }
        let name: Arc<str> = name.into();
        self.names.insert(Arc::clone(&name));
        name
    }

    /// Replaces a slot, keeping every index right; gives what was there.
    fn set(&mut self, seq: u64, slot: Option<Slot>) -> Option<Slot> {
        let before = self.slots.remove(&seq);
        if let Some(slot) = &before {
            self.by_id.remove(&slot.label.id);
            self.deadlines.remove(&(slot.label.deadline, seq));
            self.bodies -= slot.body.as_ref().map_or(0, Bytes::len);
            self.held_back -= usize::from(slot.is_held_back());
            match slot.state {
                State::Free(Some(due)) => _ = self.timers.remove(&(due, seq)),
                State::Free(None) => {}
                State::Held(_, until) => {
                    self.held -= 1;
                    self.timers.remove(&(until, seq));
                    self.lapsed.remove(&seq);
                }
            }
            self.make_unready(&slot.label, seq);
        }
        if let Some(slot) = slot {
            self.by_id.insert(slot.label.id, seq);
            self.deadlines.insert((slot.label.deadline, seq));
            self.bodies += slot.body.as_ref().map_or(0, Bytes::len);
            self.held_back += usize::from(slot.is_held_back());
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
        self.ready.entry(label.lane.clone()).or_default().insert(&label.turn, seq);
    }

    fn make_unready(&mut self, label: &Label, seq: u64) {
        if let Some(lines) = self.ready.get_mut(&label.lane) {
            lines.remove(&label.turn, seq);
            if lines.is_empty() {
                self.ready.remove(&label.lane);
            }
        }
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
                match slot.state {
                    State::Held(..) => _ = self.lapsed.insert(seq),
                    State::Free(_) => {
                        let label = slot.label.clone();
                        self.make_ready(&label, seq);
                    }
                }
                any = true;
            }
        }
        any
    }

    /// When something becomes free.
    pub(super) fn next_timer(&self) -> Option<Timestamp> {
        self.timers.first().map(|(due, _)| *due)
    }

    /// Carries out an operation; gives how it was before, unless the item is gone.
    pub(super) fn apply(&mut self, op: &Op) -> Option<Undo> {
        let seq = match op {
            Op::Take { seq, .. } | Op::Extend { seq, .. } | Op::Release { seq, .. } | Op::Move { seq, .. } | Op::Drop { seq } => *seq,
            Op::Pause { lane, until } => return Some(self.set_pause(lane, *until)),
        };
        let mut slot = self.slots.get(&seq)?.clone();
        let used = match op {
            Op::Take { at: Some(at), paced, .. } => Some(self.use_turn(&slot.label, *at, *paced)),
            _ => None,
        };
        let after = match op {
            Op::Take { holder, until, .. } => {
                slot.attempt = slot.attempt.saturating_add(1);
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
            Op::Drop { .. } | Op::Pause { .. } => None,
        };
        let before = self.set(seq, after);
        Some(Undo::Slot(seq, before, used))
    }

    fn set_pause(&mut self, lane: &str, until: Option<Timestamp>) -> Undo {
        let lane = self.name(lane);
        let before = match until {
            Some(until) => self.paused.insert(lane.clone(), until),
            None => self.paused.remove(&lane),
        };
        Undo::Pause(lane, before)
    }

    fn use_turn(&mut self, label: &Label, at: Timestamp, paced: bool) -> Used {
        if self.served.len() >= NAMES_MAX {
            self.served.clear();
        }
        let served = self.served.insert(label.turn.origin.clone(), at);
        if paced {
            self.paces.entry(label.lane.clone()).or_default().start(at);
        }
        Used { origin: label.turn.origin.clone(), served, start: paced.then(|| (label.lane.clone(), at)) }
    }

    fn give_back(&mut self, used: Used) {
        match used.served {
            Some(at) => _ = self.served.insert(used.origin, at),
            None => _ = self.served.remove(&used.origin),
        }
        if let Some((lane, at)) = used.start
            && let Some(pace) = self.paces.get_mut(&lane)
        {
            pace.take_back(at);
        }
    }

    /// Until when a lane is paused.
    pub(super) fn paused_until(&self, lane: &str, now: Timestamp) -> Option<Timestamp> {
        self.paused.get(lane).copied().filter(|until| *until > now)
    }

    /// Takes operations back, the last one first.
    pub(super) fn undo(&mut self, undo: Vec<Undo>) {
        for undo in undo.into_iter().rev() {
            match undo {
                Undo::Slot(seq, slot, used) => {
                    self.set(seq, slot);
                    used.into_iter().for_each(|used| self.give_back(used));
                }
                Undo::Pause(lane, before) => _ = self.set_pause(&lane, before),
            }
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
        self.paused = all.paused.into_iter().map(|(lane, until)| (self.name(&lane), until)).collect();
        self.served = all.served.into_iter().map(|(origin, at)| (self.name(&origin), at)).collect();
        self.paces = all.paces.into_iter().map(|(lane, starts)| (self.name(&lane), Pace::of(starts))).collect();
    }

    /// Everything that lives, as a message. Items up to `upto` have all been seen.
    pub(super) fn snapshot(&self, upto: u64, now: Timestamp) -> Vec<u8> {
        let items = self.slots.iter().map(|(seq, slot)| (*seq, slot.attempt, slot.state, slot.label.deadline)).collect();
        let paused: Vec<_> =
            self.paused.iter().filter(|(_, until)| **until > now).map(|(lane, until)| (lane.to_string(), *until)).collect();
        // Who waits for nothing has no turn to remember for long.
        let served = self.served.iter().filter(|(_, at)| now.since(**at) < SERVED_KEPT).map(|(origin, at)| (origin.clone(), *at)).collect();
        let paces = self.paces.iter().map(|(lane, pace)| (lane.to_string(), pace.starts().collect())).collect();
        let v = if paused.is_empty() { VERSION_WITHOUT_PAUSE } else { VERSION };
        let message = Message { v, ops: Vec::new(), all: Some(Snapshot { upto, items, paused, served, paces }) };
        serde_json::to_vec(&message).unwrap_or_default()
    }

    /// Operations as a message.
    pub(super) fn message(ops: Vec<Op>) -> Vec<u8> {
        let v = if ops.iter().any(|op| matches!(op, Op::Pause { .. })) { VERSION } else { VERSION_WITHOUT_PAUSE };
        serde_json::to_vec(&Message { v, ops, all: None }).unwrap_or_default()
    }

    /// What may be taken of each wanted lane now.
    pub(super) fn room(&self, want: &Want, now: Timestamp) -> Vec<u32> {
        let room = |(lane, room): &(String, u32)| match (self.paused_until(lane, now), want.pace(lane), self.paces.get(lane.as_str())) {
            (Some(_), ..) => 0,
            (None, Some(per_minute), Some(pace)) => (*room).min(pace.left(per_minute, now)),
            (None, Some(per_minute), None) => (*room).min(per_minute),
            (None, None, _) => *room,
        };
        want.lanes.iter().map(room).collect()
    }

    /// The free item whose turn it is, and its lane's place among those that are wanted.
    pub(super) fn next(&mut self, want: &Want, room: &[u32], now: Timestamp) -> Option<(usize, u64)> {
        self.promote(now);
        loop {
            let served = |origin: &str| self.served.get(origin).copied();
            let fits = |seq: u64| {
                self.slots
                    .get(&seq)
                    .is_some_and(|slot| !self.is_held(slot, now) && want.only.as_ref().is_none_or(|only| only.contains(&slot.label.id)))
            };
            let lanes = want.lanes.iter().zip(room).enumerate().filter(|(_, (_, room))| **room > 0);
            let best = lanes.filter_map(|(at, ((lane, _), _))| {
                let (claim, seq) = self.ready.get(lane.as_str())?.best(want.ageing, served, fits)?;
                Some((claim, at, seq))
            });
            let (_, at, seq) = best.max_by_key(|(claim, ..)| *claim)?;
            let label = self.slots.get(&seq).map(|slot| slot.label.clone())?;
            if label.deadline > now {
                return Some((at, seq));
            }
            // Nobody has to meet it again: `take_expired` finds it by its deadline.
            self.make_unready(&label, seq);
        }
    }

    /// When something of these lanes becomes free at the earliest.
    pub(super) fn next_free(&self, want: &Want, now: Timestamp) -> Option<Timestamp> {
        let wanted = |seq: &u64| self.slots.get(seq).is_some_and(|slot| want.lanes.iter().any(|(lane, _)| **lane == *slot.label.lane));
        let timer = self.timers.iter().find(|(_, seq)| wanted(seq)).map(|(due, _)| *due);
        let spared = (self.held > 0 && self.spared > now).then_some(self.spared);
        let lanes = want.lanes.iter().filter(|(lane, _)| self.ready.contains_key(lane.as_str())).filter_map(|(lane, _)| {
            let pace = want.pace(lane).zip(self.paces.get(lane.as_str()));
            self.paused_until(lane, now).or_else(|| pace.and_then(|(per_minute, pace)| pace.next_at(per_minute, now)))
        });
        timer.into_iter().chain(spared).chain(lanes).min()
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
        Some(Grant { seq, delivery, lane: slot.label.lane.to_string(), deadline: slot.label.deadline, body: slot.body.clone() })
    }

    /// The item of a delivery, unless the delivery is void.
    pub(super) fn of(&self, delivery: &Delivery) -> Option<u64> {
        let seq = *self.by_id.get(&delivery.id)?;
        let slot = self.slots.get(&seq)?;
        (slot.attempt == delivery.attempt && matches!(slot.state, State::Held(..))).then_some(seq)
    }

    /// Whether an item is held although its hold has run out.
    pub(super) fn is_lapsed(&self, seq: u64, now: Timestamp) -> bool {
        self.slots.get(&seq).is_some_and(|slot| matches!(slot.state, State::Held(..)) && !self.is_held(slot, now))
    }

    /// An item, and whether somebody holds it now.
    pub(super) fn find(&self, id: WorkId, now: Timestamp) -> Option<(u64, bool)> {
        let seq = *self.by_id.get(&id)?;
        Some((seq, self.is_held(self.slots.get(&seq)?, now)))
    }

    /// Whether an item is free already, with this deadline if one is given.
    pub(super) fn is_free(&self, seq: u64, deadline: Option<Timestamp>) -> bool {
        let free = |slot: &Slot| slot.state == State::Free(None) && deadline.is_none_or(|deadline| deadline == slot.label.deadline);
        self.slots.get(&seq).is_some_and(free)
    }

    /// How full the lanes are.
    pub(super) fn load(&self, now: Timestamp) -> Vec<LaneLoad> {
        let mut lanes: BTreeMap<&str, (u32, u32, u32)> = BTreeMap::new();
        for slot in self.slots.values() {
            let (waiting, held, held_back) = lanes.entry(&slot.label.lane).or_default();
            *(if self.is_held(slot, now) { held } else { waiting }) += 1;
            *held_back += u32::from(slot.is_held_back());
        }
        for lane in self.paused.keys().filter(|lane| self.paused_until(lane, now).is_some()) {
            lanes.entry(lane).or_default();
        }
        let load = |(lane, (waiting, held, held_back)): (&str, (u32, u32, u32))| LaneLoad {
            lane: lane.to_owned(),
            waiting,
            held,
            held_back,
            paused_until: self.paused_until(lane, now),
        };
        lanes.into_iter().map(load).collect()
    }
}

/// Until when something is held.
pub(super) fn until(now: Timestamp, lease: Duration) -> Timestamp {
    now.after(lease)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::id::InstanceId;
    use crate::model::turn::Turn;

    #[test]
    fn labels_survive_any_lane() {
        for lane in ["a", "a b~%\u{e9}\n", "", "100%"] {
            let id = WorkId::new(uuid::Uuid::now_v7());
            let turn = Turn::new("south", -7, Timestamp::from_millis(5), Duration::from_secs(1));
            let label = Label { id, turn, deadline: Timestamp::from_millis(9), lane: lane.into(), held_back: false };
            let text = label.to_header();
            assert!(text.bytes().all(|b| b == b' ' || b.is_ascii_graphic()), "{text:?}");
            assert_eq!(Label::from_headers(&text, Some(&label.turn_header())), Some(label));
            // Of an older program.
            assert_eq!(Label::from_headers(&text, None).unwrap().turn.urgency, -7);
        }
    }

    fn resident_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    fn filled(count: u64, body: usize) -> Hook {
        let mut hook = Hook::new("north".parse().unwrap(), true);
        for seq in 1..=count {
            let priority = i32::try_from(seq.wrapping_mul(2_654_435_761) % 2001).unwrap() - 1000;
            let origin = format!("station-{}", seq % 10);
            let turn = Turn::new(origin, priority, Timestamp::from_millis(1000), Duration::from_secs(10));
            let (id, lane) = (WorkId::new(uuid::Uuid::now_v7()), format!("agent-{}~0123abcd", seq % 5).into());
            let label =
                Label { id, turn, deadline: Timestamp::from_millis(1_000_000 + i64::try_from(seq).unwrap()), lane, held_back: false };
            assert!(hook.put_stored(seq, label, Some(Bytes::from(vec![b'x'; body])), Timestamp::from_millis(1000)));
        }
        hook
    }

    #[test]
    fn ten_thousand_items_take_under_2_kb_each_and_choosing_one_does_not_grow_with_them() {
        const MANY: u64 = 10_000;
        // About what an order with a short task has.
        const BODY: usize = 600;
        let now = Timestamp::from_millis(2000);
        let want = Want {
            holder: InstanceId::new(uuid::Uuid::nil()),
            lanes: (0..5).map(|n| (format!("agent-{n}~0123abcd"), 1)).collect(),
            room: 1,
            per_minute: Vec::new(),
            ageing: Duration::from_secs(10),
            lease: Duration::from_secs(5),
            accept: crate::transport::Accept::default(),
            only: None,
            over: None,
            look: true,
        };
        let best_of = |count: u64| {
            let mut hook = filled(count, BODY);
            let room = hook.room(&want, now);
            let took = (0..200).map(|_| {
                let start = std::time::Instant::now();
                let (_, seq) = hook.next(&want, &room, now).unwrap();
                let took = start.elapsed();
                hook.apply(&Op::Take { seq, holder: want.holder, until: now.after(want.lease), at: Some(now), paced: false });
                took
            });
            let mut took: Vec<Duration> = took.collect();
            took.sort_unstable();
            (took[100], hook)
        };
        let before = resident_kib();
        let (large, hook) = best_of(MANY);
        let each = (resident_kib().saturating_sub(before)) * 1024 / MANY;
        let (small, _) = best_of(100 * 5);
        eprintln!(
            "of {MANY} items of {BODY} bytes each: {each} bytes of memory per item; choosing the next takes {large:?}, of 500 {small:?}"
        );
        assert_eq!(hook.len() as u64, MANY);
        assert!(each < 2048, "{each} bytes per item");
        assert!(large < small * 5 + Duration::from_micros(50), "{large:?} against {small:?}");
    }
}
