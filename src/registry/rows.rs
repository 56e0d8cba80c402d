//! What stands in the registry's tables.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::agents::source_id;
use crate::model::agent::{Definition, Manifest};
use crate::model::id::{AgentName, InstanceId, StationId};
use crate::transport::Row;

/// A claim on an agent's name, as the table keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Claim {
    pub(super) station: StationId,
    pub(super) source: String,
    pub(super) manifest: Manifest,
}

/// A process's sign of life, as the table keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Sign {
    pub(super) station: StationId,
    pub(super) instance: InstanceId,
    /// Agents it runs, and the source of each.
    pub(super) agents: BTreeMap<AgentName, String>,
    /// It shares these agents' works by their names as well.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) by_name: bool,
    /// It is no sign of life: how that ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) gone: Option<Gone>,
}

/// The source of an agent that is the same wherever its file stands. No file's place is called so.
pub(super) const BY_NAME: &str = "name";

/// Whether a process with an agent of this source runs the works of a claim's source.
pub(super) fn runs(own: &str, by_name: bool, claimed: &str) -> bool {
    own == claimed || (by_name && claimed == BY_NAME)
}

/// Which of the agents of one name it is.
pub(super) fn source_of(definition: &Definition) -> String {
    definition.source.as_deref().map_or_else(|| "builtin".to_owned(), source_id)
}

impl Sign {
    /// Whether the process is alive and runs the agent of this claim.
    pub(super) fn serves(&self, name: &AgentName, claim: &Claim) -> bool {
        self.gone.is_none()
            && self.station == claim.station
            && self.agents.get(name).is_some_and(|own| runs(own, self.by_name, &claim.source))
    }
}

/// How a process ceased to give signs of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Gone {
    /// It said goodbye.
    Left,
    /// Its sign expired.
    #[serde(other)]
    Lost,
}

pub(super) fn bytes_of(row: &impl Serialize) -> Bytes {
    // Rows have string keys only, so writing them into memory does not fail.
    Bytes::from(serde_json::to_vec(row).unwrap_or_default())
}

pub(super) fn claim_of(row: &Row) -> Option<(AgentName, (Claim, u64))> {
    let claim: Claim = read(row)?;
    Some((row.key.parse().ok()?, (claim, row.revision)))
}

pub(super) fn sign_of(row: &Row) -> Option<(String, Sign)> {
    Some((row.key.clone(), read(row)?))
}

fn read<T: serde::de::DeserializeOwned>(row: &Row) -> Option<T> {
    serde_json::from_slice(&row.value)
        .map_err(|error| tracing::warn!(key = row.key, %error, "skipped a row of the registry that cannot be read"))
        .ok()
}
