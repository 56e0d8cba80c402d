//! Works whose holder gives no sign of life: which of them are taken over.
//!
//! A hold that has run out says only that its process is slow, asleep or dead. Where another attempt is allowed, that one follows at
//! once. The last one has failed only if its process is dead for certain; else it is left where it is, so that it can still settle the
//! work, until somebody knows more or the work's time is up.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};

use super::Leaf;
use super::policy::{self, Verdict};
use crate::model::agent::Definition;
use crate::model::time::Timestamp;
use crate::telemetry::now;
use crate::transport::{Delivery, Lapsed, Result, Want};

/// How long what was found of one stands before it is looked at again; less than the hook is looked at anyway.
const STANDS: Duration = Duration::from_secs(4);
/// How many are looked at after each taking, and how many at once.
const LOOKS_MAX: usize = 64;
const AT_ONCE: usize = 8;

/// What was found of an item whose hold has run out.
pub(super) struct Found {
    over: bool,
    until: Timestamp,
}

impl Leaf {
    /// What may be taken over, as it was found of late.
    pub(super) fn over(&self) -> Vec<Delivery> {
        let now = now();
        let mut found = self.0.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.retain(|_, found| found.until > now);
        found.iter().filter(|(_, found)| found.over).map(|(delivery, _)| delivery.clone()).collect()
    }

    /// Looks at what was not taken over; whether some of it may be.
    pub(super) async fn look_at(&self, lapsed: Vec<Lapsed>, want: &Want, definitions: &HashMap<String, Arc<Definition>>) -> bool {
        let new: Vec<Lapsed> = {
            let found = self.0.found.lock().unwrap_or_else(PoisonError::into_inner);
            let is_wanted = |lapsed: &Lapsed| want.only.as_ref().is_none_or(|only| only.contains(&lapsed.delivery.id));
            lapsed.into_iter().filter(|lapsed| is_wanted(lapsed) && !found.contains_key(&lapsed.delivery)).take(LOOKS_MAX).collect()
        };
        let looks = stream::iter(new).map(|Lapsed { delivery, lane }| async move {
            let over = match definitions.get(&lane) {
                Some(definition) => self.may_take_over(&delivery, definition).await,
                None => Ok(false),
            };
            (delivery, over)
        });
        let mut looks = looks.buffer_unordered(AT_ONCE);
        let mut any = false;
        while let Some((delivery, over)) = looks.next().await {
            match over {
                Ok(over) => {
                    let (work_id, attempt) = (delivery.id, delivery.attempt);
                    match over {
                        true => tracing::debug!(%work_id, attempt, "nobody holds on to this attempt: the work may be taken over"),
                        false => tracing::debug!(%work_id, attempt, "nobody holds on to this attempt, the last one: it is left as it is"),
                    }
                    any |= over;
                    let found = Found { over, until: now().after(STANDS) };
                    self.0.found.lock().unwrap_or_else(PoisonError::into_inner).insert(delivery, found);
                }
                Err(error) => tracing::debug!(work_id = %delivery.id, %error, "it is not known whether a work can be taken over"),
            }
        }
        any
    }

    async fn may_take_over(&self, lapsed: &Delivery, definition: &Definition) -> Result<bool> {
        // It was us who slept: what runs here is held again soon.
        if self.0.running().contains_key(&lapsed.id) {
            return Ok(false);
        }
        let Some(work) = self.0.works.get(lapsed.id).await? else { return Ok(true) };
        match policy::before(&work, lapsed.attempt.saturating_add(1), &self.0.policy(definition)) {
            Verdict::Unknown(process, _) => Ok(self.0.runners.is_gone(process).await),
            Verdict::Drop | Verdict::Cancel(_) | Verdict::GiveUp(_) | Verdict::Run => Ok(true),
        }
    }
}
