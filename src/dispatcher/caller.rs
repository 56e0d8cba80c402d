//! Who calls, and on whose behalf.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::model::access::{Access, Principal, Scope};
use crate::model::id::{RunId, WorkId};
use crate::model::owner::Owner;

/// Whoever calls: one per connection, or one per request where there are no connections.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    pub(super) bound: Option<Bound>,
    pub(super) owner: Option<Owner>,
    /// The root that this connection's first assignment opened.
    pub(super) root: Option<Arc<tokio::sync::Mutex<Option<Opened>>>>,
    /// The questions whose answers it has had.
    pub(super) had: Arc<Mutex<HashSet<(WorkId, u32)>>>,
    /// What its credentials allow; everything when it needs none.
    pub(super) access: Option<Arc<Access>>,
    /// Who ordered the work that its agent executes, once that was looked up.
    pub(super) behind: Arc<tokio::sync::OnceCell<Option<Principal>>>,
}

/// The work that a connection's agent executes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// The work.
    pub work_id: WorkId,
    /// Its run: what the connection assigns is its child.
    pub run_id: RunId,
    /// The attempt.
    pub attempt: u32,
}

/// A root run, and numbers of its children that nobody else has.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) root: RunId,
    pub(super) free: std::ops::Range<u64>,
    /// How many numbers are fetched next time.
    pub(super) block: u64,
}

impl Caller {
    /// A caller of whom nothing is remembered: each assignment opens a root of its own.
    pub fn stateless() -> Self {
        Self::default()
    }

    /// A connection: its first assignment opens a root run that the later ones join.
    pub fn connection() -> Self {
        Self { root: Some(Arc::default()), ..Self::default() }
    }

    /// The connection of an agent that executes a work.
    pub fn bound(bound: Bound) -> Self {
        Self { bound: Some(bound), ..Self::default() }
    }

    /// The same caller, whose works are this owner's.
    #[must_use]
    pub fn owned_by(self, owner: Option<Owner>) -> Self {
        Self { owner, ..self }
    }

    /// Whose the works are that it assigns.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_ref()
    }

    /// The same caller, as whoever came with these credentials: what it assigns is theirs.
    #[must_use]
    pub fn with_access(self, access: Arc<Access>) -> Self {
        let owner = match &access.principal {
            Some(principal) => self.owner.as_ref().map(|owner| owner.for_principal(principal)),
            None => self.owner,
        };
        Self { owner, access: Some(access), ..self }
    }

    /// What its credentials allow; none when it needs no credentials.
    pub fn access(&self) -> Option<&Access> {
        self.access.as_deref()
    }

    /// Whether it may do what needs this scope.
    pub fn may(&self, needed: Scope) -> bool {
        self.access.as_ref().is_none_or(|access| access.allows(needed))
    }

    pub(super) fn has_had(&self, id: WorkId, ask: u32) -> bool {
        self.had.lock().unwrap_or_else(PoisonError::into_inner).contains(&(id, ask))
    }

    /// The work that the connection's agent executes.
    pub fn work(&self) -> Option<&Bound> {
        self.bound.as_ref()
    }
}
