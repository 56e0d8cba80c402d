//! Refused requests, told to whoever keeps the lattice's log; of a flood, some of them and how many there were.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use super::rates::Rates;
use super::refusal::Cause;
use crate::model::access::Principal;
use crate::model::audit::Turned;

/// Hears of refused requests.
pub type Tell = Arc<dyn Fn(Turned) + Send + Sync>;

/// Tells of refused requests, and not too often.
pub(super) struct Told {
    tell: Tell,
    rate: Rates<()>,
    untold: Mutex<u64>,
}

impl Told {
    pub(super) fn new(tell: Tell, per_second: u32) -> Self {
        Self { tell, rate: Rates::new(per_second), untold: Mutex::default() }
    }

    /// Tells of one, or counts it; when it was told, how many before it were only counted.
    pub(super) fn of(&self, peer: Option<IpAddr>, cause: Cause, principal: Option<&Principal>) -> Option<u64> {
        let mut untold = self.untold.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.rate.take(&()) {
            *untold += 1;
            return None;
        }
        let untold = std::mem::take(&mut *untold);
        let peer = peer.map_or_else(|| "unknown".to_owned(), |peer| peer.to_string());
        (self.tell)(Turned { peer, cause: cause.as_str().into(), principal: principal.cloned(), untold });
        Some(untold)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_told_in_part_and_counted() {
        let heard: Arc<Mutex<Vec<Turned>>> = Arc::default();
        let hears = heard.clone();
        let told = Told::new(Arc::new(move |turned| hears.lock().unwrap().push(turned)), 3);
        for _ in 0..10 {
            told.of(Some("10.0.0.9".parse().unwrap()), Cause::Credentials, None);
        }
        tokio::time::advance(std::time::Duration::from_secs(2)).await;
        told.of(None, Cause::Host, Principal::of_token("ci").as_ref());
        let heard = heard.lock().unwrap();
        assert_eq!(heard.len(), 4);
        assert_eq!((heard[0].peer.as_str(), heard[0].cause.as_str(), heard[0].untold), ("10.0.0.9", "credentials", 0));
        assert_eq!((heard[3].peer.as_str(), heard[3].untold), ("unknown", 7));
    }
}
