//! A client, as the tests play one.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, Lines, ReadHalf, WriteHalf};
use tokio::task::JoinHandle;

use crate::mcp::Error;

const PATIENCE: Duration = Duration::from_secs(20);

type Served = JoinHandle<Result<(), Error>>;

/// One end of a connection, which speaks as a client does.
pub(super) struct Client {
    lines: Lines<BufReader<ReadHalf<DuplexStream>>>,
    pub(super) write: Option<WriteHalf<DuplexStream>>,
    next: u64,
    pub(super) notifications: Vec<Value>,
    served: Option<Served>,
    pub(super) modern: bool,
    pub(super) capabilities: Value,
}

impl Client {
    pub(super) fn new(read: ReadHalf<DuplexStream>, write: WriteHalf<DuplexStream>, served: Served) -> Self {
        Self {
            lines: BufReader::new(read).lines(),
            write: Some(write),
            next: 1,
            notifications: Vec::new(),
            served: Some(served),
            modern: false,
            capabilities: json!({}),
        }
    }

    pub(super) async fn send(&mut self, message: &Value) {
        self.send_bytes(format!("{message}\n").as_bytes()).await;
    }

    pub(super) async fn send_bytes(&mut self, bytes: &[u8]) {
        self.write.as_mut().unwrap().write_all(bytes).await.unwrap();
    }

    pub(super) async fn receive(&mut self) -> Value {
        let line = tokio::time::timeout(PATIENCE, self.lines.next_line()).await.expect("an answer in time").unwrap().expect("a line");
        serde_json::from_str(&line).unwrap()
    }

    pub(super) async fn begin(&mut self, method: &str, mut params: Value) -> u64 {
        let id = self.next;
        self.next += 1;
        if self.modern {
            params["_meta"]["io.modelcontextprotocol/protocolVersion"] = "2026-07-28".into();
            params["_meta"]["io.modelcontextprotocol/clientInfo"] = json!({"name": "test", "version": "0"});
            params["_meta"]["io.modelcontextprotocol/clientCapabilities"] = self.capabilities.clone();
        }
        self.send(&json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params})).await;
        id
    }

    pub(super) async fn answer(&mut self, id: u64) -> Value {
        loop {
            let message = self.receive().await;
            if message.get("method").is_some() {
                self.notifications.push(message);
            } else {
                assert_eq!(message["id"], id, "{message}");
                return message;
            }
        }
    }

    /// The next request of the server.
    pub(super) async fn asked(&mut self, method: &str) -> Value {
        let request = self.notified(method).await;
        assert!(request["id"].is_number() || request["id"].is_string(), "{request}");
        request
    }

    pub(super) async fn reply(&mut self, request: &Value, result: Value) {
        self.send(&json!({"jsonrpc": "2.0", "id": request["id"], "result": result})).await;
    }

    pub(super) async fn request(&mut self, method: &str, params: Value) -> Value {
        let id = self.begin(method, params).await;
        self.answer(id).await
    }

    /// The next notification of a method.
    pub(super) async fn notified(&mut self, method: &str) -> Value {
        loop {
            if let Some(at) = self.notifications.iter().position(|notification| notification["method"] == method) {
                return self.notifications.remove(at);
            }
            let message = self.receive().await;
            self.notifications.push(message);
        }
    }

    /// What a tool gave; its text says the same.
    pub(super) async fn call(&mut self, tool: &str, arguments: Value) -> Value {
        let answer = self.request("tools/call", json!({"name": tool, "arguments": arguments})).await;
        let result = &answer["result"];
        assert_ne!(result["isError"], true, "{answer}");
        let text: Value = serde_json::from_str(result["content"][0]["text"].as_str().unwrap()).unwrap();
        assert_eq!(text, result["structuredContent"]);
        text
    }

    /// What a tool said was wrong.
    pub(super) async fn refused(&mut self, tool: &str, arguments: Value) -> String {
        let answer = self.request("tools/call", json!({"name": tool, "arguments": arguments})).await;
        assert_eq!(answer["result"]["isError"], true, "{tool} {arguments}: {answer}");
        answer["result"]["content"][0]["text"].as_str().unwrap().to_owned()
    }

    pub(super) async fn assign(&mut self, agent: &str) -> Value {
        self.call("assign_work", json!({"agent_name": agent, "task": "do it"})).await["work_id"].clone()
    }

    /// Hangs up, and waits until the server has noticed.
    pub(super) async fn leave(mut self) -> Duration {
        drop(self.write.take());
        // Dropping one half does not close the stream; the other half goes with it.
        let served = self.served.take().unwrap();
        let begun = Instant::now();
        drop(self);
        tokio::time::timeout(PATIENCE, served).await.expect("the server ends").unwrap().unwrap();
        begun.elapsed()
    }
}

/// What a client can do that shows forms.
pub(super) fn forms() -> Value {
    json!({"elicitation": {"form": {}}})
}
