//! Whose works a caller may see: those of its own principal, or everybody's.
//!
//! What is hidden is unknown to whoever asks: an error tells nothing about works of others.

use super::{Caller, Dispatcher, Error, Result};
use crate::model::access::Principal;
use crate::model::id::WorkId;
use crate::model::run::Run;
use crate::model::work::Work;

impl Dispatcher {
    /// Whoever stands behind a caller by credentials of their own. An agent that executes a work acts for whoever ordered it.
    ///
    /// # Errors
    /// The transport's.
    pub(super) async fn principal_of(&self, caller: &Caller) -> Result<Option<Principal>> {
        let Some(bound) = caller.work() else { return Ok(caller.access().and_then(|access| access.principal.clone())) };
        let behind = caller.behind.get_or_try_init(|| async {
            match self.check(bound.work_id).await {
                Ok(work) => self.ordered_by(&work).await,
                Err(Error::UnknownWork(_)) => Ok(None),
                Err(error) => Err(error),
            }
        });
        behind.await.cloned()
    }

    /// Whose works a caller is kept to; none when everybody's are open to it.
    ///
    /// # Errors
    /// The transport's.
    pub async fn kept_to(&self, caller: &Caller) -> Result<Option<Principal>> {
        if self.config().http.share_works {
            return Ok(None);
        }
        match (caller.work(), caller.access()) {
            (Some(_), _) => self.principal_of(caller).await,
            (None, access) => Ok(access.and_then(|access| access.kept_to().cloned())),
        }
    }

    /// Makes sure that a caller may see these works.
    ///
    /// # Errors
    /// `UnknownWork` with the first one that it may not see, or the transport's.
    pub async fn must_see(&self, caller: &Caller, ids: &[WorkId]) -> Result<()> {
        let Some(principal) = self.kept_to(caller).await? else { return Ok(()) };
        if ids.len() > self.config().mcp.works_max as usize {
            return Err(Error::TooMany { given: ids.len(), max: self.config().mcp.works_max });
        }
        for id in ids {
            let work = self.check(*id).await?;
            if self.ordered_by(&work).await?.as_ref() != Some(&principal) {
                return Err(Error::UnknownWork(*id));
            }
        }
        Ok(())
    }

    /// Leaves those runs that a caller may see.
    ///
    /// # Errors
    /// The transport's.
    pub(super) async fn visible(&self, caller: &Caller, mut runs: Vec<Run>) -> Result<Vec<Run>> {
        if let Some(principal) = self.kept_to(caller).await? {
            runs.retain(|run| run.principal.as_ref() == Some(&principal));
        }
        Ok(runs)
    }

    async fn ordered_by(&self, work: &Work) -> Result<Option<Principal>> {
        match &work.assignment {
            Some(order) => Ok(order.principal.clone()),
            // Its events were dropped by age; the run store keeps whose it was.
            None => Ok(self.runs().of_work(work.work_id).await?.and_then(|run| run.principal)),
        }
    }
}
