//! Who comes through a door, and what they may do there.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The longest name.
const NAME_MAX: usize = 512;

/// The name of whoever comes by credentials of their own: `token:NAME`, or `oauth:ISSUER#SUBJECT`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Principal(Arc<str>);

impl Principal {
    /// Whoever carries a static token that stands for this name.
    pub fn of_token(name: &str) -> Option<Self> {
        Self::checked(format!("token:{name}"))
    }

    /// A subject of an issuer.
    pub fn of_subject(issuer: &str, subject: &str) -> Option<Self> {
        Self::checked(format!("oauth:{issuer}#{subject}"))
    }

    /// A name that a run store has kept.
    pub fn kept(text: &str) -> Self {
        Self(text.into())
    }

    /// None when it is too long, empty at its end, or has characters that would garble a line of a log.
    fn checked(text: String) -> Option<Self> {
        let fits = text.len() <= NAME_MAX && !text.ends_with([':', '#']) && !text.chars().any(char::is_control);
        fits.then(|| Self(text.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What may be done; each one holds those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Look: agents, and one's own works and results.
    Read,
    /// Give out work, answer it and stop it.
    Assign,
    /// The same with everybody's work.
    Admin,
}

impl Scope {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Read, Self::Assign, Self::Admin];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Assign => "assign",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|scope| scope.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is no scope: there are read, assign and admin"))
    }
}

/// Who a request comes from, and what it may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Their name; whoever runs this door themself has none.
    pub principal: Option<Principal>,
    /// The widest scope that they have.
    pub scope: Option<Scope>,
}

impl Access {
    /// Whoever runs the door themself: they may do everything.
    pub const OPERATOR: Self = Self { principal: None, scope: Some(Scope::Admin) };

    /// Whether they may do what needs this scope.
    pub fn allows(&self, needed: Scope) -> bool {
        self.scope >= Some(needed)
    }

    /// Whose works they are kept to; none when everybody's are open to them.
    pub fn kept_to(&self) -> Option<&Principal> {
        self.principal.as_ref().filter(|_| !self.allows(Scope::Admin))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_scope_holds_those_before_it() {
        let access = |scope| Access { principal: Principal::of_token("ci"), scope };
        for (scope, allowed) in [(None, 0), (Some(Scope::Read), 1), (Some(Scope::Assign), 2), (Some(Scope::Admin), 3)] {
            let count = Scope::ALL.into_iter().filter(|needed| access(scope).allows(*needed)).count();
            assert_eq!(count, allowed, "{scope:?}");
        }
        assert_eq!(access(Some(Scope::Admin)).kept_to(), None);
        assert_eq!(access(Some(Scope::Assign)).kept_to().unwrap().as_str(), "token:ci");
        assert_eq!(Access::OPERATOR.kept_to(), None);
    }

    #[test]
    fn names_that_would_garble_a_line_are_none() {
        for bad in ["", "a\nb", &"x".repeat(600)] {
            assert_eq!(Principal::of_subject("https://id.example", bad), None, "{bad:?}");
        }
        assert_ne!(Principal::of_token("x"), Principal::of_subject("x", "x"));
    }
}
