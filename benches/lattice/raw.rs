//! The reference over NATS: the same hand-over with nothing but the server's own client.
//!
//! Publish to a work queue with acknowledgement, pull, publish the result with acknowledgement, receive it, acknowledge.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::stream::{Config, RetentionPolicy};
use async_nats::jetstream::{self, AckKind};
use futures_util::StreamExt as _;
use tokio::sync::oneshot;

use crate::load::{Measured, together};

/// About as large as an assignment.
const BODY: usize = 400;
const PATIENCE: Duration = Duration::from_secs(30);

/// Both ends of the chain, each on its own connection.
#[derive(Clone)]
pub(crate) struct Raw {
    context: jetstream::Context,
    waiting: Arc<Mutex<HashMap<u64, oneshot::Sender<()>>>>,
    next: Arc<AtomicU64>,
}

impl Raw {
    /// Connects both ends; they live as long as the runtime.
    pub(crate) async fn open(url: &str) -> anyhow::Result<Self> {
        let (assigner, leaf) = (async_nats::connect(url).await?, async_nats::connect(url).await?);
        let context = patient(&assigner);
        let hook = Config {
            name: "raw_hook".into(),
            subjects: vec!["raw.hook".into()],
            retention: RetentionPolicy::WorkQueue,
            ..Config::default()
        };
        let hook = context.create_stream(hook).await?;
        context.create_stream(Config { name: "raw_log".into(), subjects: vec!["raw.log.*".into()], ..Config::default() }).await?;
        let mut results = assigner.subscribe("raw.log.*").await?;
        // One round trip, so that the server has the subscription.
        hook.get_info().await?;
        let raw = Self { context, waiting: Arc::default(), next: Arc::default() };
        let waiting = Arc::clone(&raw.waiting);
        #[expect(clippy::disallowed_methods, reason = "a bench has no tracker")]
        tokio::spawn(async move {
            while let Some(message) = results.next().await {
                let id = message.subject.rsplit('.').next().and_then(|id| id.parse().ok());
                let waiter = id.and_then(|id: u64| waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id));
                waiter.map(|waiter| waiter.send(()));
            }
        });
        let far = patient(&leaf);
        let pulled = pull::Config { durable_name: Some("leaf".into()), max_ack_pending: 10_000, ..pull::Config::default() };
        let consumer = far.get_stream("raw_hook").await?.create_consumer(pulled).await?;
        let mut orders = consumer.messages().await?;
        #[expect(clippy::disallowed_methods, reason = "a bench has no tracker")]
        tokio::spawn(async move {
            while let Some(Ok(order)) = orders.next().await {
                let far = far.clone();
                #[expect(clippy::disallowed_methods, reason = "a bench has no tracker")]
                tokio::spawn(async move {
                    let id = u64::from_be_bytes(order.payload[..8].try_into().expect("eight bytes"));
                    let stored = far.publish(format!("raw.log.{id}"), order.payload.clone()).await.expect("sent");
                    stored.await.expect("stored");
                    order.ack_with(AckKind::Ack).await.expect("acknowledged");
                });
            }
        });
        Ok(raw)
    }

    async fn one(&self) -> anyhow::Result<()> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut body = vec![b'x'; BODY];
        body[..8].copy_from_slice(&id.to_be_bytes());
        let (settled, heard) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, settled);
        let order = jetstream::message::PublishMessage::build().payload(body.into()).message_id(id.to_string());
        self.context.send_publish("raw.hook", order).await?.await?;
        tokio::time::timeout(PATIENCE, heard).await.context("no result")??;
        Ok(())
    }

    /// So many works, so many of them at once.
    pub(crate) async fn load(&self, count: usize, at_once: usize) -> anyhow::Result<Measured> {
        let raw = self.clone();
        together(count, at_once, move || {
            let raw = raw.clone();
            async move { raw.one().await }
        })
        .await
    }
}

/// A client that waits for a slow disk.
pub(crate) fn patient(client: &async_nats::Client) -> jetstream::Context {
    let mut context = jetstream::new(client.clone());
    context.set_timeout(PATIENCE);
    context
}
