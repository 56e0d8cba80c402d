//! The processes of a lattice on a server: leaves and desks, each with folders of its own, and one file to which agents write.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::signal;
use crate::lifecycle::eventually;
use crate::rpc::{self, Client};

/// What processes of one lattice share: where the server is, and what their agents are.
pub(super) struct Fleet {
    dir: TempDir,
    url: String,
    agents: Vec<Spec>,
    variables: Vec<(String, String)>,
    /// What leads processes of some names to where they live, and where they find the server.
    elsewhere: BTreeMap<String, (Vec<String>, String)>,
}

/// An agent that the leaves of a station have.
struct Spec {
    station: String,
    name: String,
    /// More of its file's head, such as `limits: { max_parallel: 1 }`.
    front: String,
    interactive: bool,
    script: String,
}

/// A line that an agent wrote.
#[derive(Debug, Clone)]
pub(super) struct Ran {
    pub(super) work_id: String,
    pub(super) attempt: u64,
    pub(super) begins: bool,
    /// The leaf, by the name of its folder.
    pub(super) leaf: String,
    pub(super) at_ms: u64,
}

impl Fleet {
    pub(super) fn new(url: &str) -> Self {
        Self { dir: TempDir::new().unwrap(), url: url.to_owned(), agents: Vec::new(), variables: Vec::new(), elsewhere: BTreeMap::new() }
    }

    /// A setting of every process that is started from now on.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// An agent of a station. It says when it begins and, after its script, when it ends; the script may say `wait_for NAME`, a file
    /// that the test makes with `open`.
    pub(super) fn agent(&mut self, station: &str, name: &str, script: &str) {
        self.agent_with(station, name, "", false, script);
    }

    /// An agent whose standard input stays open for answers, or with more in its file's head.
    pub(super) fn agent_with(&mut self, station: &str, name: &str, front: &str, interactive: bool, script: &str) {
        let ran = self.dir.path().join("ran");
        let (ran, dir) = (ran.display(), self.dir.path().display());
        let script = format!(
            "#!/bin/sh\n\
             note() {{ echo \"$LATTICE_WORK_ID $LATTICE_ATTEMPT $$ $1 ${{PWD##*/}} $(date +%s%3N)\" >> {ran}; }}\n\
             wait_for() {{ until [ -e {dir}/gate-$1 ] || [ ! -d {dir} ]; do sleep 0.05; done; }}\n\
             note begin\n{script}\nnote end\n"
        );
        let (station, name, front) = (station.to_owned(), name.to_owned(), front.to_owned());
        self.agents.push(Spec { station, name, front, interactive, script });
    }

    /// Lets those agents go on that wait for this.
    pub(super) fn open(&self, gate: &str) {
        File::create(self.dir.path().join(format!("gate-{gate}"))).unwrap();
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Where the processes look for the server from now on.
    pub(super) fn at(&mut self, url: &str) {
        url.clone_into(&mut self.url);
    }

    /// A process of this name is started by `way`, if that says anything, and finds the server at `url`.
    pub(super) fn elsewhere(&mut self, name: &str, way: &[String], url: &str) {
        self.elsewhere.insert(name.to_owned(), (way.to_vec(), url.to_owned()));
    }

    /// What agents have written so far.
    pub(super) fn ran(&self) -> Vec<Ran> {
        let text = std::fs::read_to_string(self.dir.path().join("ran")).unwrap_or_default();
        let line = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            let [work_id, attempt, _, what, leaf, at_ms] = words[..] else { panic!("not a line of an agent: {line}") };
            Ran {
                work_id: work_id.to_owned(),
                attempt: attempt.parse().unwrap(),
                begins: what == "begin",
                leaf: leaf.to_owned(),
                at_ms: at_ms.parse().unwrap(),
            }
        };
        text.lines().map(line).collect()
    }

    /// The beginnings of a work.
    pub(super) fn begun(&self, work_id: &str) -> Vec<Ran> {
        self.ran().into_iter().filter(|ran| ran.begins && ran.work_id == work_id).collect()
    }

    /// Waits until a work has begun this often.
    pub(super) async fn until_begun(&self, work_id: &str, times: usize) -> Vec<Ran> {
        eventually(&format!("{work_id} begins {times} times"), async || Some(self.begun(work_id)).filter(|begun| begun.len() >= times))
            .await
    }

    /// Waits until a work's agent has noted this.
    pub(super) async fn until_noted(&self, work_id: &str, what: &str) {
        let ran = self.dir.path().join("ran");
        eventually(&format!("{work_id} notes {what}"), async || {
            let text = std::fs::read_to_string(&ran).unwrap_or_default();
            text.lines().any(|line| line.starts_with(work_id) && line.contains(&format!(" {what} "))).then_some(())
        })
        .await;
    }

    fn folder(&self, name: &str) -> PathBuf {
        let folder = self.dir.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    /// The binary as a process of this name, with a data folder of its own; its log goes to a file.
    pub(super) fn command(&self, name: &str, station: &str) -> tokio::process::Command {
        let agents = self.folder(&format!("agents/{name}"));
        for spec in self.agents.iter().filter(|spec| spec.station == station) {
            spec.write(&agents);
        }
        let nowhere = (Vec::new(), self.url.clone());
        let (way, url) = self.elsewhere.get(name).unwrap_or(&nowhere);
        let mut command = rpc::binary(&self.folder(&format!("data/{name}")), &agents);
        command.args(["--nats", url, "--station", station, "--log", "info,lattice_mcp::leaf::lapsed=debug"]);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        if let Some((program, first)) = way.split_first() {
            command = led(program, first, &command);
        }
        let log = File::options().create(true).append(true).open(self.folder("logs").join(name)).unwrap();
        command.stdin(Stdio::null()).stderr(log).kill_on_drop(true);
        command
    }

    /// Starts a leaf; one of the same name before it has left its folders.
    pub(super) fn leaf(&self, name: &str, station: &str) -> Leaf {
        let command = self.command(name, station).into_std();
        Leaf::start(command, name)
    }

    /// Starts a station of its own, driven over standard input and output.
    pub(super) async fn desk(&self, name: &str) -> Client {
        Client::start(self.command(name, name)).await
    }

    /// Runs a command to its end, and gives what it says in JSON: one value, or one on each line.
    pub(super) async fn say(&self, name: &str, arguments: &[&str]) -> Vec<Value> {
        let mut command = self.command(name, name);
        let output = command.args(arguments).arg("--json").output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}\n{}", self.log(name));
        let values = serde_json::Deserializer::from_str(&said).into_iter();
        values.map(|value| value.unwrap_or_else(|error| panic!("{arguments:?}: {error}: {said}"))).collect()
    }

    /// What a process of this name has logged.
    pub(super) fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join("logs").join(name)).unwrap_or_default()
    }

    /// No process of this lattice may ever panic.
    pub(super) fn assert_calm(&self) {
        for file in std::fs::read_dir(self.dir.path().join("logs")).unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            let log = self.log(&name);
            assert!(!log.contains("panicked at"), "{name}:\n{log}");
        }
    }

    /// Keeps the logs of a lattice whose test failed.
    #[expect(clippy::print_stderr, reason = "belongs to a failure")]
    fn tell(&self) {
        for file in std::fs::read_dir(self.dir.path().join("logs")).into_iter().flatten().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            let log = self.log(&name);
            let lines: Vec<&str> = log.lines().filter(|line| !line.contains(" INFO ")).collect();
            eprintln!("--- {name}, the last of {} lines\n{}", lines.len(), lines[lines.len().saturating_sub(12)..].join("\n"));
        }
    }
}

/// A command behind a program that ends by running it.
fn led(program: &str, first: &[String], command: &tokio::process::Command) -> tokio::process::Command {
    let command = command.as_std();
    let mut led = tokio::process::Command::new(program);
    led.args(first).arg(command.get_program()).args(command.get_args());
    led.current_dir(command.get_current_dir().unwrap());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => led.env(name, value),
            None => led.env_remove(name),
        };
    }
    led
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell();
        }
    }
}

impl Spec {
    fn write(&self, folder: &Path) {
        let Self { name, front, interactive, script, .. } = self;
        if folder.join(format!("{name}.md")).exists() {
            return;
        }
        std::fs::write(folder.join(format!("{name}.sh")), script).unwrap();
        let runner = format!("{{ kind: command, command: [sh, {name}.sh], interactive: {interactive} }}");
        let file = format!("---\nname: {name}\ndescription: test agent {name}\nrunner: {runner}\n{front}\n---\n");
        std::fs::write(folder.join(format!("{name}.md")), file).unwrap();
    }
}

/// A leaf process; it is killed with this value.
pub(super) struct Leaf {
    child: Child,
    pub(super) name: String,
}

impl Leaf {
    /// Starts a command, which is the binary or leads to it, as a leaf.
    pub(super) fn start(mut command: Command, name: &str) -> Self {
        let child = command.arg("leaf").stdout(Stdio::null()).spawn().unwrap();
        Self { child, name: name.to_owned() }
    }

    pub(super) fn signal(&self, name: rustix::process::Signal) {
        signal(self.child.id(), name);
    }

    /// Kills it without a word; its folders stay.
    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Kills an orchestrator without a word.
pub(super) async fn kill(mut desk: Client) {
    desk.child.start_kill().unwrap();
    desk.child.wait().await.unwrap();
}

/// Waits until these agents run somewhere, as this orchestrator sees it.
pub(super) async fn until_online(desk: &Client, agents: &[&str]) {
    eventually(&format!("{agents:?} are online"), async || {
        let list = desk.call("list_available_agents", json!({})).await;
        let list = list["agents"].as_array().unwrap();
        let online = |name: &&str| list.iter().any(|agent| agent["name"] == **name && agent["status"] == "online");
        agents.iter().all(online).then_some(())
    })
    .await;
}

/// Works, as this process sees them, by id.
pub(super) async fn looked_up(desk: &Client, ids: &[String]) -> BTreeMap<String, Value> {
    let mut works = BTreeMap::new();
    for some in ids.chunks(200) {
        let answer = desk.call("check_work", json!({"work_ids": some})).await;
        let several = answer["works"].as_array().cloned().unwrap_or_else(|| vec![answer.clone()]);
        works.extend(several.into_iter().map(|work| (work["work_id"].as_str().unwrap().to_owned(), work)));
    }
    works
}

/// One work, as this process sees it.
pub(super) async fn look(desk: &Client, id: &str) -> Value {
    looked_up(desk, &[id.to_owned()]).await.remove(id).unwrap()
}
