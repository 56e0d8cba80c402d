//! A small MCP client over standard input and output, for tests that want many servers, or rude ones.

use std::collections::HashMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};

const PATIENCE: Duration = Duration::from_secs(60);

/// A server process and the connection to it.
pub(crate) struct Client {
    pub(crate) child: Child,
    stdin: AsyncMutex<Option<ChildStdin>>,
    waiting: Arc<Mutex<HashMap<u64, oneshot::Sender<Value>>>>,
    pub(crate) notifications: AsyncMutex<mpsc::UnboundedReceiver<Value>>,
    next: AtomicU64,
}

/// The command that starts our binary on these folders.
pub(crate) fn binary(data: &Path, agents: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lattice-mcp"));
    command.arg("--data-dir").arg(data).arg("--agents").arg(agents).current_dir(agents).kill_on_drop(true);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("LATTICE_")) {
        command.env_remove(name);
    }
    command
}

impl Client {
    /// Starts a server with `--stdio` and says hello in the older protocol.
    pub(crate) async fn start(mut command: Command) -> Self {
        command.arg("--stdio").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let stdout = child.stdout.take().unwrap();
        let waiting: Arc<Mutex<HashMap<u64, oneshot::Sender<Value>>>> = Arc::default();
        let (notify, notifications) = mpsc::unbounded_channel();
        let answered = waiting.clone();
        #[expect(clippy::disallowed_methods, reason = "a test has no tracker")]
        tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let message: Value =
                    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: not JSON on standard output: {line}"));
                match message["id"].as_u64().filter(|_| message.get("method").is_none()).and_then(|id| answered.lock().unwrap().remove(&id))
                {
                    Some(reply) => drop(reply.send(message)),
                    None => drop(notify.send(message)),
                }
            }
            answered.lock().unwrap().clear();
        });
        let stdin = AsyncMutex::new(child.stdin.take());
        let client = Self { child, stdin, waiting, notifications: AsyncMutex::new(notifications), next: AtomicU64::new(1) };
        let hello = json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}});
        let welcome = client.request("initialize", hello).await.expect("initialize is answered");
        assert!(welcome["result"]["capabilities"].is_object(), "{welcome}");
        client.send(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"}).to_string()).await;
        client
    }

    /// Writes one raw line.
    pub(crate) async fn send(&self, line: &str) {
        self.send_bytes(line.as_bytes()).await;
    }

    /// Writes one raw line of any bytes. A server that is gone is not an error here.
    pub(crate) async fn send_bytes(&self, line: &[u8]) {
        if let Some(stdin) = self.stdin.lock().await.as_mut() {
            let _ = stdin.write_all(line).await;
            let _ = stdin.write_all(b"\n").await;
            let _ = stdin.flush().await;
        }
    }

    /// Closes the server's standard input.
    pub(crate) async fn hang_up(&self) {
        self.stdin.lock().await.take();
    }

    /// A request's whole answer; none when the server went away.
    pub(crate) async fn request(&self, method: &str, params: Value) -> Option<Value> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        self.waiting.lock().unwrap().insert(id, reply);
        self.send(&json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).to_string()).await;
        tokio::time::timeout(PATIENCE, answer).await.unwrap_or_else(|_| panic!("{method} was not answered")).ok()
    }

    /// A tool's structured answer; a tool error is `Err` with its text.
    pub(crate) async fn try_call(&self, tool: &str, arguments: Value) -> Option<Result<Value, String>> {
        let answer = self.request("tools/call", json!({"name": tool, "arguments": arguments})).await?;
        let result = &answer["result"];
        let text = || result["content"][0]["text"].as_str().map_or_else(|| answer.to_string(), str::to_owned);
        Some(if result["isError"] == json!(true) || answer.get("error").is_some() {
            Err(text())
        } else {
            Ok(result["structuredContent"].clone())
        })
    }

    /// A tool's structured answer.
    pub(crate) async fn call(&self, tool: &str, arguments: Value) -> Value {
        match self.try_call(tool, arguments.clone()).await {
            Some(Ok(value)) => value,
            Some(Err(text)) => panic!("{tool} {arguments}: {text}"),
            None => panic!("{tool} {arguments}: the server went away"),
        }
    }

    /// A tool's error text.
    pub(crate) async fn refusal(&self, tool: &str, arguments: Value) -> String {
        match self.try_call(tool, arguments.clone()).await {
            Some(Err(text)) => text,
            other => panic!("{tool} {arguments}: expected a refusal, got {other:?}"),
        }
    }

    /// Assigns a task; gives the work's id.
    pub(crate) async fn assign(&self, agent: &str, task: &str) -> String {
        let assigned = self.call("assign_work", json!({"agent_name": agent, "task": task})).await;
        assigned["work_id"].as_str().unwrap().to_owned()
    }

    /// Waits for a work, as often as it takes.
    pub(crate) async fn settled(&self, work_id: &str) -> Value {
        for _ in 0..20 {
            let work = self.call("await_work", json!({"work_id": work_id, "timeout": "10s"})).await;
            let work = work["works"].get(0).cloned().unwrap_or(work);
            if ["COMPLETE", "FAILED", "CANCELLED", "ESCALATED"].contains(&work["status"].as_str().unwrap()) {
                return work;
            }
        }
        panic!("work {work_id} did not settle");
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }
}

/// Writes an agent that runs a shell script.
pub(crate) fn agent(dir: &Path, name: &str, front: &str, script: &str) {
    let path = dir.join(format!("{name}.sh"));
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let text = format!(
        "---\nname: {name}\ndescription: test agent {name}\nrunner: {{ kind: command, command: [\"./{name}.sh\"] }}\n{front}\n---\nYou are {name}.\n"
    );
    std::fs::write(dir.join(format!("{name}.md")), text).unwrap();
}
