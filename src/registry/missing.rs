//! Processes whose sign of life vanished without a goodbye: the first of the others who comes to it writes that down.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::Instant;

use super::Registry;
use super::rows::{Gone, Sign, bytes_of};
use crate::model::audit::Kind;
use crate::transport::{Bucket, Error, Expect};

/// How many are kept in mind.
const MISSING_MAX: usize = 1024;
/// The process that has been there longest comes first, each later one so much after it: normally only one writes at all.
const STEP: Duration = Duration::from_millis(250);
/// How many times a sign's life the note stands; whoever comes to it that late has seen the note before it went.
const NOTE_LIVES: u32 = 4;

/// The missing, by the keys of their signs, with the moment at which they were missed.
#[derive(Default)]
pub(super) struct Missing(BTreeMap<String, (Sign, Instant)>);

impl Missing {
    pub(super) fn add(&mut self, key: String, sign: Sign) {
        if self.0.len() < MISSING_MAX {
            self.0.insert(key, (sign, Instant::now()));
        }
    }

    /// It is back, or somebody wrote down what became of it.
    pub(super) fn forget(&mut self, key: &str) {
        self.0.remove(key);
    }
}

impl Registry {
    /// Writes down who is lost, when it is our turn to, until dropped.
    pub(super) async fn keep_missing(&self) {
        loop {
            let turn = self.next_missing();
            match turn {
                Some((key, sign, at)) if at <= Instant::now() => self.write_off(&key, sign).await,
                Some((_, _, at)) => tokio::select! {
                    () = self.0.vanished.notified() => {}
                    () = tokio::time::sleep_until(at) => {}
                },
                None => self.0.vanished.notified().await,
            }
        }
    }

    /// The one whose turn comes first.
    fn next_missing(&self) -> Option<(String, Sign, Instant)> {
        let mut mirror = self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        // Our own vanished sign is noticed by our next one.
        mirror.missing.forget(&self.sign_key());
        let older = mirror.signs.values().filter(|sign| sign.instance < self.0.me.instance).count();
        let wait = STEP.saturating_mul(u32::try_from(older).unwrap_or(u32::MAX)).min(self.0.presence.ttl.get());
        let first = mirror.missing.0.iter().min_by_key(|(_, (_, since))| *since)?;
        let (key, (sign, since)) = first;
        Some((key.clone(), sign.clone(), *since + wait))
    }

    async fn write_off(&self, key: &str, sign: Sign) {
        self.0.mirror.lock().unwrap_or_else(PoisonError::into_inner).missing.forget(key);
        let (station, instance) = (sign.station.clone(), sign.instance);
        let note = Sign { gone: Some(Gone::Lost), agents: BTreeMap::new(), ..sign };
        let stands = self.0.presence.ttl.get().saturating_mul(NOTE_LIVES);
        match self.0.table.put(Bucket::Stations, key, bytes_of(&note), Expect::Absent, Some(stands)).await {
            Ok(_) => self.0.audit.say(&station, instance, Kind::Lost { observer: self.0.me.station.clone() }),
            // Somebody else was first, or it is back; or it is for others to say.
            Err(Error::Conflict { .. } | Error::Denied(_)) => {}
            Err(error) => tracing::warn!(%error, %station, %instance, "could not write down that a process is lost"),
        }
    }
}
