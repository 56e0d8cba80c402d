//! The embedded transport as a fixture, with a clock that stands still until time is let pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use lattice_mcp::config::Storage;
use lattice_mcp::model::time::Timestamp;
use lattice_mcp::transport::Transport;
use lattice_mcp::transport::local::{self, Local, Options};
use tempfile::TempDir;

/// A store in a folder of its own.
pub(crate) struct Store {
    clock: Arc<AtomicI64>,
    first: Local,
    others: Vec<Local>,
    dir: TempDir,
}

fn open(dir: &TempDir, clock: &Arc<AtomicI64>) -> Local {
    let clock = Arc::clone(clock);
    let clock = Arc::new(move || Timestamp::from_millis(clock.load(Ordering::SeqCst)));
    local::open_with(dir.path(), &Storage::default(), Options { clock, ..Options::default() }).unwrap()
}

#[async_trait]
impl super::Fixture for Store {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(AtomicI64::new(1_800_000_000_000));
        Self { first: open(&dir, &clock), others: Vec::new(), clock, dir }
    }

    fn transport(&self) -> Transport {
        self.first.transport()
    }

    async fn second(&mut self) -> Transport {
        let second = open(&self.dir, &self.clock);
        let transport = second.transport();
        self.others.push(second);
        transport
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.clock.load(Ordering::SeqCst))
    }

    async fn pass(&self, span: Duration) {
        self.clock.fetch_add(i64::try_from(span.as_millis()).unwrap(), Ordering::SeqCst);
    }

    async fn restart(&mut self) -> Transport {
        self.others.clear();
        self.first.close();
        self.first = open(&self.dir, &self.clock);
        self.first.transport()
    }
}
