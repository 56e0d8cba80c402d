//! What the server's own stream says of works: read past our program, and judged by rules that are written down here once more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use async_nats::jetstream::{self, consumer::pull};
use futures_util::StreamExt;
use serde_json::Value;

use super::fleet::{Fleet, looked_up};
use crate::lifecycle::eventually;
use crate::rpc::Client;

/// The lattice that tests use.
const LATTICE: &str = "default";

/// What a test asked for, and what was acknowledged of it.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// By work.
    pub(super) orders: BTreeMap<String, Order>,
    /// Tasks, each of which is asked for once.
    asked: BTreeSet<String>,
}

/// An order that was acknowledged.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Order {
    pub(super) task: String,
    pub(super) run_id: String,
    pub(super) root_run_id: String,
}

impl Ledger {
    pub(super) fn ask(&mut self, task: &str) {
        assert!(self.asked.insert(task.to_owned()), "{task} is asked for twice");
    }

    /// Takes in the answer of `assign_work`; gives the work's id.
    pub(super) fn acknowledge(&mut self, task: &str, answer: &Value) -> String {
        let text = |field: &str| answer[field].as_str().unwrap_or_else(|| panic!("no {field}: {answer}")).to_owned();
        let order = Order { task: task.to_owned(), run_id: text("run_id"), root_run_id: text("root_run_id") };
        assert!(self.orders.insert(text("work_id"), order).is_none(), "the id of {answer} was given before");
        text("work_id")
    }

    /// Assigns a task and takes in the answer.
    pub(super) async fn assign(&mut self, desk: &Client, agent: &str, task: &str) -> String {
        self.assign_with(desk, serde_json::json!({"agent_name": agent, "task": task})).await
    }

    pub(super) async fn assign_with(&mut self, desk: &Client, arguments: Value) -> String {
        let task = arguments["task"].as_str().unwrap().to_owned();
        self.ask(&task);
        let answer = desk.call("assign_work", arguments).await;
        self.acknowledge(&task, &answer)
    }

    /// How many works were asked for, whatever was answered.
    pub(super) fn asked(&self) -> usize {
        self.asked.len()
    }

    pub(super) fn ids(&self) -> Vec<String> {
        self.orders.keys().cloned().collect()
    }
}

/// All events of one work, in the stream's order.
#[derive(Debug, Clone, Default)]
pub(super) struct Story(pub(super) Vec<Said>);

/// One event.
#[derive(Debug, Clone)]
pub(super) struct Said {
    pub(super) kind: String,
    pub(super) attempt: u64,
    pub(super) body: Value,
}

impl Story {
    /// The event that settled it, and those that came too late and would have settled it as well.
    pub(super) fn settled(&self) -> (Option<&Said>, Vec<&Said>) {
        let (mut settled, mut late) = (None, Vec::new());
        let (mut highest, mut runs) = (0, false);
        for said in &self.0 {
            let settles = match said.kind.as_str() {
                "WORK_COMPLETE" => true,
                // What an attempt says for which there is a later one settles nothing, unless it has a result.
                "WORK_FAILED" => said.attempt >= highest,
                // A wish to stop settles what nobody runs.
                "WORK_CANCELLED" => {
                    if said.attempt == 0 {
                        !runs
                    } else {
                        said.attempt >= highest
                    }
                }
                _ => false,
            };
            if settles && settled.is_none() {
                settled = Some(said);
            } else if settles && said.attempt > 0 {
                late.push(said);
            }
            runs = match said.kind.as_str() {
                "WORK_ACCEPTED" => true,
                "WORK_RETRYING" if said.attempt >= highest => false,
                _ => runs,
            };
            highest = highest.max(said.attempt);
        }
        (settled, late)
    }
}

/// Every message of the lattice's log below `work`, by work.
pub(super) async fn stories(url: &str) -> BTreeMap<String, Story> {
    let mut stories: BTreeMap<String, Story> = BTreeMap::new();
    for (subject, body) in messages(url, &format!("lattice.{LATTICE}.work.>")).await {
        let Ok(body) = serde_json::from_slice::<Value>(&body) else { continue };
        let work_id = subject.split('.').nth(3).unwrap_or_default().to_owned();
        let said =
            Said { kind: body["type"].as_str().unwrap_or_default().to_owned(), attempt: body["attempt"].as_u64().unwrap_or(0), body };
        stories.entry(work_id).or_default().0.push(said);
    }
    stories
}

/// Every message of the log's stream on these subjects, in order; asked for again when the server does not give all of them.
pub(super) async fn messages(url: &str, subjects: &str) -> Vec<(String, Vec<u8>)> {
    eventually("the stream is read", async || read(url, subjects).await.ok()).await
}

async fn read(url: &str, subjects: &str) -> Result<Vec<(String, Vec<u8>)>, Box<dyn std::error::Error>> {
    let context = jetstream::new(async_nats::connect(servers(url)?).await?);
    let stream = context.get_stream(format!("lattice_{LATTICE}_log")).await?;
    let config = pull::OrderedConfig { filter_subject: subjects.to_owned(), ..pull::OrderedConfig::default() };
    let mut consumer = stream.create_consumer(config).await?;
    let mut left = consumer.info().await?.num_pending;
    let mut all = Vec::new();
    let mut messages = consumer.messages().await?;
    while left > 0 {
        let message = tokio::time::timeout(Duration::from_secs(10), messages.next()).await?.ok_or("the stream ended")??;
        left = message.info().map_err(|error| error.to_string())?.pending;
        all.push((message.subject.to_string(), message.payload.to_vec()));
    }
    Ok(all)
}

pub(super) fn servers(url: &str) -> Result<Vec<async_nats::ServerAddr>, Box<dyn std::error::Error>> {
    Ok(url.split(',').map(str::parse).collect::<Result<_, _>>()?)
}

/// What was found; the numbers are printed by whoever asks.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) lost: Vec<String>,
    pub(super) doubly: Vec<String>,
    pub(super) invented: Vec<String>,
    pub(super) broken: Vec<String>,
    /// Results of attempts that came after the settling one.
    pub(super) late: usize,
}

impl Findings {
    pub(super) fn assert_none(&self) -> &Self {
        let all = [&self.lost, &self.doubly, &self.invented, &self.broken];
        assert!(all.iter().all(|found| found.is_empty()), "{self:#?}");
        self
    }
}

/// Waits until everything has settled, and compares what was acknowledged, and what was asked for at all, with what the stream and the
/// agents' own lines say, and with what a process that has seen none of it tells of it.
pub(super) async fn examine(fleet: &Fleet, ledger: &Ledger) -> Findings {
    let Ledger { orders, asked } = ledger;
    let fresh = fleet.desk(&format!("fresh-{}", uuid::Uuid::now_v7().simple())).await;
    let ids = ledger.ids();
    until_told(fleet, &ids).await;
    until_settled(&fresh, &ids).await;
    let seen = looked_up(&fresh, &ids).await;
    let stories = stories(fleet.url()).await;
    let mut found = Findings::default();
    let mut tasks: BTreeMap<&str, &str> = BTreeMap::new();
    let mut runs: BTreeMap<&str, &str> = BTreeMap::new();
    for (id, story) in &stories {
        // A work may be on the stream whose order was never answered, but one that nobody asked for may not.
        let Some(order) = story.0.iter().find(|said| said.kind == "WORK_ASSIGNED").map(|said| &said.body["assignment"]) else {
            // A leaf that dies as it takes a work whose assigner has died leaves the order to whoever takes it next.
            if orders.contains_key(id) || story.settled().0.is_some() {
                found.broken.push(format!("{id} has no order: {story:?}"));
            }
            continue;
        };
        let (task, run) = (order["task"].as_str().unwrap(), order["orchestrator_run_id"].as_str().unwrap());
        if !asked.contains(task) {
            found.invented.push(format!("{id}: nobody asked for {task}"));
        }
        if let Some(other) = tasks.insert(task, id) {
            found.invented.push(format!("{task} is both {id} and {other}"));
        }
        if let Some(other) = runs.insert(run, id) {
            found.broken.push(format!("{run} is the run of both {id} and {other}"));
        }
        for said in &story.0 {
            if said.body["orchestrator_run_id"] != run || said.body["work_id"] != id.as_str() {
                found.broken.push(format!("{id}, run {run}, has an event of another: {said:?}"));
            }
        }
        let (settled, late) = story.settled();
        found.late += late.len();
        if let Some(settled) = settled
            && late.iter().any(|said| said.attempt == settled.attempt && said.kind != settled.kind)
        {
            found.doubly.push(format!("{id}: one attempt settled it in two ways: {settled:?}, {late:?}"));
        }
    }
    for (id, order) in orders {
        let Some(story) = stories.get(id) else {
            found.lost.push(format!("{id} ({}) is not on the stream", order.task));
            continue;
        };
        let (Some(settled), _) = story.settled() else {
            found.lost.push(format!("{id} ({}) did not settle: {:?}", order.task, story.0));
            continue;
        };
        let work = &seen[id];
        if work["event"] != settled.kind.as_str() || work["result"] != settled.body["result"] {
            found.doubly.push(format!("{id}: settled by {settled:?}, and told as {work}"));
        }
        if work["run_id"] != order.run_id.as_str() || settled.body["orchestrator_run_id"] != order.run_id.as_str() {
            found.broken.push(format!("{id}: its run was {}, and is told as {work}", order.run_id));
        }
        if order.run_id.rsplit_once('-').is_none_or(|(parent, _)| parent != order.root_run_id) {
            found.broken.push(format!("{id}: {} is no child of {}", order.run_id, order.root_run_id));
        }
    }
    found.broken.extend(never_ended(fleet, &stories));
    found
}

/// What a station did while the server was away is told when it is back, and an order may follow its acceptance. What is missing
/// after this is missing.
async fn until_told(fleet: &Fleet, ids: &[String]) {
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        let stories = stories(fleet.url()).await;
        let ordered = |story: &Story| story.0.iter().any(|said| said.kind == "WORK_ASSIGNED");
        if ids.iter().all(|id| stories.get(id).is_some_and(ordered)) || Instant::now() > patience {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Works that are complete although no agent says that it ran that attempt to its end, and attempts that ran more than once.
fn never_ended(fleet: &Fleet, stories: &BTreeMap<String, Story>) -> Vec<String> {
    let mut ended = BTreeSet::new();
    let mut begun: BTreeMap<(String, u64), usize> = BTreeMap::new();
    for ran in fleet.ran() {
        if ran.begins {
            *begun.entry((ran.work_id, ran.attempt)).or_default() += 1;
        } else {
            ended.insert((ran.work_id, ran.attempt));
        }
    }
    let twice = begun.into_iter().filter(|(_, times)| *times > 1).map(|(attempt, times)| format!("{attempt:?} ran {times} times"));
    let complete =
        stories.iter().flat_map(|(id, story)| story.0.iter().filter(|said| said.kind == "WORK_COMPLETE").map(move |said| (id, said)));
    let false_ones = complete
        .filter(|(id, said)| !ended.contains(&((*id).clone(), said.attempt)))
        .map(|(id, said)| format!("{id} is complete, and no agent ran attempt {} to its end", said.attempt));
    twice.chain(false_ones).collect()
}

/// Waits until each of these works has settled, as this process sees them.
pub(super) async fn until_settled(desk: &Client, ids: &[String]) {
    let settled = |work: &Value| ["COMPLETE", "FAILED", "CANCELLED"].contains(&work["status"].as_str().unwrap());
    for some in ids.chunks(200) {
        eventually("all have settled", async || {
            let answer = desk.call("await_work", serde_json::json!({"work_ids": some, "timeout": "10s"})).await;
            let works = answer["works"].as_array().cloned().unwrap_or_else(|| vec![answer.clone()]);
            works.iter().all(settled).then_some(())
        })
        .await;
    }
}
