//! What a hook's messages say.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::id::{InstanceId, WorkId};
use crate::model::time::Timestamp;
use crate::model::turn::Turn;

/// The version of the operations' form, and the one of those that know of no pause.
pub(super) const VERSION: u32 = 2;
pub(super) const VERSION_WITHOUT_PAUSE: u32 = 1;

/// What is agreed upon of an item, which is named by the sequence of its message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in super::super) enum Op {
    /// Held by somebody until a moment: a new attempt.
    #[serde(rename = "t")]
    Take {
        seq: u64,
        holder: InstanceId,
        until: Timestamp,
        /// When, if it is somebody's turn that is used up.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        at: Option<Timestamp>,
        /// It counts for the pace of its lane.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        paced: bool,
    },
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
    /// Nobody takes from a lane before a moment; without one, everybody may.
    #[serde(rename = "p")]
    Pause { lane: String, until: Option<Timestamp> },
}

/// A message about a hook's items.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Message {
    pub(super) v: u32,
    #[serde(default)]
    pub(super) ops: Vec<Op>,
    #[serde(default)]
    pub(super) all: Option<Snapshot>,
}

/// What every message has, of whatever version.
#[derive(Deserialize)]
pub(super) struct Form {
    pub(super) v: u32,
}

/// All items that live, so that what was said before may be forgotten.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Snapshot {
    /// Items up to here that are not listed are gone.
    pub(super) upto: u64,
    pub(super) items: Vec<(u64, u32, State, Timestamp)>,
    /// Until when lanes are paused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) paused: Vec<(String, Timestamp)>,
    /// When orchestrators were served last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) served: Vec<(Arc<str>, Timestamp)>,
    /// The starts of the last minute, by lane and second.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) paces: Vec<(String, Vec<(i64, u32)>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) enum State {
    #[serde(rename = "f")]
    Free(Option<Timestamp>),
    #[serde(rename = "h")]
    Held(InstanceId, Timestamp),
}

/// What an item's message says of it, in a header.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) struct Label {
    pub(in super::super) id: WorkId,
    pub(in super::super) turn: Turn,
    pub(in super::super) deadline: Timestamp,
    pub(in super::super) lane: Arc<str>,
    /// It stays where it is until somebody wakes it; said in a header of its own.
    pub(in super::super) held_back: bool,
}

impl Label {
    /// As a header's text: whatever is not plain in the lane is escaped.
    pub(in super::super) fn to_header(&self) -> String {
        let plain = |b: u8| b.is_ascii_graphic() && b != b'%';
        let lane: String = self.lane.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02x}") }).collect();
        format!("{} {} {} {lane}", self.id, self.turn.priority, self.deadline.as_millis())
    }

    /// Its place among what waits, as the text of one more header.
    pub(in super::super) fn turn_header(&self) -> String {
        let Turn { origin, since, urgency, .. } = &self.turn;
        format!("{urgency} {} {origin}", since.as_millis())
    }

    /// From both texts; what has no place is of an older program, and goes before those that have one.
    pub(in super::super) fn from_headers(text: &str, turn: Option<&str>) -> Option<Self> {
        let mut parts = text.splitn(4, ' ');
        let (id, priority, deadline) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let place = |text: &str| {
            let mut parts = text.splitn(3, ' ');
            let (urgency, since) = (parts.next()?.parse().ok()?, Timestamp::from_millis(parts.next()?.parse().ok()?));
            Some(Turn { origin: parts.next()?.into(), priority, since, urgency })
        };
        let old = || Turn { origin: "-".into(), priority, since: Timestamp::from_millis(0), urgency: i64::from(priority) };
        let turn = turn.and_then(place).unwrap_or_else(old);
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
        let lane = String::from_utf8(lane).ok()?.into();
        Some(Self { id, turn, deadline: Timestamp::from_millis(deadline), lane, held_back: false })
    }
}
