//! Stations that others let in: what they need to join, what they may do, and what the server keeps them from.

use std::time::Duration;

use async_nats::jetstream::{self, consumer};
use async_nats::{Client as Nats, ConnectOptions, HeaderMap, ServerAddr};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::lifecycle::{Place, eventually};
use crate::nats_server::{NATS_SERVER, free_port};
use crate::rpc::{Client, agent, binary};

/// A lattice with a server of its own, which station `alice` runs.
struct Lattice {
    place: Place,
    variables: Vec<(String, String)>,
}

impl Lattice {
    fn new() -> Self {
        let variables = [
            ("LATTICE_NATS_URL", "embedded".to_owned()),
            ("LATTICE_NATS_SERVER", NATS_SERVER.to_owned()),
            ("LATTICE_EMBEDDED_NATS_PORT", free_port().to_string()),
            ("LATTICE_STATION", "alice".to_owned()),
            ("LATTICE_PRESENCE_HEARTBEAT", "500ms".to_owned()),
            ("LATTICE_PRESENCE_TTL", "3s".to_owned()),
        ];
        Self { place: Place::new(), variables: variables.map(|(name, value)| (name.to_owned(), value)).to_vec() }
    }

    fn command(&self) -> Command {
        let mut command = binary(self.place.data.path(), self.place.agents.path());
        command.envs(self.variables.iter().cloned());
        command
    }

    async fn alice(&self) -> Client {
        let alice = Client::start(self.command()).await;
        eventually("alice is there", async || {
            let known = alice.call("list_available_agents", json!({})).await;
            (known["agents"][0]["status"] == "online").then_some(())
        })
        .await;
        alice
    }

    /// What a command prints, as JSON.
    async fn ask(&self, arguments: &[&str]) -> Result<Value, String> {
        let output = self.command().args(arguments).arg("--json").output().await.unwrap();
        match output.status.success() {
            true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
            false => Err(String::from_utf8(output.stderr).unwrap()),
        }
    }
}

impl Drop for Lattice {
    /// A test that fails kills its stations without a word, which leaves the server to the next of them.
    fn drop(&mut self) {
        let state = std::fs::read(self.place.data.path().join("default/nats/state.json")).unwrap_or_default();
        let state: Value = serde_json::from_slice(&state).unwrap_or_default();
        if let Some(pid) = state["pid"].as_i64().and_then(|pid| rustix::process::Pid::from_raw(i32::try_from(pid).ok()?)) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// Runs what was to be pasted on the other machine, with an own data folder.
fn paste(line: &str, data: &TempDir, agents: &TempDir) -> Child {
    let mut shell = Command::new("sh");
    let line = line.replacen("lattice-mcp", env!("CARGO_BIN_EXE_lattice-mcp"), 1);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("LATTICE_")) {
        shell.env_remove(name);
    }
    let (assignments, command) = match line.split_once("' ") {
        Some((assignments, command)) => (format!("{assignments}' "), command.to_owned()),
        None => (String::new(), line),
    };
    shell.arg("-c").arg(format!("{assignments}exec {command} --data-dir \"$0\" --agents \"$1\"")).arg(data.path()).arg(agents.path());
    shell.current_dir(data.path()).kill_on_drop(true).spawn().unwrap()
}

async fn until_online(client: &Client, name: &str) {
    eventually(name, async || {
        let known = client.call("list_available_agents", json!({})).await;
        known["agents"].as_array().unwrap().iter().any(|agent| agent["name"] == name && agent["status"] == "online").then_some(())
    })
    .await;
}

async fn connect_as(added: &Value) -> Nats {
    let url = format!("nats://{}:{}", added["host"].as_str().unwrap(), added["port"]);
    let (user, password) = (added["station"].as_str().unwrap(), added["password"].as_str().unwrap());
    let options = ConnectOptions::with_user_and_password(user.to_owned(), password.to_owned());
    let options = options.custom_inbox_prefix(format!("_INBOX.lattice.default.{user}")).request_timeout(Some(Duration::from_secs(2)));
    options.connect(url.parse::<ServerAddr>().unwrap()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_line_lets_another_station_in_and_another_one_out_again() {
    let lattice = Lattice::new();
    let before = lattice.ask(&["station", "add", "early"]).await.unwrap();
    assert_eq!((before["station"].as_str(), before["full"].as_bool()), (Some("early"), Some(false)), "also while no server runs");
    let alice = lattice.alice().await;
    let added = lattice.ask(&["station", "add", "bob"]).await.unwrap();
    let line = added["command"].as_str().unwrap();
    assert!(
        line.starts_with("LATTICE_NATS_URL='nats://bob:") && line.ends_with("lattice-mcp leaf --lattice default --station bob"),
        "{line}"
    );
    let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    agent(agents.path(), "far", "", "echo from $LATTICE_TASK");
    agent(agents.path(), "large", "", "yes 0123456789abcdef | head -c 3000000");
    let mut bob = paste(line, &data, &agents);
    until_online(&alice, "far").await;
    until_online(&alice, "large").await;
    let id = alice.assign("far", "bob").await;
    assert_eq!(alice.settled(&id).await["result"], "from bob\n".trim_end());
    let id = alice.assign("large", "x").await;
    let large = alice.settled(&id).await;
    assert_eq!((large["status"].as_str(), large["result_ref"]["size"].as_u64()), (Some("COMPLETE"), Some(3_000_000)), "{large}");
    let part = alice.call("check_work", json!({"work_id": id, "bytes": "2999990-2999997"})).await;
    assert_eq!(part["selection"]["text"], "01234567", "{part}");

    let again = lattice.ask(&["station", "add", "bob"]).await.unwrap_err();
    assert!(again.contains("station bob was added before") && again.contains("--replace"), "{again}");
    assert_eq!(lattice.ask(&["station", "list"]).await.unwrap(), json!(["bob", "early"]));
    let file = data.path().join("join.yaml");
    let written = lattice.ask(&["station", "add", "bob", "--replace", "--write", file.to_str().unwrap()]).await.unwrap();
    assert_eq!(written["password"], Value::Null);
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    bob.kill().await.unwrap();
    std::fs::remove_file(agents.path().join("large.md")).unwrap();
    agent(agents.path(), "newer", "", "echo newer");
    let _bob = paste(written["command"].as_str().unwrap(), &data, &agents);
    until_online(&alice, "newer").await;

    assert_eq!(lattice.ask(&["station", "remove", "bob"]).await.unwrap(), json!({"removed": "bob"}));
    eventually("bob is shut out", async || {
        let known = alice.call("list_available_agents", json!({})).await;
        known["agents"].as_array().unwrap().iter().all(|agent| agent["name"] != "newer" || agent["status"] == "offline").then_some(())
    })
    .await;
    let gone = lattice.ask(&["station", "remove", "bob"]).await.unwrap_err();
    assert!(gone.contains("never added"), "{gone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_says_what_is_there_and_what_is_not() {
    let lattice = Lattice::new();
    let grade_of = |findings: &Value, what: &str| -> (String, String) {
        let found = findings.as_array().unwrap().iter().find(|finding| finding["what"] == what);
        let found = found.unwrap_or_else(|| panic!("no {what}: {findings}"));
        (found["grade"].as_str().unwrap().to_owned(), found["text"].as_str().unwrap().to_owned())
    };
    let before = lattice.ask(&["doctor"]).await.unwrap();
    assert_eq!(grade_of(&before, "server's program").0, "ok");
    let (grade, text) = grade_of(&before, "server");
    assert!(grade == "note" && text.contains("does not run at the moment"), "{before}");
    let _alice = lattice.alice().await;
    let added = lattice.ask(&["station", "add", "bob"]).await.unwrap();
    let after = lattice.ask(&["doctor"]).await.unwrap();
    for what in ["configuration", "data folder", "agents", "server", "round trip", "clock", "account", "log", "hook of alice", "blobs"] {
        assert_eq!(grade_of(&after, what).0, "ok", "{what}: {after}");
    }
    let (grade, text) = grade_of(&after, "acknowledgements");
    assert!(grade == "note" && text.contains("durability: power"), "{after}");
    // As bob would see it from his machine.
    let url = format!("nats://bob:{}@{}:{}", added["password"].as_str().unwrap(), added["host"].as_str().unwrap(), added["port"]);
    let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut bob = binary(data.path(), agents.path());
    let bob = bob.args(["doctor", "--json", "--station", "bob", "--nats", &url]).output().await.unwrap();
    let said = String::from_utf8(bob.stdout).unwrap();
    assert!(bob.status.success() && !said.contains(added["password"].as_str().unwrap()), "{said}");
    let found: Value = serde_json::from_str(&said).unwrap();
    let (grade, text) = grade_of(&found, "keys");
    assert!(grade == "note" && text.contains("not for these credentials"), "{found}");
    // And somebody who is nobody.
    let mut stranger = binary(data.path(), agents.path());
    let stranger = stranger.args(["doctor", "--json", "--nats", &url.replace("nats://bob:", "nats://bob:x")]).output().await.unwrap();
    assert_eq!(stranger.status.code(), Some(1));
    let (grade, text) = grade_of(&serde_json::from_slice(&stranger.stdout).unwrap(), "server");
    assert!(grade == "bad" && text.contains("refuses these credentials"), "{text}");
    // A broken agent file is bad as well.
    std::fs::write(agents.path().join("broken.md"), "---\nname: [\n---\n").unwrap();
    let mut broken = binary(data.path(), agents.path());
    let broken = broken.arg("doctor").output().await.unwrap();
    assert_eq!(broken.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&broken.stdout).contains("broken.md"));
}

#[tokio::test(flavor = "multi_thread")]
async fn adding_a_station_says_what_is_wrong() {
    let lattice = Lattice::new();
    let bad = lattice.ask(&["station", "add", "a.b"]).await.unwrap_err();
    assert!(bad.contains("a.b"), "{bad}");
    let bad = lattice.ask(&["station", "add", "bob", "--host", "a';rm"]).await.unwrap_err();
    assert!(bad.contains("is no name or address"), "{bad}");
    let bad = lattice.ask(&["station", "add", "bob", "--nats", "nats://127.0.0.1:1"]).await.unwrap_err();
    assert!(bad.contains("is not ours but nats://127.0.0.1:1") && bad.contains("\"publish\""), "{bad}");
    let mut alone = binary(lattice.place.data.path(), lattice.place.agents.path());
    let alone = alone.args(["station", "add", "bob"]).output().await.unwrap();
    assert!(String::from_utf8_lossy(&alone.stderr).contains("set lattice.nats.url to embedded"), "{alone:?}");
    let mut no_program = lattice.command();
    let no_program = no_program.args(["station", "add", "bob"]).env("LATTICE_NATS_SERVER", "/nowhere/nats-server").output().await.unwrap();
    assert!(String::from_utf8_lossy(&no_program.stderr).contains("no nats-server was found at /nowhere/nats-server"), "{no_program:?}");
    assert_eq!(lattice.ask(&["station", "list"]).await.unwrap(), json!([]), "what failed leaves nobody with a key");
}

/// The events that a work has settled with, as its history has them.
fn is_alices(work: &Value) {
    assert_eq!((work["status"].as_str(), work["result"].as_str()), (Some("COMPLETE"), Some("the real one")), "{work}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_station_cannot_answer_for_the_work_of_another() {
    let lattice = Lattice::new();
    lattice.place.agent("gated", "", "touch started; while [ ! -e gate ]; do sleep 0.05; done; printf 'the real one'");
    let alice = lattice.alice().await;
    until_online(&alice, "gated").await;
    let added = lattice.ask(&["station", "add", "bob"]).await.unwrap();
    let full = lattice.ask(&["station", "add", "chief", "--full"]).await.unwrap();
    let id = alice.assign("gated", "x").await;
    eventually("it runs", async || lattice.place.agents.path().join("started").exists().then_some(())).await;
    let (bob, chief) = (connect_as(&added).await, connect_as(&full).await);
    let log = jetstream::new(chief.clone()).get_stream("lattice_default_log").await.unwrap();
    // What alice would say, had she finished with this.
    let mut stored = None;
    for seq in 1..=log.cached_info().state.last_sequence {
        let message = log.get_raw_message(seq).await.unwrap();
        if message.subject.as_str().contains(".response.alice") {
            stored = serde_json::from_slice::<Value>(&message.payload).ok();
        }
    }
    let mut forged = stored.expect("alice has said that she took it");
    forged["type"] = "WORK_COMPLETE".into();
    forged["event"] = "WORK_COMPLETE".into();
    forged["result"] = json!("a forged one");
    forged["output"] = json!("a forged one");
    let body = bytes::Bytes::from(forged.to_string());
    let response = |by: &str| format!("lattice.default.work.{id}.response.{by}");
    let places = [
        response("alice"),
        format!("lattice.default.work.{id}.response"),
        format!("lattice.default.work.{id}.status"),
        "lattice.default.station.alice.work.assign".to_owned(),
        "lattice.default.station.alice.work.hook".to_owned(),
        "lattice.default.station.bob.work.assign".to_owned(),
        "lattice.default.events.station.left.alice".to_owned(),
        format!("lattice.default.told.work.{id}.response.alice"),
        "$KV.lattice_default_agents.gated.alice".to_owned(),
        "$KV.lattice_default_stations.alice.x".to_owned(),
        "$O.lattice_default_blobs.C.alice.0123".to_owned(),
        "_INBOX.lattice.default.alice.x".to_owned(),
    ];
    let count = async || {
        let mut total = 0;
        for name in ["log", "hook=alice"] {
            let mut stream = jetstream::new(chief.clone()).get_stream(format!("lattice_default_{name}")).await.unwrap();
            total += stream.info().await.unwrap().state.messages;
        }
        total
    };
    let before = count().await;
    // Straight.
    for place in &places {
        bob.publish(place.clone(), body.clone()).await.unwrap();
    }
    // In its own name, which the server allows.
    let own = bob.request(response("bob"), body.clone()).await.unwrap();
    let own: Value = serde_json::from_slice(&own.payload).unwrap();
    let seq = own["seq"].as_u64().expect("its own response is stored");
    // With alice's subject as the place where the server is to answer: with the message itself, and with less.
    for (verb, what) in [("DIRECT.GET", json!({"seq": seq})), ("STREAM.MSG.GET", json!({"seq": seq})), ("STREAM.INFO", Value::Null)] {
        for place in &places {
            bob.publish_with_reply(format!("$JS.API.{verb}.lattice_default_log"), place.clone(), what.to_string().into()).await.unwrap();
        }
    }
    for place in &places {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", uuid::Uuid::new_v4().to_string().as_str());
        bob.publish_with_reply_and_headers(response("bob"), place.clone(), headers, body.clone()).await.unwrap();
    }
    // With the word that what stood there before is to go: what is stored with it could be had said anywhere.
    for place in ["lattice.default.station.bob.work.hook", "$KV.lattice_default_agents.x.bob", &response("bob")] {
        for whole in ["sub", "all"] {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Rollup", whole);
            let answer = bob.request_with_headers(place.to_owned(), headers, body.clone()).await.unwrap();
            let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
            assert!(answer["error"]["description"].as_str().unwrap().contains("rollup"), "{place}: {answer}");
        }
    }
    // By a consumer that delivers there, and by changing streams.
    let own_jetstream = jetstream::new(bob.clone());
    let push = consumer::push::Config { deliver_subject: response("alice"), filter_subject: response("bob"), ..Default::default() };
    let asked = json!({"stream_name": "lattice_default_log", "config": push});
    for verb in ["CONSUMER.CREATE.lattice_default_log", "STREAM.PURGE.lattice_default_log", "STREAM.DELETE.lattice_default_hook=alice"] {
        assert!(bob.request(format!("$JS.API.{verb}"), asked.to_string().into()).await.is_err(), "{verb}");
    }
    let config = jetstream::stream::Config { name: "mine".into(), subjects: vec!["mine.>".into()], ..Default::default() };
    assert!(own_jetstream.create_stream(config).await.is_err());
    // And it hears nothing that is not its own.
    for subject in [">", "lattice.default.>", "_INBOX.>", "lattice.default.told.station.alice.work.*", "$KV.lattice_default_keys.>"] {
        let mut heard = bob.subscribe(subject).await.unwrap();
        bob.flush().await.unwrap();
        alice.call("list_available_agents", json!({})).await;
        let other = alice.assign("upper", "quiet").await;
        alice.settled(&other).await;
        let message = tokio::time::timeout(Duration::from_millis(100), heard.next()).await;
        assert!(!matches!(message, Ok(Some(_))), "{subject}: {message:?}");
    }
    bob.flush().await.unwrap();

    let work = alice.call("check_work", json!({"work_id": id})).await;
    assert!(!work.to_string().contains("COMPLETE") && !work.to_string().contains("forged"), "{work}");
    std::fs::write(lattice.place.agents.path().join("gate"), "").unwrap();
    is_alices(&alice.settled(&id).await);
    let mut another = lattice.command();
    let another = Client::start({
        another.env("LATTICE_STATION", "carol");
        another
    })
    .await;
    until_online(&another, "gated").await;
    is_alices(&another.settled(&id).await);
    assert!(count().await > before);
    let history = lattice.ask(&["work", &id]).await.unwrap().to_string();
    assert!(!history.contains("a forged one"), "{history}");
    // What bob said on all these places has harmed nobody: alice still holds her agents, and takes work.
    let last = another.assign("upper", "still here").await;
    assert_eq!(another.settled(&last).await["result"], "STILL HERE");
}
