//! What fuzzing does with what other stations put onto a hook.

use std::time::Duration;

use bytes::Bytes;

use super::hook::{Hook, Label, Op};
use crate::model::id::InstanceId;
use crate::model::time::Timestamp;
use crate::transport::{Accept, Want};

/// A message a line: `i` and an item's headers with a tab between them, `t` to take what there is, else an operation's body.
pub(crate) fn hook(bytes: &[u8]) {
    let Ok(station) = "north".parse() else { return };
    let now = Timestamp::from_millis(1_700_000_000_000);
    let mut hook = Hook::new(station, true);
    let mut items = Vec::new();
    let mut last = 0;
    for line in bytes.split(|byte| *byte == b'\n') {
        last += 1;
        match line.split_first() {
            Some((b'i', text)) => {
                let Ok(text) = std::str::from_utf8(text) else { continue };
                let (text, turn) = text.split_once('\t').map_or((text, None), |(text, turn)| (text, Some(turn)));
                let Some(label) = Label::from_headers(text, turn) else { continue };
                let again = Label::from_headers(&label.to_header(), Some(&label.turn_header()));
                assert_eq!(again.as_ref(), Some(&label), "a label survives the wire");
                if hook.put_stored(last, label.clone(), Some(Bytes::from_static(b"{}")), now) {
                    items.push((last, label));
                }
            }
            Some((b't', _)) => last = take(&mut hook, last, now),
            _ => {
                if let Err(reason) = hook.fold(last, line) {
                    assert!(!reason.is_empty());
                }
            }
        }
        hook.promote(now);
    }
    assert_eq!(hook.load(now).iter().map(|lane| (lane.waiting + lane.held) as usize).sum::<usize>(), hook.len());
    restores(&hook, &items, last, now);
}

fn take(hook: &mut Hook, last: u64, now: Timestamp) -> u64 {
    let lanes: Vec<_> = hook.load(now).into_iter().map(|lane| (lane.lane, 1)).collect();
    let per_minute = lanes.clone();
    let holder = InstanceId::new(uuid::Uuid::nil());
    let (ageing, lease) = (Duration::from_secs(10), Duration::from_secs(5));
    let want = Want { holder, lanes, room: 1, per_minute, ageing, lease, accept: Accept::default(), only: None, over: None, look: true };
    let room = hook.room(&want, now);
    let _ = (hook.next_free(&want, now), hook.expired(now, 10), hook.has_ready(&want));
    let offered = hook.offer(&want, now);
    let next = hook.next(&want, &room, now);
    hook.withdraw(&offered);
    assert!(hook.left(&want, now).is_empty(), "whoever takes over all leaves nothing");
    let Some((_, seq)) = next else { return last };
    let op = Op::Take { seq, holder, until: now.after(lease), at: Some(now), paced: true };
    assert!(hook.fold(last + 1, &Hook::message(vec![op])).is_ok() || hook.newer.is_some());
    last + 1
}

/// Whoever comes later reads the items that are left and the snapshot, and sees the same.
fn restores(hook: &Hook, items: &[(u64, Label)], last: u64, now: Timestamp) {
    let mut other = Hook::new(hook.station().clone(), true);
    for (seq, label) in items {
        if hook.find(label.id, now).is_some_and(|(known, _)| known == *seq) {
            assert!(other.put_stored(*seq, label.clone(), None, now));
        }
    }
    let folded = other.fold(last + 1, &hook.snapshot(last, now));
    assert_eq!(folded, Ok(()), "a snapshot can be read");
    assert_eq!(other.load(now), hook.load(now), "a snapshot says it all");
}
