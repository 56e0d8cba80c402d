//! The hooks of all stations, as the trait has them; their transactions are in `hook`.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::params;

use super::{Shared, hook};
use crate::model::id::{InstanceId, StationId, WorkId};
use crate::model::time::Timestamp;
use crate::transport::{Delivery, Item, LaneLoad, Pushed, Queue, Record, Result, Signal, Take, Want};

/// The hooks of one store.
pub(super) struct LocalQueue(pub(super) Arc<Shared>);

#[async_trait]
impl Queue for LocalQueue {
    async fn push(&self, station: &StationId, item: Item, limit: u32, announce: Option<Record>) -> Result<Pushed> {
        let station = station.clone();
        self.0.write(move |batch| hook::push(batch, &station, &item, limit, announce.as_ref())).await
    }

    async fn take(&self, station: &StationId, want: &Want) -> Result<Take> {
        let (station, want) = (station.clone(), want.clone());
        self.0.write(move |batch| hook::take(batch, &station, &want)).await
    }

    async fn take_expired(&self, holder: InstanceId, lease: Duration, limit: usize, over: Option<Vec<Delivery>>) -> Result<Take> {
        self.0.write(move |batch| hook::take_expired(batch, holder, lease, limit, over.as_deref())).await
    }

    async fn extend(&self, held: &[Delivery], lease: Duration, deadline: Option<Timestamp>) -> Result<Vec<Delivery>> {
        let held = held.to_vec();
        self.0.write(move |batch| hook::extend(batch, &held, lease, deadline)).await
    }

    async fn settle(&self, delivery: &Delivery, records: Vec<Record>) -> Result<bool> {
        let delivery = delivery.clone();
        self.0.write(move |batch| hook::settle(batch, &delivery, &records)).await
    }

    async fn release(&self, delivery: &Delivery, at: Timestamp, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool> {
        let delivery = delivery.clone();
        self.0.write(move |batch| hook::release(batch, &delivery, at, deadline, &records)).await
    }

    async fn wake(&self, station: &StationId, id: WorkId, deadline: Option<Timestamp>, records: Vec<Record>) -> Result<bool> {
        let station = station.clone();
        self.0.write(move |batch| hook::wake(batch, &station, id, deadline, &records)).await
    }

    async fn remove(&self, station: &StationId, id: WorkId, records: Vec<Record>) -> Result<bool> {
        let station = station.clone();
        self.0.write(move |batch| hook::remove(batch, &station, id, &records)).await
    }

    async fn pause(&self, station: &StationId, lane: &str, until: Timestamp) -> Result<()> {
        let (station, lane) = (station.clone(), lane.to_owned());
        self.0.write(move |batch| hook::pause(batch, &station, &lane, until)).await
    }

    async fn load(&self, station: &StationId) -> Result<Vec<LaneLoad>> {
        // What is held beyond its lease waits in fact, though nobody has come by to say so.
        const SQL: &str = "SELECT name, waiting, held, (SELECT count(*) FROM item WHERE lane = lane.id AND due <= ?2 AND state = 2),
            CASE WHEN paused > ?2 THEN paused END,
            (SELECT count(*) FROM item WHERE lane = lane.id AND due = deadline AND state = 4)
            FROM lane WHERE hook = (SELECT id FROM hook WHERE station = ?1) AND (waiting + held > 0 OR paused > ?2) ORDER BY name";
        let station = station.clone();
        let now = self.0.now().as_millis();
        self.0
            .read(move |conn| {
                let mut query = conn.prepare_cached(SQL)?;
                let rows = query.query_map(params![station.as_str(), now], |row| {
                    let (waiting, held, lapsed): (u32, u32, u32) = (row.get(1)?, row.get(2)?, row.get(3)?);
                    Ok(LaneLoad {
                        lane: row.get(0)?,
                        waiting: waiting.saturating_add(lapsed),
                        held: held.saturating_sub(lapsed),
                        held_back: row.get(5)?,
                        paused_until: row.get::<_, Option<i64>>(4)?.map(Timestamp::from_millis),
                    })
                })?;
                rows.collect()
            })
            .await
    }

    fn signal(&self, station: &StationId) -> Signal {
        Signal::new(self.0.hub.taker(station))
    }
}
