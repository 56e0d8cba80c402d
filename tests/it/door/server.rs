//! The real binary with an HTTP door, and clients that come with tokens.

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::by;
use crate::web::{Reply, call, modern};

/// A server process; it ends with this value.
pub(crate) struct Server {
    _child: Child,
    pub(crate) at: SocketAddr,
    /// All that it said on standard error.
    pub(crate) log: Arc<Mutex<String>>,
}

impl Server {
    pub(crate) async fn start(mut command: Command) -> Self {
        command.args(["--http", "127.0.0.1:0"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log: Arc<Mutex<String>> = Arc::default();
        let (said, hears) = (log.clone(), tokio::sync::oneshot::channel());
        let (found, at) = hears;
        tokio::spawn(async move {
            let mut found = Some(found);
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some(url) = line.strip_prefix("listening on ")
                    && let Some(found) = found.take()
                {
                    let at = url.split("://").nth(1).unwrap().trim_end_matches("/mcp").parse().unwrap();
                    let _ = found.send(at);
                }
                let mut said = said.lock().unwrap();
                said.push_str(&line);
                said.push('\n');
            }
        });
        let at = tokio::time::timeout(std::time::Duration::from_secs(60), at).await;
        let at = at.ok().and_then(Result::ok).unwrap_or_else(|| panic!("the server does not listen: {}", log.lock().unwrap()));
        Self { _child: child, at, log }
    }

    pub(crate) fn client(&self, token: &'static str) -> Client {
        Client { at: self.at, token }
    }
}

/// Somebody with a token.
#[derive(Clone, Copy)]
pub(crate) struct Client {
    at: SocketAddr,
    token: &'static str,
}

impl Client {
    pub(crate) async fn request(&self, method: &str, params: Value) -> Value {
        let ask = modern(json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params }));
        let ask = match params["uri"].as_str() {
            Some(uri) => ask.with("Mcp-Name", uri),
            None => ask,
        };
        by(self.token, ask).at(self.at).await.json()
    }

    pub(crate) async fn reply(&self, tool: &str, arguments: Value) -> Reply {
        by(self.token, modern(call(1, tool, &arguments))).at(self.at).await
    }

    /// What a tool gives, or the text of its error.
    pub(crate) async fn call(&self, tool: &str, arguments: Value) -> Result<Value, String> {
        let answer = self.reply(tool, arguments).await.json();
        let result = &answer["result"];
        match &result["isError"] {
            Value::Bool(true) => Err(result["content"][0]["text"].as_str().unwrap().to_owned()),
            _ if result["structuredContent"].is_object() => Ok(result["structuredContent"].clone()),
            _ => Err(answer.to_string()),
        }
    }

    pub(crate) async fn assign(&self, agent: &str, further: Value) -> Value {
        let mut arguments = json!({"agent_name": agent, "task": "x"});
        for (name, value) in further.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        self.call("assign_work", arguments).await.unwrap()
    }
}
