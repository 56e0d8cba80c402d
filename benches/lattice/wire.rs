//! What the lattice's wire costs by itself: the messages of a work, from the same streams, with nothing but the server's own client.
//!
//! An item and its order, a taking after the last operation, the acceptance, the result; both ends hear what is said of works. No
//! work is checked, folded, fenced or kept: whatever the lattice does besides comes on top of this.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::stream::{Config, Republish};
use async_nats::jetstream::{Context, message::PublishMessage};
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::sync::{mpsc, oneshot};

use crate::load::{Measured, together};
use crate::raw::patient;

/// About as large as an assignment, and as what a leaf says of one.
const ORDER: usize = 700;
const WORD: usize = 250;
const WAITING_MAX: usize = 4_096;
const PATIENCE: Duration = Duration::from_secs(30);
const RESULT: &str = "result";

/// Both ends, each on its own connection.
#[derive(Clone)]
pub(crate) struct Alone {
    context: Context,
    waiting: Arc<Mutex<HashMap<u64, oneshot::Sender<()>>>>,
    next: Arc<AtomicU64>,
}

impl Alone {
    /// Connects both ends; they live as long as the runtime.
    pub(crate) async fn open(url: &str) -> anyhow::Result<Self> {
        let (assigner, leaf) = (async_nats::connect(url).await?, async_nats::connect(url).await?);
        let context = patient(&assigner);
        for name in ["hook", "log"] {
            let source = format!("alone.{name}.>");
            let republish = Republish { source: source.clone(), destination: format!("said.{source}"), headers_only: false };
            let stream = Config { name: format!("alone_{name}"), subjects: vec![source], republish: Some(republish), ..Config::default() };
            context.create_stream(stream).await?;
        }
        let mut results = assigner.subscribe("said.alone.log.>").await?;
        let mut heard = leaf.subscribe("said.alone.log.>").await?;
        let mut items = leaf.subscribe("said.alone.hook.item").await?;
        assigner.flush().await?;
        leaf.flush().await?;

        let alone = Self { context, waiting: Arc::default(), next: Arc::default() };
        let waiting = Arc::clone(&alone.waiting);
        spawn(async move {
            while let Some(said) = results.next().await {
                let Some((id, RESULT)) = said.subject.rsplit('.').nth(1).zip(said.subject.rsplit('.').next()) else { continue };
                let waiter = id.parse().ok().and_then(|id: u64| waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id));
                waiter.map(|waiter| waiter.send(()));
            }
        });
        spawn(async move { while heard.next().await.is_some() {} });
        let (free, mut taken) = mpsc::channel::<Bytes>(WAITING_MAX);
        spawn(async move {
            while let Some(item) = items.next().await {
                let _ = free.send(item.payload).await;
            }
        });
        let far = patient(&leaf);
        spawn(async move {
            let mut last = 0;
            while let Some(first) = taken.recv().await {
                // Whatever waits is taken with one operation.
                let mut batch = vec![first];
                while let Some(Some(more)) = taken.recv().now_or_never() {
                    batch.push(more);
                }
                let operation = message(vec![b'o'; 60 * batch.len()]).header("Nats-Expected-Last-Subject-Sequence", last.to_string());
                last = far.send_publish("alone.hook.op", operation).await.expect("sent").await.expect("taken").sequence;
                for item in batch {
                    let far = far.clone();
                    spawn(async move {
                        let id = u64::from_be_bytes(item[..8].try_into().expect("eight bytes"));
                        let accepted = far.send_publish(format!("alone.log.{id}.accepted"), message(vec![b'a'; WORD])).await.expect("sent");
                        let result = far.send_publish(format!("alone.log.{id}.{RESULT}"), message(vec![b'r'; WORD])).await.expect("sent");
                        accepted.await.expect("stored");
                        result.await.expect("stored");
                    });
                }
            }
        });
        Ok(alone)
    }

    async fn one(&self) -> anyhow::Result<()> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut body = vec![b'x'; ORDER];
        body[..8].copy_from_slice(&id.to_be_bytes());
        let (settled, heard) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, settled);
        let item = message(body.clone()).header("Lattice-Item", format!("{id} echo 0"));
        self.context.send_publish("alone.hook.item", item).await?.await?;
        self.context.send_publish(format!("alone.log.{id}.assigned"), message(body)).await?.await?;
        tokio::time::timeout(PATIENCE, heard).await.context("no result")??;
        Ok(())
    }

    /// So many works, so many of them at once.
    pub(crate) async fn load(&self, count: usize, at_once: usize) -> anyhow::Result<Measured> {
        let alone = self.clone();
        together(count, at_once, move || {
            let alone = alone.clone();
            async move { alone.one().await }
        })
        .await
    }
}

/// A message under an id of its own, as all of the lattice's are.
fn message(body: Vec<u8>) -> PublishMessage {
    PublishMessage::build().payload(body.into()).message_id(uuid::Uuid::new_v4().simple().to_string())
}

#[expect(clippy::disallowed_methods, reason = "a bench has no tracker")]
fn spawn(task: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(task);
}
