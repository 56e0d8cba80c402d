//! The hooks of both sides as one.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::Mesh;
use crate::model::id::{InstanceId, StationId, WorkId};
use crate::model::time::Timestamp;
use crate::transport::{Delivery, Error, Item, LaneLoad, Pushed, Queue, Record, Result, Signal, Take, Taken, Want};

#[async_trait]
impl Queue for Mesh {
    async fn push(&self, station: &StationId, item: Item, limit: u32, announce: Option<Record>) -> Result<Pushed> {
        let id = item.id;
        let noted = self.noted().get(&id).cloned();
        let away = match self.far() {
            // Others may have used its key on the server meanwhile.
            _ if noted.as_ref().is_some_and(|noted| noted.apart) => Error::Unreachable("the NATS server was away when this began".into()),
            Ok(far) => {
                // Whoever hears of it before this returns need not look for it here.
                self.homes.known().entry(id).or_insert(false);
                match far.queue.push(station, item.clone(), limit, announce.clone()).await {
                    Err(Error::Unreachable(reason)) => Error::Unreachable(reason),
                    other => {
                        self.remember(id, false);
                        return other;
                    }
                }
            }
            Err(away) => away,
        };
        if *station != self.station {
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
        let mut take =
            if want.look || self.may_hold(station).await? { self.local.queue.take(station, want).await? } else { Take::default() };
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
        match far.queue.take(station, &rest).await {
            Ok(more) => {
                for taken in &more.taken {
                    self.remember(taken.delivery.id, false);
                }
                take.taken.extend(more.taken);
                take.next_at = [take.next_at, more.next_at].into_iter().flatten().min();
            }
            Err(Error::Unreachable(_) | Error::Unanswered(_)) => {}
            Err(error) if take.taken.is_empty() => return Err(error),
            Err(error) => tracing::warn!(%error, "could not take work from the server's hook"),
        }
        Ok(take)
    }

    async fn take_expired(&self, holder: InstanceId, lease: Duration, limit: usize) -> Result<Vec<Taken>> {
        let mut all = self.local.queue.take_expired(holder, lease, limit).await?;
        for taken in &all {
            self.remember(taken.delivery.id, true);
        }
        if let Ok(far) = self.far() {
            match far.queue.take_expired(holder, lease, limit - all.len()).await {
                Ok(more) => all.extend(more),
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
        if !there.is_empty() {
            lost.extend(self.far()?.queue.extend(&there, lease, deadline).await?);
        }
        Ok(lost)
    }

    async fn settle(&self, delivery: &Delivery, records: Vec<Record>) -> Result<bool> {
        self.home(delivery.id).await?.queue.settle(delivery, records).await
    }

    async fn release(&self, delivery: &Delivery, at: Timestamp, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool> {
        self.home(delivery.id).await?.queue.release(delivery, at, deadline, records).await
    }

    async fn wake(&self, station: &StationId, id: WorkId, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool> {
        self.home(id).await?.queue.wake(station, id, deadline, records).await
    }

    async fn remove(&self, station: &StationId, id: WorkId, records: Vec<Record>) -> Result<bool> {
        self.home(id).await?.queue.remove(station, id, records).await
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
