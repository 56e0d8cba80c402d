//! The lattice's seal, of which this machine may have made one of its own while the server was away.

use sha2::{Digest, Sha256};

use super::Mesh;
use crate::model::hex::hex;
use crate::transport::{Bucket, Error, Expect, Result, SEAL, Transport};

impl Mesh {
    /// Brings the lattice's seal together: the server's is everybody's, and what was used here while that was away stands beside it, so
    /// that everybody can open what was sealed with it.
    pub(super) async fn unite_seal(&self, far: &Transport) -> Result<()> {
        match self.tell_seal(far).await {
            Err(error @ (Error::Unreachable(_) | Error::Unanswered(_))) => Err(error),
            Err(error) => {
                tracing::debug!(%error, "what seals here cannot be told to the lattice");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    async fn tell_seal(&self, far: &Transport) -> Result<()> {
        let Some(row) = self.local.table.get(Bucket::Keys, SEAL).await? else { return Ok(()) };
        match far.table.put(Bucket::Keys, SEAL, row.value.clone(), Expect::Absent, None).await {
            Err(Error::Conflict { .. }) => {}
            told => return told.map(|_| ()),
        }
        let Some(there) = far.table.get(Bucket::Keys, SEAL).await? else { return Ok(()) };
        if there.value == row.value {
            return Ok(());
        }
        let beside = format!("{SEAL}.{}", hex(&Sha256::digest(&row.value)));
        far.table.put(Bucket::Keys, &beside, row.value, Expect::Any, None).await?;
        match self.local.table.put(Bucket::Keys, SEAL, there.value, Expect::Revision(row.revision), None).await {
            // Another process of this folder was first.
            Ok(_) | Err(Error::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::watch;

    use super::*;
    use crate::transport::Change;
    use crate::transport::mesh::Sides;

    #[tokio::test]
    async fn a_seal_that_was_made_while_the_server_was_away_gives_way_to_the_lattices_and_is_kept_beside_it() {
        let sides = Sides::new();
        let (near, far) = (&sides.near, &sides.far);
        let (cut_off, _away) = sides.mesh(None);
        let (connected, _opened) = sides.mesh(Some(far.clone()));
        cut_off.table.put(Bucket::Keys, SEAL, "ours".into(), Expect::Absent, None).await.unwrap();
        far.table.put(Bucket::Keys, SEAL, "theirs".into(), Expect::Absent, None).await.unwrap();
        let mut watch = near.table.watch(Bucket::Keys).await.unwrap();
        let _forwarding = sides.process(watch::channel(Some(far.clone())).1, true);
        let is_united = |change: &Change| matches!(change, Change::Put(row) if row.key == SEAL && row.value == "theirs");
        let united = async { while !watch.next().await.unwrap().iter().any(is_united) {} };
        tokio::time::timeout(Duration::from_secs(20), united).await.expect("the seal comes together");
        for process in [&cut_off, &connected, far] {
            assert_eq!(process.table.get(Bucket::Keys, SEAL).await.unwrap().unwrap().value, "theirs");
        }
        let beside = connected.table.list_of(Bucket::Keys, SEAL).await.unwrap();
        assert_eq!(beside.iter().map(|row| &row.value[..]).collect::<Vec<_>>(), [b"ours"]);
    }
}
