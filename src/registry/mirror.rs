//! The tables as this process last saw them, and its own catalogue.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Identity;
use super::missing::Missing;
use super::rows::{BY_NAME, Claim, Sign, claim_of, runs, sign_of, source_of};
use crate::agents::Catalog;
use crate::model::agent::{Definition, Manifest};
use crate::model::id::{AgentName, InstanceId, StationId};
use crate::transport::{Bucket, Change, Row};

#[derive(Default)]
pub(super) struct Mirror {
    pub(super) claims: BTreeMap<AgentName, (Claim, u64)>,
    pub(super) signs: BTreeMap<String, Sign>,
    pub(super) own: Arc<Catalog>,
    pub(super) missing: Missing,
    /// How we last described an agent. Replicas may read a file at different moments, or each its own: whoever speaks last
    /// stands, and nobody says the same again because another said something else.
    pub(super) offered: BTreeMap<AgentName, Manifest>,
    /// Names that were refused to us, each by the station that holds it.
    pub(super) refused: BTreeMap<AgentName, StationId>,
}

impl Mirror {
    /// Whether another live process than ours runs the agent of a claim.
    pub(super) fn another_serves(&self, me: InstanceId, name: &AgentName, claim: &Claim) -> bool {
        self.signs.values().any(|sign| sign.instance != me && sign.serves(name, claim))
    }

    /// Keeps in mind how our agents are described, where the claims say what we say.
    pub(super) fn note_what_is_offered(&mut self, me: &Identity) {
        for (name, definition) in &self.own.definitions {
            let says_it = |(claim, _): &(Claim, u64)| {
                claim.station == me.station
                    && runs(&source_of(definition), me.by_name, &claim.source)
                    && claim.manifest == definition.manifest
            };
            if self.claims.get(name).is_some_and(says_it) && self.offered.get(name) != Some(&definition.manifest) {
                self.offered.insert(name.clone(), definition.manifest.clone());
            }
        }
    }

    /// Whether a claim of ours needs no other description: it has this one, or a replica has spoken after us.
    pub(super) fn is_described(&self, me: &Identity, held: &Claim, definition: &Definition) -> bool {
        let (name, manifest) = (&definition.manifest.name, &definition.manifest);
        // Once nobody is left who shares it by its file only, those who do by its name can.
        let by_file = |sign: &Sign| sign.instance != me.instance && !sign.by_name && sign.serves(name, held);
        if me.by_name && held.source != BY_NAME && !self.signs.values().any(by_file) {
            return false;
        }
        if held.manifest == *manifest || !self.another_serves(me.instance, name, held) {
            return held.manifest == *manifest;
        }
        // Who cannot run it does not speak for those who can.
        let speaks_for_others = manifest.unavailable.is_some() && held.manifest.unavailable.is_none();
        speaks_for_others || self.offered.get(name) == Some(manifest)
    }

    /// Takes in changes; `there` are the keys that a watch has listed, until it has listed all. Gives whether anything is different.
    pub(super) fn take_in(&mut self, bucket: Bucket, changes: Vec<Change>, there: &mut Option<BTreeSet<String>>) -> bool {
        let mut different = false;
        for change in changes {
            different |= !matches!(&change, Change::Put(row) if bucket == Bucket::Stations && self.knows(row));
            if let (Change::Put(row), Some(there)) = (&change, there.as_mut()) {
                there.insert(row.key.clone());
            }
            match (bucket, change) {
                // What went away while nobody watched is not listed.
                (Bucket::Agents, Change::Loaded) => {
                    let there = there.take().unwrap_or_default();
                    self.claims.retain(|name, _| there.contains(name.as_str()));
                }
                (Bucket::Stations, Change::Loaded) => {
                    let there = there.take().unwrap_or_default();
                    let vanished: Vec<String> = self.signs.keys().filter(|key| !there.contains(*key)).cloned().collect();
                    vanished.into_iter().for_each(|key| self.vanish(key));
                }
                (Bucket::Agents, Change::Put(row)) => {
                    let known = row.key.parse().ok().and_then(|name: AgentName| self.claims.get(&name));
                    if known.is_none_or(|(_, revision)| *revision < row.revision) {
                        self.claims.extend(claim_of(&row));
                    }
                }
                (Bucket::Agents, Change::Removed(key)) => {
                    if let Ok(name) = key.parse::<AgentName>() {
                        self.claims.remove(&name);
                    }
                }
                (Bucket::Stations, Change::Put(row)) => {
                    let Some((key, sign)) = sign_of(&row) else { continue };
                    self.missing.forget(&key);
                    if sign.gone.is_some() {
                        self.signs.remove(&key)
                    } else {
                        self.signs.insert(key, sign)
                    };
                }
                (Bucket::Stations, Change::Removed(key)) => self.vanish(key),
                _ => {}
            }
        }
        different
    }

    /// Whether a sign of life says what is known already.
    fn knows(&self, row: &Row) -> bool {
        sign_of(row).is_some_and(|(key, sign)| self.signs.get(&key) == Some(&sign))
    }

    /// Takes in what there is now of our own names and of our replicas.
    pub(super) fn replace(&mut self, claims: &[Row], signs: Vec<Row>) {
        self.claims = claims.iter().filter_map(claim_of).collect();
        let there: BTreeSet<String> = signs.iter().map(|row| row.key.clone()).collect();
        let vanished: Vec<String> = self.signs.keys().filter(|key| !there.contains(*key)).cloned().collect();
        vanished.into_iter().for_each(|key| self.vanish(key));
        self.take_in(Bucket::Stations, signs.into_iter().map(Change::Put).collect(), &mut None);
    }

    /// A sign of life is no longer there, and nobody has said why.
    fn vanish(&mut self, key: String) {
        if let Some(sign) = self.signs.remove(&key) {
            self.missing.add(key, sign);
        }
    }
}
