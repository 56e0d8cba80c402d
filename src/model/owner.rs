//! Whose works are whose: who orders them, and in which workspace.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::access;
use super::hex::hex;
use super::id::StationId;

/// Who ordered a work, and where: a caller that remembers nothing finds its works by it. A digest, so that the wire carries no path.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Owner(String);

/// Who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Principal {
    /// Whoever started this process, and talks to it directly.
    User,
    /// Whoever comes through the HTTP door.
    Http,
}

/// Where a caller works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Workspace<'a> {
    /// A name from the configuration: the same workspace on every machine.
    Named(&'a str),
    /// A folder of a station's machine.
    Folder(&'a StationId, &'a Path),
}

impl Owner {
    /// The owner of what a principal orders in a workspace.
    pub fn of(principal: Principal, workspace: &Workspace<'_>) -> Self {
        let mut digest = Sha256::new();
        digest.update(match principal {
            Principal::User => b"user\0",
            Principal::Http => b"http\0",
        });
        match workspace {
            Workspace::Named(name) => {
                digest.update(b"name\0");
                digest.update(name);
            }
            Workspace::Folder(station, path) => {
                digest.update(b"folder\0");
                digest.update(station.as_str());
                digest.update(b"\0");
                digest.update(path.as_os_str().as_encoded_bytes());
            }
        }
        Self::from_digest(&digest.finalize())
    }

    /// The owner of what somebody with a name of their own orders in the same workspace.
    #[must_use]
    pub fn for_principal(&self, principal: &access::Principal) -> Self {
        let mut digest = Sha256::new();
        digest.update(b"principal\0");
        digest.update(&self.0);
        digest.update(b"\0");
        digest.update(principal.as_str());
        Self::from_digest(&digest.finalize())
    }

    fn from_digest(digest: &[u8]) -> Self {
        Self(hex(&digest[..16]))
    }

    /// The digest.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_principal_and_each_workspace_has_works_of_its_own() {
        let (here, there): (StationId, StationId) = ("here".parse().unwrap(), "there".parse().unwrap());
        let (one, two) = (Path::new("/one"), Path::new("/two"));
        let spaces = [
            Workspace::Named("/one"),
            Workspace::Named("two"),
            Workspace::Folder(&here, one),
            Workspace::Folder(&here, two),
            Workspace::Folder(&there, one),
        ];
        let mut owners: Vec<Owner> =
            spaces.iter().flat_map(|space| [Principal::User, Principal::Http].map(|who| Owner::of(who, space))).collect();
        assert_eq!(owners[0], Owner::of(Principal::User, &Workspace::Named("/one")));
        let named = owners[1].for_principal(&access::Principal::kept("token:ci"));
        assert_eq!(named, owners[1].for_principal(&access::Principal::kept("token:ci")));
        owners.extend([owners[3].for_principal(&access::Principal::kept("token:ci")), named]);
        owners.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        owners.dedup();
        assert_eq!(owners.len(), 12);
    }
}
