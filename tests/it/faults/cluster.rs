//! A cluster of three servers that loses one of them, whichever.

use std::time::{Duration, Instant};

use async_nats::jetstream;
use serde_json::json;
use tempfile::TempDir;

use super::fleet::{Fleet, look, looked_up, until_online};
use super::witness::{Ledger, examine, servers, until_settled};
use crate::lifecycle::eventually;
use crate::nats_server::{NatsServer, free_port};
use crate::rpc::Client;

/// Three servers on this machine, each of which keeps everything.
struct Cluster(Vec<NatsServer>);

impl Cluster {
    async fn start() -> Self {
        let ports: Vec<(u16, u16)> = (0..3).map(|_| (free_port(), free_port())).collect();
        let routes: Vec<String> = ports.iter().map(|(_, route)| format!("nats://127.0.0.1:{route}")).collect();
        let servers = ports.iter().enumerate().map(|(n, (port, route))| {
            let dir = TempDir::new().unwrap();
            let config = format!(
                "server_name: n{n}\nlisten: \"127.0.0.1:{port}\"\njetstream {{ store_dir: {:?} }}\n\
                 cluster {{ name: c, listen: \"127.0.0.1:{route}\", routes: [{}] }}\n",
                dir.path().join("store"),
                routes.join(", ")
            );
            NatsServer::with_config(dir, &config, *port)
        });
        let cluster = Self(servers.collect());
        eventually("the cluster has a leader", async || cluster.leader("").await).await;
        cluster
    }

    fn url(&self) -> String {
        self.0.iter().map(NatsServer::url).collect::<Vec<_>>().join(",")
    }

    /// The server that leads a stream; without a name, any one that leads the cluster by what it answers.
    async fn leader(&self, stream: &str) -> Option<usize> {
        let client = async_nats::connect(servers(&self.url()).ok()?).await.ok()?;
        let context = jetstream::new(client);
        if stream.is_empty() {
            return context.query_account().await.ok().map(|_| 0);
        }
        let name = context.get_stream(stream).await.ok()?.get_info().await.ok()?.cluster?.leader?;
        name.strip_prefix('n')?.parse().ok()
    }
}

/// Assigns works one after the other until told to stop; a refusal is no promise, and is tried as another work.
async fn load(ledger: &mut Ledger, desk: &Client, name: &str, least: usize, span: Duration) {
    let until = Instant::now() + span;
    let patience = Instant::now() + Duration::from_secs(60);
    let (mut done, mut n) = (0, 0);
    while done < least || Instant::now() < until {
        assert!(Instant::now() < patience, "{done} of {least} orders were taken in a minute");
        let tasks: Vec<String> = (0..4).map(|at| format!("{name}-{n}-{at}")).collect();
        tasks.iter().for_each(|task| ledger.ask(task));
        let orders = tasks.iter().map(|task| desk.try_call("assign_work", json!({"agent_name": "worker", "task": task})));
        for (task, answer) in tasks.iter().zip(futures_util::future::join_all(orders).await) {
            if let Ok(answer) = answer.expect("the orchestrator lives") {
                ledger.acknowledge(task, &answer);
                done += 1;
            }
        }
        n += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_loses_any_one_of_its_servers_loses_and_doubles_nothing() {
    let mut cluster = Cluster::start().await;
    let mut fleet = Fleet::new(&cluster.url());
    fleet.set("LATTICE_NATS_REPLICAS", "3");
    fleet.set("LATTICE_RETRY_MAX_ATTEMPTS", "50");
    fleet.set("LATTICE_WORK_QUEUE_SIZE", "1000");
    fleet.agent("fleet", "worker", "sleep 0.1\nprintf %s \"$LATTICE_TASK\"");
    let _leaves = [fleet.leaf("north", "fleet"), fleet.leaf("south", "fleet")];
    let desk = fleet.desk("desk").await;
    until_online(&desk, &["worker"]).await;
    let mut ledger = Ledger::default();
    load(&mut ledger, &desk, "before", 8, Duration::ZERO).await;
    for stream in ["", "lattice_default_log", "lattice_default_hook=fleet"] {
        let victim = match stream {
            "" => 2,
            stream => eventually("the stream has a leader", async || cluster.leader(stream).await).await,
        };
        let begun = Instant::now();
        let (servers, name) = (&mut cluster.0, format!("while {stream}"));
        let ((), ()) = tokio::join!(load(&mut ledger, &desk, &name, 16, Duration::from_millis(1500)), async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            servers[victim].kill();
        });
        eprintln!("cluster: 16 more works were taken within {:?} of the loss of server {victim} ({stream})", begun.elapsed());
        cluster.0[victim].revive();
        load(&mut ledger, &desk, &format!("after {stream}"), 8, Duration::ZERO).await;
    }
    let ids = ledger.ids();
    until_settled(&desk, &ids).await;
    for (id, work) in looked_up(&desk, &ids).await {
        assert_eq!((&work["status"], &work["result"]), (&json!("COMPLETE"), &json!(ledger.orders[&id].task)), "{work}");
    }
    let found = examine(&fleet, &ledger).await;
    eprintln!("cluster: {} works acknowledged, {} lost, {} settled twice", ids.len(), found.lost.len(), found.doubly.len());
    found.assert_none();
    assert_eq!(look(&desk, &ids[0]).await["status"], "COMPLETE");
    fleet.assert_calm();
}
