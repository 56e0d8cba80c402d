//! What callers want of a hook, and what is decided about many wants at once.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use super::super::hook::{Grant, Hook, Label, Op, Undo, until};
use super::super::stream::Stream;
use super::keeper::Open;
use crate::model::id::{InstanceId, WorkId};
use crate::model::time::Timestamp;
use crate::transport::{Delivery, Error, Item, LaneLoad, Lapsed, Pushed, Result, Waits, Want, takes_over};

pub(super) type Reply<T> = oneshot::Sender<Result<T>>;

/// What a caller wants of a hook.
pub(super) enum Ask {
    Push(Box<Item>, u32, Reply<std::result::Result<Ready, Pushed>>),
    Pushed(u64, Label, Bytes),
    Abandoned(Waits),
    Take(Want, Reply<Grants>),
    Expired(InstanceId, Duration, usize, Option<Vec<Delivery>>, Reply<Grants>),
    Extend(Vec<Delivery>, Duration, Option<Timestamp>, Reply<Vec<Delivery>>),
    Holds(Delivery, Reply<bool>),
    Settle(Delivery, Reply<bool>),
    Release(Delivery, Timestamp, Option<Timestamp>, Reply<bool>),
    Wake(WorkId, Option<Timestamp>, Reply<bool>),
    Remove(WorkId, Reply<bool>),
    Knows(WorkId, Reply<bool>),
    Pause(String, Timestamp, Reply<()>),
    Load(Reply<Vec<LaneLoad>>),
}

/// What a taker gets, when there may be more, and what it may not take over.
pub(super) type Grants = (Vec<Grant>, Option<Timestamp>, Vec<Lapsed>);

/// There is room for the item: the caller publishes it to this stream.
pub(super) struct Ready(pub(super) Arc<Stream>, pub(super) Box<Item>, pub(super) OnItsWay);

/// An item on its way to its stream, for which room is kept until it is there or given up, be it by somebody who has gone before the
/// answer came.
pub(super) struct OnItsWay {
    asks: Option<mpsc::Sender<Ask>>,
    tasks: TaskTracker,
    waits: Waits,
}

impl OnItsWay {
    /// Tells whoever keeps the room that the item is there.
    pub(super) async fn arrived(mut self, seq: u64, label: Label, body: Bytes) {
        if let Some(asks) = &self.asks {
            let _ = asks.send(Ask::Pushed(seq, label, body)).await;
        }
        self.asks = None;
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        let Some(asks) = self.asks.take() else { return };
        // Whoever gives up cannot wait.
        if let Err(mpsc::error::TrySendError::Full(ask)) = asks.try_send(Ask::Abandoned(self.waits)) {
            self.tasks.spawn(async move { _ = asks.send(ask).await });
        }
    }
}

impl Ask {
    /// Whether the answer would be wrong if something had not been heard of yet.
    pub(super) fn wants_news(&self, hook: &Hook) -> bool {
        match self {
            Self::Push(item, limit, _) => {
                let beside_nothing = item.beside.is_some_and(|beside| !hook.knows(beside));
                !hook.knows(item.id) && (beside_nothing || hook.waiting(Waits::of(item)) >= *limit as usize)
            }
            Self::Wake(id, ..) | Self::Remove(id, _) | Self::Knows(id, _) => !hook.knows(*id),
            Self::Settle(delivery, _) | Self::Holds(delivery, _) | Self::Release(delivery, ..) => hook.of(delivery).is_none(),
            Self::Extend(held, ..) => held.iter().any(|delivery| hook.of(delivery).is_none()),
            Self::Load(_) | Self::Pause(..) => true,
            Self::Take(want, _) => want.look && want.room > 0 && !hook.has_ready(want),
            Self::Expired(..) | Self::Pushed(..) | Self::Abandoned(_) => false,
        }
    }

    /// Whoever asked may have gone: an operation stands all the same.
    pub(super) fn answer(self, answer: Answer, open: &Open) {
        match (self, answer) {
            (Self::Push(item, _, reply), Answer::Ready) => {
                let coming = OnItsWay { asks: open.asks.upgrade(), tasks: open.tasks.clone(), waits: Waits::of(&item) };
                _ = reply.send(Ok(Ok(Ready(Arc::clone(&open.stream), item, coming))));
            }
            (Self::Push(item, limit, reply), Answer::Full) => {
                let waits = Waits::of(&item);
                _ = reply.send(Err(Error::Full { station: open.hook.station().clone(), limit, waits }));
            }
            (Self::Push(_, _, reply), Answer::Elsewhere) => _ = reply.send(Ok(Err(Pushed::Elsewhere))),
            (Self::Push(_, _, reply), _) => _ = reply.send(Ok(Err(Pushed::Known))),
            (Self::Take(_, reply) | Self::Expired(.., reply), Answer::Grants(grants)) => _ = reply.send(Ok(grants)),
            (Self::Extend(.., reply), Answer::Lost(lost)) => _ = reply.send(Ok(lost)),
            (
                Self::Holds(_, reply)
                | Self::Settle(_, reply)
                | Self::Release(.., reply)
                | Self::Wake(.., reply)
                | Self::Remove(_, reply)
                | Self::Knows(_, reply),
                Answer::Is(is),
            ) => _ = reply.send(Ok(is)),
            (Self::Pause(.., reply), _) => _ = reply.send(Ok(())),
            (Self::Load(reply), Answer::Load(load)) => _ = reply.send(Ok(load)),
            _ => {}
        }
    }

    pub(super) fn refuse(self, error: &Error) {
        let error = error.clone();
        match self {
            Self::Push(.., reply) => _ = reply.send(Err(error)),
            Self::Take(_, reply) | Self::Expired(.., reply) => _ = reply.send(Err(error)),
            Self::Extend(.., reply) => _ = reply.send(Err(error)),
            Self::Holds(_, reply)
            | Self::Settle(_, reply)
            | Self::Release(.., reply)
            | Self::Wake(.., reply)
            | Self::Remove(_, reply)
            | Self::Knows(_, reply) => {
                _ = reply.send(Err(error));
            }
            Self::Pause(.., reply) => _ = reply.send(Err(error)),
            Self::Load(reply) => _ = reply.send(Err(error)),
            Self::Pushed(..) | Self::Abandoned(_) => {}
        }
    }
}

/// What is proposed for a batch of wants.
pub(super) struct Draft {
    pub(super) now: Timestamp,
    pub(super) ops: Vec<Op>,
    pub(super) undo: Vec<Undo>,
    pub(super) raise: bool,
}

/// What a caller is told once the operations stand.
pub(super) enum Answer {
    Known,
    Elsewhere,
    Full,
    Ready,
    Nothing,
    Grants(Grants),
    Lost(Vec<Delivery>),
    Is(bool),
    Load(Vec<LaneLoad>),
}

impl Draft {
    fn add(&mut self, hook: &mut Hook, op: Op) {
        self.undo.extend(hook.apply(&op));
        self.ops.push(op);
    }

    /// Drops what has settled, and is still whose it was.
    pub(super) fn let_go(&mut self, open: &mut Open) {
        for delivery in &open.settled {
            if let Some(seq) = open.hook.of(delivery) {
                self.add(&mut open.hook, Op::Drop { seq });
            }
        }
    }

    pub(super) fn decide(&mut self, open: &mut Open, ask: &Ask) -> Answer {
        let now = self.now;
        let hook = &mut open.hook;
        match ask {
            Ask::Push(item, limit, _) => {
                if hook.knows(item.id) {
                    Answer::Known
                } else if item.beside.is_some_and(|beside| !hook.knows(beside)) {
                    Answer::Elsewhere
                } else if hook.waiting(Waits::of(item)) + open.coming.of(Waits::of(item)) >= *limit as usize {
                    Answer::Full
                } else {
                    open.coming.begin(Waits::of(item));
                    Answer::Ready
                }
            }
            Ask::Pushed(seq, label, body) => {
                let small = body.len() as u64 <= open.stream.link.settings.body_inline_max.get();
                hook.put_stored(*seq, label.clone(), small.then(|| body.clone()), now);
                self.raise = true;
                Answer::Nothing
            }
            Ask::Abandoned(_) => Answer::Nothing,
            Ask::Take(want, _) => {
                let mut grants = Vec::new();
                let mut room = hook.room(want, now);
                let offered = hook.offer(want, now);
                while grants.len() < want.room as usize
                    && let Some((lane, seq)) = hook.next(want, &room, now)
                {
                    room[lane] -= 1;
                    let paced = want.pace(&want.lanes[lane].0).is_some();
                    self.add(hook, Op::Take { seq, holder: want.holder, until: until(now, want.lease), at: Some(now), paced });
                    grants.extend(hook.grant(seq));
                }
                hook.withdraw(&offered);
                Answer::Grants((grants, hook.next_free(want, now), hook.left(want, now)))
            }
            Ask::Expired(holder, lease, limit, over, _) => {
                let (mut grants, mut left) = (Vec::new(), Vec::new());
                for seq in hook.expired(now, *limit) {
                    let lapsed = hook.lapse_of(seq);
                    if let Some(lapsed) =
                        lapsed.filter(|Lapsed { delivery, .. }| !takes_over(over.as_deref(), delivery.id, delivery.attempt))
                    {
                        left.push(lapsed);
                        continue;
                    }
                    self.add(hook, Op::Take { seq, holder: *holder, until: until(now, *lease), at: None, paced: false });
                    grants.extend(hook.grant(seq));
                }
                Answer::Grants((grants, None, left))
            }
            Ask::Extend(held, lease, deadline, _) => {
                let mut lost = Vec::new();
                for delivery in held {
                    match hook.of(delivery) {
                        Some(seq) => self.add(hook, Op::Extend { seq, until: until(now, *lease), deadline: *deadline }),
                        None => lost.push(delivery.clone()),
                    }
                }
                Answer::Lost(lost)
            }
            Ask::Holds(delivery, _) => Answer::Is(hook.of(delivery).is_some()),
            Ask::Settle(delivery, _) => {
                let held = hook.of(delivery);
                held.into_iter().for_each(|seq| self.add(hook, Op::Drop { seq }));
                Answer::Is(held.is_some())
            }
            Ask::Release(delivery, at, deadline, _) => {
                let held = hook.of(delivery);
                if let Some(seq) = held {
                    self.add(hook, Op::Release { seq, at: (*at > now).then_some(*at), deadline: *deadline });
                    self.raise = true;
                }
                Answer::Is(held.is_some())
            }
            Ask::Wake(id, deadline, _) => match hook.find(*id, now) {
                None => Answer::Is(false),
                Some((seq, true)) => {
                    deadline.iter().for_each(|deadline| self.add(hook, Op::Move { seq, deadline: *deadline }));
                    Answer::Is(false)
                }
                // It waits for nobody as it is, and whoever held it may still come back.
                Some((seq, false)) if hook.is_lapsed(seq, now) => {
                    deadline.iter().for_each(|deadline| self.add(hook, Op::Move { seq, deadline: *deadline }));
                    self.raise = true;
                    Answer::Is(true)
                }
                Some((seq, false)) => {
                    if !hook.is_free(seq, *deadline) {
                        self.add(hook, Op::Release { seq, at: None, deadline: *deadline });
                        self.raise = true;
                    }
                    Answer::Is(true)
                }
            },
            Ask::Remove(id, _) => match hook.find(*id, now) {
                Some((seq, false)) => {
                    self.add(hook, Op::Drop { seq });
                    Answer::Is(true)
                }
                _ => Answer::Is(false),
            },
            Ask::Pause(lane, until, _) => {
                // The later of both, unless it is taken back.
                let before = hook.paused_until(lane, now);
                let until = (*until > now).then_some(*until).map(|until| before.map_or(until, |before| before.max(until)));
                if until != before {
                    self.add(hook, Op::Pause { lane: lane.clone(), until });
                    self.raise = true;
                }
                Answer::Nothing
            }
            Ask::Knows(id, _) => Answer::Is(hook.knows(*id)),
            Ask::Load(_) => Answer::Load(hook.load(now)),
        }
    }
}
