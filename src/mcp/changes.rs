//! What is pushed to clients: changed lists and changed resources, to clients of both protocol generations.
//!
//! A change may stand for several; a reader that fell behind or had to begin anew is told once more, never once less.

use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::stream::{Stream, StreamExt, select_all, unfold};
use rmcp::ErrorData;
use rmcp::model::{ResourceUpdatedNotificationParam, SubscriptionFilter};
use rmcp::service::{Peer, RoleServer, SubscriptionContext};
use tokio::sync::watch;

use super::problem::Problem;
use super::resources::Uri;
use super::roots::Listener;
use super::server::{Connection, Shared};
use crate::dispatcher::{Caller, Dispatcher, Error};
use crate::model::id::{AgentName, RunId};
use crate::registry::Agent;
use crate::transport::{self, Filter, Follow};

/// How long a reader that failed waits before it begins anew.
const RETRY: Duration = Duration::from_secs(1);

/// What a client hears of.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Topic {
    /// The lists of tools and resources: both name agents.
    Lists,
    /// One resource, under the text by which the client named it.
    Resource(Uri, String),
}

/// Where changes of a topic are seen.
enum Source {
    Registry(watch::Receiver<u64>),
    Agent { registry: watch::Receiver<u64>, name: AgentName, last: Option<Box<Agent>> },
    Work(Box<dyn Follow>),
    Run { heard: Listener, top: RunId },
}

impl Source {
    async fn open(shared: &Shared, topic: &Topic) -> transport::Result<Self> {
        let dispatcher = &shared.dispatcher;
        let (registry, log) = (dispatcher.registry(), &dispatcher.transport().log);
        Ok(match topic {
            Topic::Lists => Self::Registry(registry.changes()),
            Topic::Resource(Uri::Agent(name), _) => {
                let changes = registry.changes();
                Self::Agent { registry: changes, name: name.clone(), last: agent_now(dispatcher, name) }
            }
            Topic::Resource(Uri::Work(id) | Uri::Result(id), _) => Self::Work(log.follow(Filter::Work(*id), log.head().await?).await?),
            Topic::Resource(Uri::Run(top), _) => {
                Self::Run { heard: shared.roots.listen(log, &shared.tasks, &shared.stop, top).await?, top: top.clone() }
            }
        })
    }

    /// Waits for the next change.
    async fn changed(&mut self, dispatcher: &Dispatcher) -> transport::Result<()> {
        match self {
            Self::Registry(registry) => registry.changed().await.map_err(|_| transport::Error::Closed),
            Self::Agent { registry, name, last } => loop {
                registry.changed().await.map_err(|_| transport::Error::Closed)?;
                let now = agent_now(dispatcher, name);
                if now != *last {
                    *last = now;
                    return Ok(());
                }
            },
            Self::Work(follow) => follow.next().await.map(|_| ()),
            // Where nobody knows to which run something happened, it may be this one.
            Self::Run { heard, top } => heard.next(|run| run.as_ref().is_none_or(|run| is_below(run, top))).await,
        }
    }
}

fn agent_now(dispatcher: &Dispatcher, name: &AgentName) -> Option<Box<Agent>> {
    dispatcher.registry().snapshot().agents.get(name).cloned().map(Box::new)
}

fn is_below(run: &RunId, top: &RunId) -> bool {
    run.as_str().strip_prefix(top.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

type Changes = Pin<Box<dyn Stream<Item = Topic> + Send>>;

/// The changes of a topic, for as long as the transport is open.
fn follow(shared: Arc<Shared>, topic: Topic, source: Source) -> Changes {
    let next = |(shared, topic, mut source): (Arc<Shared>, Topic, Source)| async move {
        match source.changed(&shared.dispatcher).await {
            Ok(()) => {}
            Err(transport::Error::Closed) => return None,
            Err(error) => {
                tracing::warn!(%error, ?topic, "lost track of a resource; beginning anew");
                loop {
                    tokio::time::sleep(RETRY).await;
                    match Source::open(&shared, &topic).await {
                        Ok(opened) => break source = opened,
                        Err(transport::Error::Closed) => return None,
                        Err(_) => {}
                    }
                }
            }
        }
        Some((topic.clone(), (shared, topic, source)))
    };
    Box::pin(unfold((shared, topic, source), next))
}

/// Tells an older client of changed lists, until its connection ends; what changes while the station wakes is in the first lists.
pub(super) fn tell_of_lists(connection: &Connection, peer: Peer<RoleServer>) {
    let shared = Arc::clone(&connection.shared);
    let mut registry = connection.changes.clone();
    let closing = connection.closing.clone();
    connection.shared.tasks.spawn(async move {
        let shown = tokio::select! {
            () = closing.cancelled() => return,
            shown = shared.awake.wait() => *shown,
        };
        loop {
            tokio::select! {
                () = closing.cancelled() => return,
                changed = registry.changed() => if changed.is_err() { return },
            }
            if *registry.borrow_and_update() <= shown {
                continue;
            }
            let told = async {
                peer.notify_tool_list_changed().await?;
                peer.notify_resource_list_changed().await
            };
            tokio::select! {
                () = closing.cancelled() => return,
                told = told => if told.is_err() { return },
            }
        }
    });
}

/// Whether a caller may hear of a resource; only those who are kept to their own works must name one that exists.
async fn may_hear(dispatcher: &Dispatcher, caller: &Caller, uri: &Uri) -> Result<(), Error> {
    match uri {
        Uri::Agent(_) => Ok(()),
        Uri::Work(id) | Uri::Result(id) => dispatcher.must_see(caller, &[*id]).await,
        Uri::Run(_) if dispatcher.kept_to(caller).await?.is_none() => Ok(()),
        Uri::Run(run_id) => dispatcher.check_run(caller, run_id).await.map(|_| ()),
    }
}

/// Tells an older client of each change of a resource, until it unsubscribes or its connection ends.
pub(super) async fn subscribe(connection: &Connection, caller: &Caller, uri: String, peer: Peer<RoleServer>) -> Result<(), ErrorData> {
    let dispatcher = connection.shared.dispatcher.clone();
    let parsed: Uri = uri.parse().map_err(|problem: Problem| problem.into_not_found(&uri))?;
    if let Uri::Work(id) | Uri::Result(id) = parsed {
        dispatcher.check(id).await.map_err(|error| Problem::from(error).into_not_found(&uri))?;
    }
    may_hear(&dispatcher, caller, &parsed).await.map_err(|error| Problem::from(error).into_not_found(&uri))?;
    let topic = Topic::Resource(parsed, uri.clone());
    let source = Source::open(&connection.shared, &topic).await.map_err(|error| Problem::from(error).into_invalid_params())?;
    let ends = connection.closing.child_token();
    {
        let mut known = connection.subscriptions.lock().unwrap_or_else(PoisonError::into_inner);
        if known.contains_key(&uri) {
            return Ok(());
        }
        let max = dispatcher.config().mcp.subscriptions_max;
        if known.len() >= max as usize {
            let wrong = format!("this connection is subscribed to {max} resources already (mcp.subscriptions_max)");
            return Err(Problem::new(wrong, "Unsubscribe from some of them first.").into_invalid_params());
        }
        known.insert(uri, ends.clone());
    }
    let mut changes = follow(Arc::clone(&connection.shared), topic, source);
    connection.shared.tasks.spawn(async move {
        let tell = async {
            while let Some(topic) = changes.next().await {
                let Topic::Resource(_, uri) = topic else { continue };
                if peer.notify_resource_updated(ResourceUpdatedNotificationParam::new(uri)).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = ends.cancelled() => {}
            () = tell => {}
        }
    });
    Ok(())
}

/// Ends a subscription; one that is not known is ended already.
pub(super) fn unsubscribe(connection: &Connection, uri: &str) {
    let known = connection.subscriptions.lock().unwrap_or_else(PoisonError::into_inner).remove(uri);
    if let Some(ends) = known {
        ends.cancel();
    }
}

/// What of a newer client's wishes is served.
pub(super) fn accepted(requested: &SubscriptionFilter, max: u32) -> SubscriptionFilter {
    let resources = requested.resource_subscriptions.iter().flatten();
    let known = resources.filter(|uri| uri.parse::<Uri>().is_ok()).take(max as usize);
    SubscriptionFilter::builder().tools_list_changed().resources_list_changed().resource_subscriptions(known).build()
}

/// Tells a newer client of what it listens to, until it cancels, its connection ends or the station stops.
pub(super) async fn listen(connection: &Connection, caller: &Caller, context: &SubscriptionContext) -> Result<(), ErrorData> {
    let dispatcher = &connection.shared.dispatcher;
    let (accepted, sink) = (context.accepted(), context.sink());
    let mut topics = Vec::new();
    let lists = [accepted.tools_list_changed, accepted.resources_list_changed];
    if lists.contains(&Some(true)) {
        topics.push(Topic::Lists);
    }
    for uri in accepted.resource_subscriptions.iter().flatten() {
        let Ok(parsed) = uri.parse() else { continue };
        may_hear(dispatcher, caller, &parsed).await.map_err(|error| Problem::from(error).into_not_found(uri))?;
        topics.push(Topic::Resource(parsed, uri.clone()));
    }
    let mut streams = Vec::with_capacity(topics.len());
    let mut unsure = Vec::new();
    for topic in topics {
        let source = match &topic {
            Topic::Lists => Source::Registry(connection.changes.clone()),
            // The client was told that it is listening before it was: what came in between is gone.
            Topic::Resource(_, uri) => {
                unsure.push(uri.clone());
                Source::open(&connection.shared, &topic).await.map_err(|error| Problem::from(error).into_invalid_params())?
            }
        };
        streams.push(follow(Arc::clone(&connection.shared), topic, source));
    }
    let mut changes = select_all(streams);
    let tell = async {
        for uri in unsure {
            sink.notify_resource_updated(uri).await?;
        }
        while let Some(topic) = changes.next().await {
            match topic {
                Topic::Lists => {
                    if accepted.tools_list_changed == Some(true) {
                        sink.notify_tool_list_changed().await?;
                    }
                    if accepted.resources_list_changed == Some(true) {
                        sink.notify_resource_list_changed().await?;
                    }
                }
                Topic::Resource(_, uri) => sink.notify_resource_updated(uri).await?,
            }
        }
        // Nothing to tell of is no reason to hang up.
        std::future::pending::<Result<(), rmcp::service::SubscriptionSendError>>().await
    };
    tokio::select! {
        () = context.cancelled() => {}
        () = connection.closing.cancelled() => {}
        told = tell => if let Err(error) = told {
            tracing::debug!(%error, "a listening client is gone");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_its_descendants_below_it_and_no_others() {
        let top: RunId = "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60-1".parse().unwrap();
        assert!(is_below(&top, &top));
        assert!(is_below(&top.child(4).child(2), &top));
        assert!(!is_below(&top.root().child(11), &top));
        assert!(!is_below(&top.root(), &top));
    }

    #[test]
    fn only_known_resources_are_listened_to_and_not_too_many() {
        let uris = (0..999).map(|n| format!("agent://a{n}")).chain(["file:///etc/passwd".to_owned()]);
        let requested = SubscriptionFilter::builder().resource_subscriptions(uris).build();
        assert_eq!(accepted(&requested, 256).resource_subscriptions.unwrap().len(), 256);
        let requested = SubscriptionFilter::builder().resource_subscription("file:///etc/passwd").build();
        assert!(accepted(&requested, 256).resource_subscriptions.unwrap().is_empty());
    }
}
