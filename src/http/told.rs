//! Refused requests, told to whoever keeps the lattice's log; of a flood, some of them and how many there were.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use super::rates::{Rates, holder};
use super::refusal::Cause;
use crate::model::access::Principal;
use crate::model::audit::Turned;

/// Hears of refused requests.
pub type Tell = Arc<dyn Fn(Turned) + Send + Sync>;

/// Tells of refused requests, and not too often: whoever is refused again for the same within a second is counted with the next that is
/// told, and each cause has a bucket of its own, so that a flood of one does not drown the others.
pub(super) struct Told {
    tell: Tell,
    repeats: Rates<(Cause, Option<IpAddr>, Option<Principal>)>,
    rate: Rates<Cause>,
    untold: Mutex<HashMap<Cause, u64>>,
}

impl Told {
    pub(super) fn new(tell: Tell, per_second: u32) -> Self {
        Self { tell, repeats: Rates::new(1), rate: Rates::new(per_second), untold: Mutex::default() }
    }

    /// Tells of one, or counts it; when it was told, how many before it were only counted.
    pub(super) fn of(&self, peer: Option<IpAddr>, cause: Cause, principal: Option<&Principal>) -> Option<u64> {
        let mut untold = self.untold.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = untold.entry(cause).or_default();
        if !self.repeats.take(&(cause, peer.map(holder), principal.cloned())) || !self.rate.take(&cause) {
            *counted += 1;
            return None;
        }
        let untold = std::mem::take(counted);
        let peer = peer.map_or_else(|| "unknown".to_owned(), |peer| peer.to_string());
        (self.tell)(Turned { peer, cause: cause.as_str().into(), principal: principal.cloned(), untold });
        Some(untold)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_told_in_part_and_counted_and_drowns_nothing_else() {
        let heard: Arc<Mutex<Vec<Turned>>> = Arc::default();
        let hears = heard.clone();
        let told = Told::new(Arc::new(move |turned| hears.lock().unwrap().push(turned)), 3);
        let address = |last: u8| Some(IpAddr::from([10, 0, 0, last]));
        for n in 0..100 {
            told.of(address(n % 10), Cause::Host, None);
        }
        assert_eq!(heard.lock().unwrap().len(), 3, "of many addresses as many as may be");
        let (ci, web) = (Principal::of_token("ci"), Principal::of_token("web"));
        for _ in 0..10 {
            told.of(address(9), Cause::Scope, ci.as_ref());
        }
        told.of(address(9), Cause::Scope, web.as_ref());
        tokio::time::advance(std::time::Duration::from_secs(2)).await;
        told.of(address(9), Cause::Scope, ci.as_ref());
        told.of(None, Cause::Host, None);
        let heard = heard.lock().unwrap();
        let told: Vec<_> = heard[3..].iter().map(|turned| (turned.peer.as_str(), turned.cause.as_str(), turned.untold)).collect();
        assert_eq!(told, [("10.0.0.9", "scope", 0), ("10.0.0.9", "scope", 9), ("10.0.0.9", "scope", 0), ("unknown", "host", 97)]);
    }
}
