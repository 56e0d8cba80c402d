//! A load client that speaks MCP itself: JSON-RPC in lines on pipes, and on kept-alive HTTP connections.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// How long a server may take to start or answer before the bench gives up: as long as hosts wait for a silent call.
const PATIENCE: Duration = Duration::from_secs(60);

/// The protocol that a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Speaks {
    /// With `initialize` and sessions.
    Legacy,
    /// Without.
    Modern,
}

/// How long calls took, one by one and together.
#[derive(Default)]
pub(crate) struct Measured {
    samples: Vec<Duration>,
    took: Duration,
}

impl Measured {
    /// What was measured in so much time.
    pub(crate) fn new(samples: Vec<Duration>, took: Duration) -> Self {
        Self { samples, took }
    }

    /// Adds what was measured later.
    pub(crate) fn add(&mut self, later: Self) {
        self.samples.extend(later.samples);
        self.took += later.took;
    }

    /// So many of a hundred calls took no longer.
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        let mut samples = self.samples.clone();
        samples.sort_unstable();
        samples.get(samples.len() * percent / 100).copied().unwrap_or_default()
    }

    pub(crate) fn per_second(&self) -> f64 {
        self.samples.len() as f64 / self.took.as_secs_f64()
    }
}

/// So many of something, so many of them at once.
pub(crate) async fn together<F>(count: usize, at_once: usize, one: impl Fn() -> F + Clone + Send + 'static) -> anyhow::Result<Measured>
where
    F: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let began = Instant::now();
    let mut lanes = tokio::task::JoinSet::new();
    for _ in 0..at_once {
        let one = one.clone();
        lanes.spawn(async move {
            let mut samples = Vec::with_capacity(count / at_once);
            for _ in 0..count / at_once {
                let began = Instant::now();
                one().await?;
                samples.push(began.elapsed());
            }
            anyhow::Ok(samples)
        });
    }
    let mut samples = Vec::with_capacity(count);
    while let Some(lane) = lanes.join_next().await {
        samples.extend(lane??);
    }
    Ok(Measured::new(samples, began.elapsed()))
}

/// The middle one.
pub(crate) fn median(samples: Vec<Duration>) -> Duration {
    Measured { samples, took: Duration::ZERO }.percentile(50)
}

fn initialize() -> Value {
    let params = json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": { "name": "bench", "version": "1" } });
    json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params })
}

fn initialized() -> Value {
    json!({ "jsonrpc": "2.0", "method": "notifications/initialized" })
}

fn call(id: u64, tool: &str, arguments: &Value) -> Value {
    json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": { "name": tool, "arguments": arguments } })
}

fn structured(answer: &Value) -> anyhow::Result<&Value> {
    let content = answer.pointer("/result/structuredContent");
    content.filter(|_| answer.pointer("/result/isError") != Some(&json!(true))).with_context(|| format!("no result: {answer}"))
}

/// A server on pipes.
pub(crate) struct Pipes {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    line: String,
}

impl Pipes {
    /// Starts a server and opens a session.
    pub(crate) async fn open(argv: &[String]) -> anyhow::Result<Self> {
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("cannot start {}", argv[0]))?;
        let stdin = child.stdin.take().context("no standard input")?;
        let stdout = BufReader::new(child.stdout.take().context("no standard output")?);
        let mut pipes = Self { child, stdin, stdout, line: String::new() };
        pipes.send(&initialize()).await?;
        pipes.answer().await?;
        pipes.send(&initialized()).await?;
        Ok(pipes)
    }

    async fn send(&mut self, message: &Value) -> anyhow::Result<()> {
        let mut line = message.to_string();
        line.push('\n');
        self.stdin.write_all(line.as_bytes()).await?;
        Ok(())
    }

    /// The next answer; what else comes is skipped.
    async fn answer(&mut self) -> anyhow::Result<Value> {
        loop {
            self.line.clear();
            let read = tokio::time::timeout(PATIENCE, self.stdout.read_line(&mut self.line)).await.context("no answer in time")??;
            ensure!(read > 0, "the server left");
            let message: Value = serde_json::from_str(&self.line)?;
            if message.get("id").is_some() && message.get("method").is_none() {
                return Ok(message);
            }
        }
    }

    /// Lists the tools.
    pub(crate) async fn list_tools(&mut self) -> anyhow::Result<()> {
        self.send(&json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list" })).await?;
        let answer = self.answer().await?;
        ensure!(answer.pointer("/result/tools").is_some(), "no tools: {answer}");
        Ok(())
    }

    /// Calls a tool that must succeed.
    pub(crate) async fn call(&mut self, tool: &str, arguments: &Value) -> anyhow::Result<Value> {
        self.send(&call(2, tool, arguments)).await?;
        let answer = self.answer().await?;
        structured(&answer).cloned()
    }

    /// So many calls, so many of them at once.
    pub(crate) async fn load(&mut self, count: usize, at_once: usize, tool: &str, arguments: &Value) -> anyhow::Result<Measured> {
        let mut sent = Vec::with_capacity(count);
        let mut samples = Vec::with_capacity(count);
        let began = Instant::now();
        while samples.len() < count {
            while sent.len() < count && sent.len() - samples.len() < at_once {
                sent.push(Instant::now());
                self.send(&call(1000 + sent.len() as u64 - 1, tool, arguments)).await?;
            }
            let answer = self.answer().await?;
            structured(&answer)?;
            let at = answer["id"].as_u64().and_then(|id| sent.get(usize::try_from(id).ok()? - 1000)).context("an answer to nothing")?;
            samples.push(at.elapsed());
        }
        Ok(Measured { samples, took: began.elapsed() })
    }

    /// The memory that the server holds, in KiB.
    pub(crate) fn memory(&self) -> Option<u64> {
        memory(self.child.id()?)
    }

    /// Kills the server.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Ends the server as a client does, by closing its input.
    pub(crate) async fn close(self) -> anyhow::Result<()> {
        let Self { mut child, stdin, .. } = self;
        drop(stdin);
        tokio::time::timeout(PATIENCE, child.wait()).await.context("the server did not leave")??;
        Ok(())
    }
}

/// A server on HTTP.
pub(crate) struct Server {
    child: Child,
    at: String,
}

impl Server {
    /// Starts a server that says on standard error where it listens.
    pub(crate) async fn start(argv: &[String]) -> anyhow::Result<Self> {
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("cannot start {}", argv[0]))?;
        let mut lines = BufReader::new(child.stderr.take().context("no standard error")?).lines();
        let at = tokio::time::timeout(PATIENCE, async {
            while let Some(line) = lines.next_line().await? {
                if let Some(at) = line.strip_prefix("listening on http://").and_then(|url| url.strip_suffix("/mcp")) {
                    return Ok(at.to_owned());
                }
            }
            bail!("the server left without listening")
        })
        .await
        .context("the server does not listen")??;
        #[expect(clippy::disallowed_methods, reason = "a bench has no tracker")]
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self { child, at })
    }

    /// Its host and port.
    pub(crate) fn at(&self) -> &str {
        &self.at
    }

    /// The memory that the server holds, in KiB.
    pub(crate) fn memory(&self) -> Option<u64> {
        memory(self.child.id()?)
    }

    /// So many calls, over so many connections.
    pub(crate) async fn load(
        &self,
        speaks: Speaks,
        count: usize,
        connections: usize,
        tool: &str,
        arguments: &Value,
    ) -> anyhow::Result<Measured> {
        let mut open = Vec::new();
        for _ in 0..connections {
            open.push(Wire::open(&self.at, speaks).await?);
        }
        let began = Instant::now();
        let mut lanes = tokio::task::JoinSet::new();
        for mut wire in open {
            let (share, tool, arguments) = (count / connections, tool.to_owned(), arguments.clone());
            lanes.spawn(async move {
                let mut samples = Vec::with_capacity(share);
                for _ in 0..share {
                    let at = Instant::now();
                    wire.call(&tool, &arguments).await?;
                    samples.push(at.elapsed());
                }
                anyhow::Ok(samples)
            });
        }
        let mut samples = Vec::with_capacity(count);
        while let Some(lane) = lanes.join_next().await {
            samples.extend(lane??);
        }
        Ok(Measured { samples, took: began.elapsed() })
    }

    /// Calls a tool that must succeed.
    pub(crate) async fn call(&self, tool: &str, arguments: &Value) -> anyhow::Result<Value> {
        Wire::open(&self.at, Speaks::Legacy).await?.call(tool, arguments).await
    }
}

/// A kept-alive connection.
pub(crate) struct Wire {
    stream: BufReader<TcpStream>,
    at: String,
    speaks: Speaks,
    session: String,
    line: String,
}

impl Wire {
    /// Connects, and opens a session where there are such.
    pub(crate) async fn open(at: &str, speaks: Speaks) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(at).await?;
        stream.set_nodelay(true)?;
        let mut wire = Self { stream: BufReader::new(stream), at: at.to_owned(), speaks, session: String::new(), line: String::new() };
        if speaks == Speaks::Legacy {
            wire.post(&initialize()).await?;
            ensure!(!wire.session.is_empty(), "no session");
            wire.post(&initialized()).await?;
        }
        Ok(wire)
    }

    /// Calls a tool that must succeed.
    pub(crate) async fn call(&mut self, tool: &str, arguments: &Value) -> anyhow::Result<Value> {
        structured(&self.ask(call(2, tool, arguments)).await?).cloned()
    }

    /// Asks for anything else; the result.
    pub(crate) async fn request(&mut self, method: &str, params: &Value) -> anyhow::Result<Value> {
        let answer = self.ask(json!({ "jsonrpc": "2.0", "id": 3, "method": method, "params": params })).await?;
        answer.get("result").cloned().with_context(|| format!("{method}: {answer}"))
    }

    async fn ask(&mut self, mut message: Value) -> anyhow::Result<Value> {
        if self.speaks == Speaks::Modern {
            modernize(&mut message);
        }
        let text = self.post(&message).await?;
        let answer = text.lines().filter_map(|line| line.strip_prefix("data:")).next_back().unwrap_or(&text);
        serde_json::from_str(answer.trim()).with_context(|| format!("no JSON: {text}"))
    }

    /// Posts a message; the body of the response.
    async fn post(&mut self, message: &Value) -> anyhow::Result<String> {
        let request = self.request_text(message);
        self.stream.get_mut().write_all(request.as_bytes()).await?;
        tokio::time::timeout(PATIENCE, self.response()).await.context("no answer in time")?
    }

    fn request_text(&self, message: &Value) -> String {
        let body = message.to_string();
        let further = match self.speaks {
            Speaks::Legacy if self.session.is_empty() => String::new(),
            Speaks::Legacy => format!("Mcp-Session-Id: {}\r\nMCP-Protocol-Version: 2025-11-25\r\n", self.session),
            Speaks::Modern => {
                let text = |pointer: &str| message.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
                let (method, name) = (text("/method"), text("/params/name"));
                format!("MCP-Protocol-Version: 2026-07-28\r\nMcp-Method: {method}\r\nMcp-Name: {name}\r\n")
            }
        };
        format!(
            "POST /mcp HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nAccept: application/json, text/event-stream\r\n\
             {further}Content-Length: {}\r\n\r\n{body}",
            self.at,
            body.len()
        )
    }

    async fn next_line(&mut self) -> anyhow::Result<&str> {
        self.line.clear();
        ensure!(self.stream.read_line(&mut self.line).await? > 0, "the server closed the connection");
        Ok(self.line.trim_end())
    }

    async fn response(&mut self) -> anyhow::Result<String> {
        let status = self.next_line().await?.to_owned();
        let mut length = None;
        loop {
            let line = self.next_line().await?.to_owned();
            let Some((name, value)) = line.split_once(':') else { break };
            if name.eq_ignore_ascii_case("content-length") {
                length = Some(value.trim().parse::<usize>()?);
            } else if name.eq_ignore_ascii_case("mcp-session-id") {
                value.trim().clone_into(&mut self.session);
            }
        }
        let mut body = Vec::new();
        if let Some(length) = length {
            body.resize(length, 0);
            self.stream.read_exact(&mut body).await?;
        } else if !status.contains(" 202 ") || !self.stream.buffer().is_empty() {
            loop {
                let size = usize::from_str_radix(self.next_line().await?, 16)?;
                let from = body.len();
                body.resize(from + size + 2, 0);
                self.stream.read_exact(&mut body[from..]).await?;
                body.truncate(from + size);
                if size == 0 {
                    break;
                }
            }
        }
        let text = String::from_utf8(body)?;
        ensure!(status.contains(" 200 ") || status.contains(" 202 "), "{status}: {text}");
        Ok(text)
    }
}

/// A stream of notifications, counted as they come; it ends with this value.
pub(crate) struct Stream(tokio::task::JoinHandle<()>);

impl Stream {
    /// Of all that a session is told.
    pub(crate) async fn of_session(session: &Wire, heard: &Arc<AtomicU64>) -> anyhow::Result<Self> {
        let Wire { at, session, .. } = session;
        let request = format!(
            "GET /mcp HTTP/1.1\r\nHost: {at}\r\nAccept: text/event-stream\r\nMcp-Session-Id: {session}\r\n\
             MCP-Protocol-Version: 2025-11-25\r\n\r\n"
        );
        let stream = Self::open(at, &request).await?;
        Ok(Self::count(stream, heard))
    }

    /// Of the changes of a resource; it is listened to when this returns.
    pub(crate) async fn of_resource(at: &str, uri: &str, heard: &Arc<AtomicU64>) -> anyhow::Result<Self> {
        let wire = Wire::open(at, Speaks::Modern).await?;
        let wanted = json!({ "notifications": { "resourceSubscriptions": [uri] } });
        let mut message = json!({ "jsonrpc": "2.0", "id": 4, "method": "subscriptions/listen", "params": wanted });
        modernize(&mut message);
        let mut stream = Self::open(at, &wire.request_text(&message)).await?;
        drop(wire);
        let mut line = String::new();
        let acknowledged = async {
            while !line.contains("acknowledged") {
                line.clear();
                ensure!(stream.read_line(&mut line).await? > 0, "the stream ended at once");
            }
            Ok(())
        };
        tokio::time::timeout(PATIENCE, acknowledged).await.context("no acknowledgement in time")??;
        Ok(Self::count(stream, heard))
    }

    async fn open(at: &str, request: &str) -> anyhow::Result<BufReader<TcpStream>> {
        let mut stream = TcpStream::connect(at).await?;
        stream.set_nodelay(true)?;
        stream.write_all(request.as_bytes()).await?;
        let mut stream = BufReader::new(stream);
        let mut status = String::new();
        tokio::time::timeout(PATIENCE, stream.read_line(&mut status)).await.context("no answer in time")??;
        ensure!(status.contains(" 200 "), "{}", status.trim());
        Ok(stream)
    }

    fn count(stream: BufReader<TcpStream>, heard: &Arc<AtomicU64>) -> Self {
        let heard = Arc::clone(heard);
        #[expect(clippy::disallowed_methods, reason = "a bench has no tracker")]
        Self(tokio::spawn(async move {
            let mut lines = stream.lines();
            while let Ok(Some(line)) = lines.next_line().await {
                heard.fetch_add(u64::from(line.contains("resources/updated")), Ordering::Relaxed);
            }
        }))
    }

    /// Whether it has not been cut.
    pub(crate) fn is_whole(&self) -> anyhow::Result<()> {
        ensure!(!self.0.is_finished(), "the stream was cut");
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Says what newer clients say with each request.
fn modernize(message: &mut Value) {
    message["params"]["_meta"] = json!({
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": { "name": "bench", "version": "1" },
        "io.modelcontextprotocol/clientCapabilities": {},
    });
}

/// The memory that a process holds, in KiB.
pub(crate) fn memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().trim_end_matches(" kB").parse().ok()
}
