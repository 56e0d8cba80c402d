//! The two sides of a mesh, for tests: a store of this machine, and one that stands for the server.

use tempfile::TempDir;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Far, Place, compose};
use crate::config::Config;
use crate::telemetry::new_instance;
use crate::transport::local::{self, Local};
use crate::transport::{Reach, Transport};

/// Both stores, each in a folder of its own, and what the processes that share them do in the background.
pub(crate) struct Sides {
    pub(crate) near: Transport,
    pub(crate) far: Transport,
    pub(crate) tasks: TaskTracker,
    pub(crate) cancel: CancellationToken,
    _stores: [(Local, TempDir); 2],
}

impl Sides {
    pub(crate) fn new() -> Self {
        let settings = Config::default().lattice.storage;
        let stores = [(); 2].map(|()| {
            let dir = tempfile::tempdir().unwrap();
            (local::open(dir.path(), &settings).unwrap(), dir)
        });
        let [near, far] = stores.each_ref().map(|(store, _)| store.transport());
        Self { near, far, tasks: TaskTracker::new(), cancel: CancellationToken::new(), _stores: stores }
    }

    /// A process of station `here`.
    pub(crate) fn process(&self, far: Far, forwards: bool) -> Transport {
        let place = Place { station: "here".parse().unwrap(), instance: new_instance(), forwards, goes_on: |_| true };
        compose(self.near.clone(), far, watch::channel(Reach::Connected).1, place, self.tasks.clone(), self.cancel.clone())
    }

    /// A process that forwards nothing, and what it has of the server, which can be changed.
    pub(crate) fn mesh(&self, far: Option<Transport>) -> (Transport, watch::Sender<Option<Transport>>) {
        let (server, far) = watch::channel(far);
        (self.process(far, false), server)
    }
}
