//! Looks at a server and says what it finds, for people.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio_util::task::TaskTracker;

use super::connect::{self, Connected, SERVER_MIN};
use super::link::{Background, Fault, Link};
use super::{Member, SKEW_MIN};
use crate::config;
use crate::model::time::Timestamp;
use crate::telemetry::machine_now;
use crate::transport::{Bucket, Wire};

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grade {
    /// As it should be.
    Good,
    /// It works, and somebody should know.
    Odd,
    /// It does not work.
    Bad,
}

/// Something that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// How good it is.
    pub grade: Grade,
    /// What it is, and what to do where it is not good.
    pub text: String,
}

impl Finding {
    /// A finding.
    pub fn new(what: impl Into<String>, grade: Grade, text: impl Into<String>) -> Self {
        Self { what: what.into(), grade, text: text.into() }
    }
}

/// Whether acknowledged messages have reached the disk: known of a server that we configure ourselves only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syncs {
    /// Before each acknowledgement.
    Always,
    /// Some time after it.
    Later,
    /// Nobody here knows.
    Unknown,
}

/// Connects to a server and looks at everything that the lattice needs of it; changes nothing.
pub async fn examine(member: &Member, settings: &config::Nats, syncs: Syncs) -> Vec<Finding> {
    let name = format!("lattice-mcp doctor {}", member.station);
    let wire = Wire::new(member.lattice.clone());
    let connected = match connect::connect(settings, &name, &wire.inbox(&member.station)).await {
        Ok(connected) => connected,
        Err(error) => return vec![Finding::new("server", Grade::Bad, error.to_string())],
    };
    let mut findings = vec![server(&connected), durability(syncs)];
    let options = member.options(settings, &connected, Arc::new(machine_now), &TaskTracker::new());
    let link = Link::new(connected.client.clone(), &options, Background::default());
    findings.push(round_trip(&link).await);
    findings.extend(clock_and_account(&link).await);
    findings.extend(streams(&link, member).await);
    findings
}

fn server(connected: &Connected) -> Finding {
    let info = connected.client.server_info();
    let (a, b, c) = SERVER_MIN;
    let text = format!("nats-server {} at {} ({a}.{b}.{c} or newer is needed), JetStream is on", info.version, connected.url);
    Finding::new("server", Grade::Good, text)
}

fn durability(syncs: Syncs) -> Finding {
    let (grade, text) = match syncs {
        Syncs::Always => (Grade::Good, "each acknowledged message has reached the disk (durability: power)"),
        Syncs::Later => (
            Grade::Odd,
            "acknowledged messages survive the death of every process; a power cut may take the last two minutes. \
             lattice.storage.durability: power makes each reach the disk first",
        ),
        Syncs::Unknown => (
            Grade::Odd,
            "whether acknowledged messages have reached the disk is the server's setting, and it does not tell: \
             jetstream { sync_interval: always } in its configuration makes sure (the default is two minutes)",
        ),
    };
    Finding::new("acknowledgements", grade, text)
}

async fn round_trip(link: &Link) -> Finding {
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        if link.client.flush().await.is_err() {
            return Finding::new("round trip", Grade::Bad, "the connection broke");
        }
        if let Err(fault) = link.api("INFO", &Value::Null).await {
            return Finding::new("round trip", Grade::Bad, fault.to_string());
        }
        best = best.min(start.elapsed());
    }
    let grade = if best < Duration::from_millis(250) { Grade::Good } else { Grade::Odd };
    Finding::new("round trip", grade, format!("{:.1} ms for a request", best.as_secs_f64() * 1000.0))
}

async fn clock_and_account(link: &Link) -> Vec<Finding> {
    let mut findings = Vec::new();
    let before = machine_now().as_millis();
    match link.api(&format!("STREAM.INFO.{}", link.wire.log_stream()), &Value::Null).await {
        Ok(info) => {
            let middle = before.midpoint(machine_now().as_millis());
            if let Some(server) = info["ts"].as_str().and_then(|text| text.parse::<Timestamp>().ok()) {
                let behind = server.as_millis() - middle;
                let apart = Duration::from_millis(behind.unsigned_abs());
                let grade = if apart < SKEW_MIN { Grade::Good } else { Grade::Odd };
                let side = if behind > 0 { "behind" } else { "ahead of" };
                findings.push(Finding::new("clock", grade, format!("this machine is {:.3} s {side} the server", apart.as_secs_f64())));
            }
        }
        Err(fault) => findings.push(Finding::new("clock", Grade::Odd, format!("not known while there is no log: {fault}"))),
    }
    if let Ok(account) = link.api("INFO", &Value::Null).await {
        let used = account["storage"].as_u64().unwrap_or(0) >> 20;
        let limit = account["limits"]["max_storage"].as_i64().unwrap_or(-1);
        let limit = if limit < 0 { "no limit".to_owned() } else { format!("a limit of {} MiB", limit >> 20) };
        findings.push(Finding::new("account", Grade::Good, format!("{used} MiB stored, {limit}; {} streams", account["streams"])));
    }
    findings
}

async fn streams(link: &Link, member: &Member) -> Vec<Finding> {
    let wire = &link.wire;
    let hook = wire.hook_stream(&member.station);
    let mut names = vec![(wire.log_stream(), "log".to_owned()), (hook, format!("hook of {}", member.station))];
    names.extend(
        Bucket::ALL
            .into_iter()
            .filter(|bucket| *bucket != Bucket::Sessions)
            .map(|bucket| (wire.bucket_stream(bucket), bucket.name().to_owned())),
    );
    names.push((format!("OBJ_{}", wire.blob_store()), "blobs".to_owned()));
    let needed = wire.leaf_streams(&member.station);
    let mut findings = Vec::new();
    for (name, what) in names {
        let finding = match link.api(&format!("STREAM.INFO.{name}"), &Value::Null).await {
            Ok(info) => {
                let (config, state) = (&info["config"], &info["state"]);
                let replicas = config["num_replicas"].as_u64().unwrap_or(1);
                let text = format!(
                    "{name}: {} messages, {} KiB, {replicas} replica(s)",
                    state["messages"],
                    state["bytes"].as_u64().unwrap_or(0) >> 10
                );
                if replicas < u64::from(link.settings.replicas) {
                    let wanted = link.settings.replicas;
                    Finding::new(what, Grade::Odd, format!("{text}, and lattice.nats.replicas is {wanted}: change it with the nats tool"))
                } else {
                    Finding::new(what, Grade::Good, text)
                }
            }
            Err(Fault::Api(error)) if error.code == 404 => {
                Finding::new(what, Grade::Good, format!("{name}: not there yet; made at its first use"))
            }
            // A station that only runs agents has no use for it.
            Err(Fault::Denied(_)) if !needed.contains(&name) => {
                let text = format!("{name}: not for these credentials: this station runs agents, and assigns nothing to others");
                Finding::new(what, Grade::Odd, text)
            }
            Err(fault) => Finding::new(what, Grade::Bad, format!("{name}: {fault}")),
        };
        findings.push(finding);
    }
    findings
}
