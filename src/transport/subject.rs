//! Where a record belongs, and which records a reader wants. The only place that formats a subject.

use std::borrow::Cow;
use std::fmt;

use crate::model::id::WorkId;

/// Where a record belongs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A leaf's event on a work.
    Response(WorkId),
    /// The assigner's event on a work, for everybody to observe.
    Status(WorkId),
    /// An audit event: `noun.verb`.
    Audit {
        /// What it is about.
        noun: Cow<'static, str>,
        /// What happened.
        verb: Cow<'static, str>,
    },
}

impl Subject {
    /// The work it belongs to.
    pub fn work(&self) -> Option<WorkId> {
        match self {
            Self::Response(id) | Self::Status(id) => Some(*id),
            Self::Audit { .. } => None,
        }
    }
}

impl fmt::Display for Subject {
    /// The subject below `lattice.{lattice_id}.`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Response(id) => write!(f, "work.{id}.response"),
            Self::Status(id) => write!(f, "work.{id}.status"),
            Self::Audit { noun, verb } => write!(f, "events.{noun}.{verb}"),
        }
    }
}

/// Which records a reader wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filter {
    /// Every event of every work.
    AllWork,
    /// Every event of one work.
    Work(WorkId),
    /// The assigners' events of every work.
    AllStatus,
    /// Audit events.
    Audit,
}

impl Filter {
    /// Whether a record of this subject is wanted.
    pub fn wants(&self, subject: &Subject) -> bool {
        match self {
            Self::AllWork => subject.work().is_some(),
            Self::Work(id) => subject.work() == Some(*id),
            Self::AllStatus => matches!(subject, Subject::Status(_)),
            Self::Audit => matches!(subject, Subject::Audit { .. }),
        }
    }
}
