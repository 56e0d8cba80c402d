//! The hooks of both sides as one.

use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::{Home, Mesh};
use crate::model::id::{InstanceId, StationId, WorkId};
use crate::model::pace::Pace;
use crate::model::time::Timestamp;
use crate::telemetry::now;
use crate::transport::{Delivery, Error, Item, LaneLoad, Pushed, Queue, Record, Result, Signal, Take, Taken, Transport, Want};

/// What this process began lately, by lane: an agent has one pace, wherever its works live.
#[derive(Default)]
pub(super) struct Paces {
    local: HashMap<String, Pace>,
    far: HashMap<String, Pace>,
}

/// Counts what was begun of lanes that have a pace.
fn count(begun: &mut HashMap<String, Pace>, want: &Want, taken: &[Taken], now: Timestamp) {
    for taken in taken.iter().filter(|taken| want.pace(&taken.lane).is_some()) {
        begun.entry(taken.lane.clone()).or_default().start(now);
    }
}

/// What may still be begun on one side after what was begun on the other, and when that is more.
fn after(mut want: Want, begun: &HashMap<String, Pace>, now: Timestamp) -> (Want, Option<Timestamp>) {
    let mut next_at = None;
    for (lane, per_minute) in &mut want.per_minute {
        let Some(pace) = begun.get(lane) else { continue };
        let recent = u32::MAX - pace.left(u32::MAX, now);
        if recent > 0 {
            *per_minute = per_minute.saturating_sub(recent);
            next_at = [next_at, pace.next_at(recent, now)].into_iter().flatten().min();
        }
    }
    (want, next_at)
}

impl Mesh {
    /// Pushes to the server's hook, which has the input by then that the order names.
    async fn push_far(&self, far: &Transport, station: &StationId, item: Item, limit: u32, announce: Option<Record>) -> Result<Pushed> {
        let bodies = std::iter::once(&item.body).chain(announce.iter().map(|record| &record.body));
        self.bring_blobs(far, bodies).await?;
        far.queue.push(station, item, limit, announce).await
    }

    fn paces(&self) -> MutexGuard<'_, Paces> {
        self.paces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Queue for Mesh {
    async fn push(&self, station: &StationId, item: Item, limit: u32, announce: Option<Record>) -> Result<Pushed> {
        let id = item.id;
        if let Some(beside) = item.beside {
            let is_local = self.is_local(beside).await?;
            let home = if is_local { None } else { Some(self.far()?) };
            self.remember(id, is_local);
            return match home {
                None => self.local.queue.push(station, item, limit, announce).await,
                Some(far) => self.push_far(&far, station, item, limit, announce).await,
            };
        }
        let noted = self.noted().get(&id).cloned();
        let home = noted.as_ref().map(|noted| noted.home);
        let away = match self.far() {
            // Others may have used its key on the server meanwhile.
            _ if matches!(home, Some(Home::Here)) => Error::Unreachable("the NATS server was away when this began".into()),
            Ok(far) => {
                // Whoever hears of it before this returns need not look for it here.
                self.homes.known().entry(id).or_insert(false);
                match self.push_far(&far, station, item.clone(), limit, announce.clone()).await {
                    Err(Error::Unreachable(reason)) => Error::Unreachable(reason),
                    other => {
                        self.remember(id, false);
                        return other;
                    }
                }
            }
            Err(away) => away,
        };
        // By a key that the server has, others may push it there.
        if *station != self.station || matches!(home, Some(Home::There(_))) {
            return Err(away);
        }
        if let Some(noted) = noted {
            self.claim(id, noted).await?;
        }
        self.begin_to_forward().await?;
        // Nothing was sent, so the work can have no second home.
        self.remember(id, true);
        self.local.queue.push(station, item, limit, announce).await
    }

    async fn take(&self, station: &StationId, want: &Want) -> Result<Take> {
        let mut take = Take::default();
        if want.look || self.may_hold(station).await? {
            let (here, next_at) = after(want.clone(), &self.paces().far, now());
            take = self.local.queue.take(station, &here).await?;
            take.next_at = [take.next_at, next_at].into_iter().flatten().min();
            count(&mut self.paces().local, want, &take.taken, now());
        }
        for taken in &take.taken {
            self.remember(taken.delivery.id, true);
        }
        let room = want.room.saturating_sub(u32::try_from(take.taken.len()).unwrap_or(u32::MAX));
        if room == 0 {
            return Ok(take);
        }
        let Ok(far) = self.far() else { return Ok(take) };
        let mut rest = Want { room, ..want.clone() };
        for (lane, left) in &mut rest.lanes {
            let used = take.taken.iter().filter(|taken| taken.lane == *lane).count();
            *left = left.saturating_sub(u32::try_from(used).unwrap_or(u32::MAX));
        }
        let (there, next_at) = after(rest, &self.paces().local, now());
        match far.queue.take(station, &there).await {
            Ok(mut more) => {
                more.next_at = [more.next_at, next_at].into_iter().flatten().min();
                count(&mut self.paces().far, want, &more.taken, now());
                for taken in &more.taken {
                    self.remember(taken.delivery.id, false);
                }
                take.taken.extend(more.taken);
                take.next_at = [take.next_at, more.next_at].into_iter().flatten().min();
                take.lapsed.extend(more.lapsed);
            }
            Err(Error::Unreachable(_) | Error::Unanswered(_)) => {}
            Err(error) if take.taken.is_empty() => return Err(error),
            Err(error) => tracing::warn!(%error, "could not take work from the server's hook"),
        }
        Ok(take)
    }

    async fn take_expired(&self, holder: InstanceId, lease: Duration, limit: usize, over: Option<Vec<Delivery>>) -> Result<Take> {
        let mut all = self.local.queue.take_expired(holder, lease, limit, over.clone()).await?;
        for id in all.taken.iter().map(|taken| taken.delivery.id).chain(all.lapsed.iter().map(|lapsed| lapsed.delivery.id)) {
            self.remember(id, true);
        }
        if let Ok(far) = self.far() {
            let left = limit.saturating_sub(all.taken.len() + all.lapsed.len());
            match far.queue.take_expired(holder, lease, left, over).await {
                Ok(more) => {
                    all.taken.extend(more.taken);
                    all.lapsed.extend(more.lapsed);
                }
                Err(Error::Unreachable(_) | Error::Unanswered(_)) => {}
                Err(error) => tracing::warn!(%error, "could not look for works on the server whose time is up"),
            }
        }
        Ok(all)
    }

    async fn extend(&self, held: &[Delivery], lease: Duration, deadline: Option<Timestamp>) -> Result<Vec<Delivery>> {
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for delivery in held {
            if self.is_local(delivery.id).await? { here.push(delivery.clone()) } else { there.push(delivery.clone()) }
        }
        let mut lost = if here.is_empty() { Vec::new() } else { self.local.queue.extend(&here, lease, deadline).await? };
        if there.is_empty() {
            return Ok(lost);
        }
        let extended = match self.far() {
            Ok(far) => far.queue.extend(&there, lease, deadline).await,
            Err(away) => Err(away),
        };
        match extended {
            Ok(more) => lost.extend(more),
            // What was lost here is lost, whatever becomes of the others.
            Err(error) if !lost.is_empty() => tracing::debug!(%error, "what is held on the server cannot be extended now"),
            Err(error) => return Err(error),
        }
        Ok(lost)
    }

    async fn settle(&self, delivery: &Delivery, records: Vec<Record>) -> Result<bool> {
        self.home(delivery.id, &records).await?.queue.settle(delivery, records).await
    }

    async fn release(&self, delivery: &Delivery, at: Timestamp, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool> {
        self.home(delivery.id, &records).await?.queue.release(delivery, at, deadline, records).await
    }

    async fn wake(&self, station: &StationId, id: WorkId, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool> {
        self.home(id, &records).await?.queue.wake(station, id, deadline, records).await
    }

    async fn remove(&self, station: &StationId, id: WorkId, records: Vec<Record>) -> Result<bool> {
        self.home(id, &records).await?.queue.remove(station, id, records).await
    }

    async fn pause(&self, station: &StationId, lane: &str, until: Timestamp) -> Result<()> {
        if *station == self.station {
            self.local.queue.pause(station, lane, until).await?;
        }
        let told = match self.far() {
            Ok(far) => far.queue.pause(station, lane, until).await,
            Err(away) => Err(away),
        };
        match told {
            Err(Error::Unreachable(_) | Error::Unanswered(_)) if *station == self.station => self.pause_later(station, lane, until),
            other => other?,
        }
        Ok(())
    }

    async fn load(&self, station: &StationId) -> Result<Vec<LaneLoad>> {
        let here = if *station == self.station { self.local.queue.load(station).await? } else { Vec::new() };
        let mut load = match self.far() {
            Ok(far) => match far.queue.load(station).await {
                Ok(load) => load,
                Err(Error::Unreachable(_) | Error::Unanswered(_)) => Vec::new(),
                Err(error) => return Err(error),
            },
            Err(_) => Vec::new(),
        };
        for lane in here {
            match load.iter_mut().find(|known| known.lane == lane.lane) {
                Some(known) => {
                    known.waiting += lane.waiting;
                    known.held += lane.held;
                    known.held_back += lane.held_back;
                    known.paused_until = known.paused_until.max(lane.paused_until);
                }
                None => load.push(lane),
            }
        }
        Ok(load)
    }

    fn signal(&self, station: &StationId) -> Signal {
        let raised = watch::Sender::new(0u64);
        let signal = Signal::new(raised.subscribe());
        let (mut local, mut opened, station, cancel) =
            (self.local.queue.signal(station), self.far.clone(), station.clone(), self.cancel.clone());
        self.tasks.spawn(async move {
            let mut far: Option<Signal> = None;
            loop {
                if far.is_none() {
                    far = opened.borrow_and_update().as_ref().map(|far| far.queue.signal(&station));
                    raised.send_modify(|count| *count += 1);
                }
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = raised.closed() => return,
                    () = local.changed() => {}
                    () = async { match &mut far { Some(far) => far.changed().await, None => std::future::pending().await } } => {}
                    changed = opened.changed(), if far.is_none() => if changed.is_err() { std::future::pending::<()>().await },
                }
                raised.send_modify(|count| *count += 1);
            }
        });
        signal
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::turn::Turn;
    use crate::telemetry::{new_instance, new_work_id};
    use crate::transport::mesh::Sides;
    use crate::transport::{Filter, Position, Subject};

    fn item(id: WorkId, beside: Option<WorkId>) -> Item {
        let (turn, deadline) = (Turn::new("here", 0, now(), Duration::from_secs(1)), now().after(Duration::from_secs(60)));
        Item { id, lane: "a".into(), turn, deadline, held_back: false, beside, body: "{}".into() }
    }

    #[tokio::test]
    async fn a_pace_is_one_wherever_the_works_live() {
        let sides = Sides::new();
        let far = &sides.far;
        let station: StationId = "here".parse().unwrap();
        let (mesh, server) = sides.mesh(Some(far.clone()));
        let lease = Duration::from_secs(10);
        let (lanes, per_minute) = (vec![("a".to_owned(), 9)], vec![("a".to_owned(), 4)]);
        let want = Want {
            holder: new_instance(),
            lanes,
            room: 9,
            per_minute,
            ageing: lease,
            lease,
            accept: Default::default(),
            only: None,
            over: None,
            look: true,
        };
        let begin = async |count: usize| {
            for _ in 0..count {
                let id = new_work_id();
                let record = Record { subject: Subject::Status(id), body: "{}".into() };
                mesh.queue.push(&station, item(id, None), 99, Some(record)).await.unwrap();
            }
            mesh.queue.take(&station, &want).await.unwrap().taken.len()
        };
        assert_eq!(begin(3).await, 3);
        server.send_replace(None);
        assert_eq!(begin(3).await, 1);
        server.send_replace(Some(far.clone()));
        assert_eq!(begin(3).await, 0);
    }

    #[tokio::test]
    async fn what_was_lost_here_is_told_while_the_server_is_away() {
        let sides = Sides::new();
        let station: StationId = "here".parse().unwrap();
        let (mesh, _away) = sides.mesh(None);
        let (ours, theirs) = (new_work_id(), new_work_id());
        let record = Record { subject: Subject::Status(ours), body: "{}".into() };
        mesh.queue.push(&station, item(ours, None), 9, Some(record)).await.unwrap();
        // Nobody has taken the one, so the first attempt holds nothing; where the other one lives cannot be reached.
        let held = [ours, theirs].map(|id| Delivery { station: station.clone(), id, attempt: 1 });
        let lease = Duration::from_secs(9);
        assert_eq!(mesh.queue.extend(&held, lease, None).await.unwrap(), held[..1]);
        assert!(matches!(mesh.queue.extend(&held[1..], lease, None).await, Err(Error::Unreachable(_))));
    }

    #[tokio::test]
    async fn an_item_lives_where_its_order_does_whatever_can_be_reached() {
        let sides = Sides::new();
        let (near, far) = (&sides.near, &sides.far);
        let station: StationId = "here".parse().unwrap();
        let (server, opened) = watch::channel(None);
        let [mesh, other] = [(); 2].map(|()| sides.process(opened.clone(), false));
        let push = async |mesh: &Transport, id: WorkId, beside: Option<WorkId>| {
            let record = Record { subject: Subject::Status(id), body: "{}".into() };
            mesh.queue.push(&station, item(id, beside), 9, Some(record)).await
        };
        let waiting = async |side: &Transport| side.queue.load(&station).await.unwrap().iter().map(|lane| lane.waiting).sum::<u32>();
        let (ours, theirs, first, second, third) = (new_work_id(), new_work_id(), new_work_id(), new_work_id(), new_work_id());
        push(&mesh, ours, None).await.unwrap();
        server.send_replace(Some(far.clone()));
        push(&mesh, theirs, None).await.unwrap();
        assert!(mesh.log.is_here(ours).await.unwrap() && !mesh.log.is_here(theirs).await.unwrap());

        // Whoever looks for it before it is pushed finds it all the same afterwards.
        assert!(other.log.read(Filter::Work(first), Position::default(), 9).await.unwrap().is_empty());
        assert_eq!(push(&mesh, first, Some(ours)).await.unwrap(), Pushed::New);
        assert_eq!(push(&mesh, second, Some(theirs)).await.unwrap(), Pushed::New);
        assert_eq!((waiting(near).await, waiting(far).await), (2, 2));
        server.send_replace(None);
        assert!(other.log.is_here(first).await.unwrap());
        assert_eq!(push(&other, first, Some(ours)).await.unwrap(), Pushed::Known);
        assert!(matches!(push(&mesh, third, Some(theirs)).await, Err(Error::Unreachable(_))));
        assert_eq!(push(&mesh, third, Some(ours)).await.unwrap(), Pushed::New);
        assert_eq!((waiting(near).await, waiting(far).await), (3, 2));
    }
}
