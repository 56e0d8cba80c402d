//! What an order may wait for: works that are known, can still have a result, and do not wait for the order themselves.

use std::collections::HashSet;

use super::{Caller, Dispatcher, Error, Result};
use crate::model::after::{After, Verdict};
use crate::model::id::WorkId;

/// How many works are looked at in search of a cycle; what is not found here ends by its time.
const WALK_MAX: usize = 1000;

impl Dispatcher {
    pub(super) async fn vet_after(&self, caller: &Caller, after: &After) -> Result<()> {
        match self.must_see(caller, &after.work_ids).await {
            Err(Error::UnknownWork(hidden)) => return Err(Error::UnknownAfter(hidden)),
            other => other?,
        }
        for id in &after.work_ids {
            self.vet_one(caller, *id).await?;
        }
        match self.orders().verdict(after).await?.0 {
            Verdict::Fail(failure) => Err(Error::NoResult(failure.message)),
            Verdict::Cancel(reason) => Err(Error::NoResult(reason)),
            Verdict::Wait | Verdict::Start => Ok(()),
        }
    }

    /// A work that waits, through however many others, for the very work whose agent assigns would never settle.
    async fn vet_one(&self, caller: &Caller, named: WorkId) -> Result<()> {
        let (mut seen, mut next) = (HashSet::from([named]), vec![named]);
        while let Some(id) = next.pop() {
            let work = match self.check(id).await {
                Err(Error::UnknownWork(_)) if id == named => return Err(Error::UnknownAfter(id)),
                Err(Error::UnknownWork(_)) => continue,
                other => other?,
            };
            if let Some(bound) = caller.work()
                && bound.run_id.is_within(&work.run_id)
            {
                let via = if id == named { String::new() } else { format!("it waits for work {id}, and ") };
                return Err(Error::Cycle { named, why: format!("{via}the agent of work {} assigns this one", bound.work_id) });
            }
            let further = work.waits_for().map(|after| after.work_ids.clone()).unwrap_or_default();
            next.extend(further.into_iter().filter(|id| seen.len() < WALK_MAX && seen.insert(*id)));
        }
        Ok(())
    }
}
