//! Waiting for works: until they settle or ask, or until patience runs out.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{FuturesUnordered, StreamFuture, unfold};
use tokio::time::{Instant, MissedTickBehavior};

use super::{Dispatcher, Error, Result, is_away};
use crate::model::event::Event;
use crate::model::id::WorkId;
use crate::model::work::Work;
use crate::telemetry::now;
use crate::works::Following;

/// A work of which this process may have heard all that there is.
const YOUNG: Duration = Duration::from_secs(2);
/// How long it waits to hear of what it has just said itself.
const YOUNG_PATIENCE: Duration = Duration::from_millis(400);
/// How often it is looked whether an item of an order over many asks something, and how many that do are shown.
const ITEMS_EVERY: Duration = Duration::from_millis(500);
const ITEMS_ASKING_MAX: u32 = 3;
/// How often a server that is away is asked again on behalf of whoever waits.
const AWAY_PAUSE: Duration = Duration::from_millis(250);

/// When a wait is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Every work has settled or asks for help, or an item of it does.
    All,
    /// One of them has.
    Any,
    /// Every work has settled.
    SettledOnly,
}

impl Mode {
    fn is_done(self, work: &Work) -> bool {
        work.status.is_settled() || (self != Self::SettledOnly && work.asks())
    }

    /// Whether works are as a wait of this mode wants them.
    pub fn is_over(self, works: &[Arc<Work>]) -> bool {
        if self == Self::Any { works.iter().any(|work| self.is_done(work)) } else { works.iter().all(|work| self.is_done(work)) }
    }
}

impl Dispatcher {
    /// Waits for works and gives them in the order they were named, also when `patience` runs out first.
    /// `observe` sees each later event as it comes. Dropping the future changes nothing for the works.
    ///
    /// # Errors
    /// `UnknownWork`, `TooMany`, or the transport's.
    pub async fn wait(
        &self,
        ids: &[WorkId],
        mode: Mode,
        patience: Duration,
        observe: &mut (dyn FnMut(&Work, &Event) + Send),
    ) -> Result<Vec<Arc<Work>>> {
        self.wait_for(ids, patience, observe, &|works| mode.is_over(works)).await
    }

    /// Waits for works until they are as wanted; else like `wait`.
    ///
    /// # Errors
    /// `UnknownWork`, `TooMany`, or the transport's.
    pub async fn wait_for(
        &self,
        ids: &[WorkId],
        patience: Duration,
        observe: &mut (dyn FnMut(&Work, &Event) + Send),
        is_over: &(dyn Fn(&[Arc<Work>]) -> bool + Send + Sync),
    ) -> Result<Vec<Arc<Work>>> {
        let max = self.config().mcp.works_max;
        if ids.len() > max as usize {
            return Err(Error::TooMany { given: ids.len(), max });
        }
        let until = Instant::now() + patience;
        let mut works = Vec::with_capacity(ids.len());
        let mut changes = FuturesUnordered::new();
        for (place, id) in ids.iter().enumerate() {
            let (work, following) = self.look_patiently(*id, until).await?;
            works.push(self.with_questions(work).await);
            changes.extend(following.map(|following| changes_of(place, following)));
        }
        if is_over(&works) {
            return Ok(works);
        }
        let mut items = tokio::time::interval_at(Instant::now() + ITEMS_EVERY, ITEMS_EVERY);
        items.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let has_items = works.iter().any(|work| work.is_map() && !work.status.is_settled());
            let next = tokio::select! {
                next = tokio::time::timeout_at(until, changes.next()) => next,
                _ = items.tick(), if has_items => {
                    for work in &mut works {
                        *work = self.with_questions(Arc::clone(work)).await;
                    }
                    if is_over(&works) {
                        break;
                    }
                    continue;
                }
            };
            let Ok(Some((step, rest))) = next else { break };
            let Some((place, change)) = step else { continue };
            let (events, work) = change?;
            events.iter().for_each(|event| observe(&work, event));
            works[place] = self.with_questions(work).await;
            if is_over(&works) {
                break;
            }
            changes.push(rest.into_future());
        }
        Ok(works)
    }

    /// The same work, with those of its items that ask something now. What cannot be found out is left out: each item can be looked at
    /// by itself.
    pub(super) async fn with_questions(&self, work: Arc<Work>) -> Arc<Work> {
        if !work.is_map() || work.status.is_settled() {
            return work;
        }
        let asking = match self.items_that_ask(&work).await {
            Ok(asking) => asking,
            Err(error) => {
                tracing::debug!(%error, work_id = %work.work_id, "it is not known whether items of a work ask something");
                return work;
            }
        };
        if asking == work.asking { work } else { Arc::new(Work { asking, ..Work::clone(&work) }) }
    }

    async fn items_that_ask(&self, work: &Work) -> Result<Vec<Arc<Work>>> {
        self.0.runs.catch_up().await?;
        let mut asking = Vec::new();
        for id in self.0.runs.asking_children(&work.run_id, ITEMS_ASKING_MAX).await? {
            // It may have been answered since.
            asking.extend(self.0.works.get(id).await?.filter(|item| item.open_question().is_some()));
        }
        Ok(asking)
    }

    /// Waits until a work is as wanted, or patience runs out; gives it as it is then.
    pub(super) async fn wait_until(&self, id: WorkId, patience: Duration, wanted: impl Fn(&Work) -> bool) -> Result<Arc<Work>> {
        let until = Instant::now() + patience;
        let (mut work, following) = self.look_patiently(id, until).await?;
        let Some(mut following) = following else { return Ok(work) };
        while !wanted(&work) {
            match tokio::time::timeout_at(until, following.next()).await {
                Ok(next) => work = next?.1,
                Err(_) => break,
            }
        }
        Ok(work)
    }

    /// Looks again while the server is away; at the end of all patience gives the work as it was heard of last.
    async fn look_patiently(&self, id: WorkId, until: Instant) -> Result<(Arc<Work>, Option<Following>)> {
        loop {
            match self.look(id).await {
                Err(Error::Transport(error)) if is_away(&error) => {
                    let next = Instant::now() + AWAY_PAUSE;
                    if next < until {
                        tokio::time::sleep_until(next).await;
                        continue;
                    }
                    tokio::time::sleep_until(until).await;
                    return Ok((self.check(id).await?, None));
                }
                other => return other,
            }
        }
    }

    /// A work as of now, and a reader of what happens to it unless it has settled.
    async fn look(&self, id: WorkId) -> Result<(Arc<Work>, Option<Following>)> {
        if let Some(settled) = self.0.works.recall(id) {
            return Ok((settled, None));
        }
        let following = match now().since(id.made_at()) {
            age if age < YOUNG => self.0.works.follow_young(id, YOUNG_PATIENCE, |work| work.assignment.is_some()).await?,
            _ => self.0.works.follow(id).await?,
        };
        match following {
            Some(following) => {
                let work = following.work();
                let following = (!work.status.is_settled()).then_some(following);
                Ok((work, following))
            }
            None => Ok((self.check(id).await?, None)),
        }
    }
}

fn changes_of(place: usize, following: Following) -> StreamFuture<Changes> {
    let step = move |mut following: Following| async move {
        let change = following.next().await;
        Some(((place, change), following))
    };
    (Box::pin(unfold(following, step)) as Changes).into_future()
}

type Change = (usize, crate::transport::Result<(Vec<Event>, Arc<Work>)>);
type Changes = std::pin::Pin<Box<dyn futures_util::Stream<Item = Change> + Send>>;
