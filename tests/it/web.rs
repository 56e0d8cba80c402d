//! A plain HTTP client on a socket: it sends exactly what it is told.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpSocket, TcpStream};

/// How soon a connection must be closed.
const CLOSE: Duration = Duration::from_secs(10);

/// A response's first part.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
}

impl Head {
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// A whole response.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) head: Head,
    pub(crate) text: String,
}

impl Reply {
    pub(crate) fn status(&self) -> u16 {
        self.head.status
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.head.get(name)
    }

    /// The body, or the last event of a stream.
    pub(crate) fn json(&self) -> Value {
        let text = self.text.lines().filter_map(|line| line.strip_prefix("data:")).next_back().unwrap_or(&self.text);
        serde_json::from_str(text.trim()).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// The message of a refusal.
    pub(crate) fn error(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap_or_else(|| panic!("no error in {self:?}")).to_owned()
    }
}

/// A connection.
pub(crate) struct Wire(BufReader<TcpStream>);

impl Wire {
    pub(crate) async fn open(at: SocketAddr) -> Self {
        Self(BufReader::new(TcpStream::connect(at).await.expect("a listening server")))
    }

    /// A connection that holds little of what nobody reads.
    pub(crate) async fn narrow(at: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(4096).expect("a small buffer");
        Self(BufReader::new(socket.connect(at).await.expect("a listening server")))
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(bytes.as_ref()).await.expect("an open connection");
    }

    /// Sends to a server that may have hung up.
    pub(crate) async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        self.0.get_mut().write_all(bytes.as_ref()).await
    }

    /// Sends nothing more.
    pub(crate) async fn hang_up(&mut self) {
        self.0.get_mut().shutdown().await.expect("an open connection");
    }

    /// All that comes until the server hangs up.
    pub(crate) async fn rest(&mut self) -> String {
        let mut bytes = Vec::new();
        let _ = tokio::time::timeout(CLOSE, self.0.read_to_end(&mut bytes)).await;
        String::from_utf8_lossy(&bytes).into_owned()
    }

    async fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        (self.0.read_line(&mut line).await.ok()? > 0).then(|| line.trim_end().to_owned())
    }

    /// The next response's head; none when the server closed the connection.
    pub(crate) async fn head(&mut self) -> Option<Head> {
        let first = self.line().await?;
        let status = first.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("no status in {first:?}"));
        let mut headers = Vec::new();
        while let Some(line) = self.line().await.filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(':').expect("a header");
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        Some(Head { status, headers })
    }

    /// The next part of a chunked body; none at its end.
    pub(crate) async fn chunk(&mut self) -> Option<String> {
        let size = usize::from_str_radix(&self.line().await?, 16).expect("a chunk's size");
        let mut bytes = vec![0; size + 2];
        self.0.read_exact(&mut bytes).await.ok()?;
        (size > 0).then(|| String::from_utf8_lossy(&bytes[..size]).into_owned())
    }

    /// Chunks until one contains a text.
    pub(crate) async fn until(&mut self, text: &str) -> String {
        loop {
            let chunk = self.chunk().await.unwrap_or_else(|| panic!("the stream ended without {text:?}"));
            if chunk.contains(text) {
                return chunk;
            }
        }
    }

    /// The next response.
    pub(crate) async fn reply(&mut self) -> Reply {
        let head = self.head().await.expect("a response");
        let mut text = String::new();
        if let Some(length) = head.get("content-length") {
            let mut bytes = vec![0; length.parse().expect("a length")];
            self.0.read_exact(&mut bytes).await.expect("a whole body");
            text = String::from_utf8(bytes).expect("text");
        } else if head.get("transfer-encoding").is_some() {
            while let Some(chunk) = self.chunk().await {
                text.push_str(&chunk);
            }
        }
        Reply { head, text }
    }

    /// Whether the server closes the connection soon, without another byte.
    pub(crate) async fn is_closed(&mut self) -> bool {
        matches!(tokio::time::timeout(CLOSE, self.0.read(&mut [0])).await, Ok(Ok(0) | Err(_)))
    }
}

/// A request's text.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    line: String,
    headers: Vec<(String, String)>,
    body: String,
}

impl Ask {
    pub(crate) fn new(method: &str, path: &str) -> Self {
        Self { line: format!("{method} {path} HTTP/1.1"), headers: vec![("Host".into(), "localhost".into())], body: String::new() }
    }

    /// A JSON-RPC message as MCP's clients post it.
    pub(crate) fn mcp(message: &Value) -> Self {
        Self::new("POST", "/mcp")
            .with("Content-Type", "application/json")
            .with("Accept", "application/json, text/event-stream")
            .body(&message.to_string())
    }

    /// Sets a header; an empty value leaves it out.
    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(key, _)| !key.eq_ignore_ascii_case(name));
        if !value.is_empty() {
            self.headers.push((name.to_owned(), value.to_owned()));
        }
        self
    }

    pub(crate) fn body(mut self, text: &str) -> Self {
        text.clone_into(&mut self.body);
        self
    }

    /// Changes the body.
    pub(crate) fn rebody(mut self, change: impl Fn(&str) -> String) -> Self {
        self.body = change(&self.body);
        self
    }

    pub(crate) fn text(&self) -> String {
        let mut text = format!("{}\r\n", self.line);
        for (name, value) in &self.headers {
            text += &format!("{name}: {value}\r\n");
        }
        if !self.body.is_empty() {
            text += &format!("Content-Length: {}\r\n", self.body.len());
        }
        text + "\r\n" + &self.body
    }

    pub(crate) async fn at(&self, at: SocketAddr) -> Reply {
        let mut wire = Wire::open(at).await;
        wire.send(self.text()).await;
        wire.reply().await
    }
}

/// `initialize` of a client of 2025-11-25.
pub(crate) fn initialize() -> Value {
    let params = json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": { "name": "test", "version": "1" } });
    json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params })
}

/// A call of a tool.
pub(crate) fn call(id: u32, tool: &str, arguments: &Value) -> Value {
    json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": { "name": tool, "arguments": arguments } })
}

/// A message as clients of 2026-07-28 send it.
pub(crate) fn modern(mut message: Value) -> Ask {
    message["params"]["_meta"] = json!({
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": { "name": "test", "version": "1" },
        "io.modelcontextprotocol/clientCapabilities": {},
    });
    let ask =
        Ask::mcp(&message).with("MCP-Protocol-Version", "2026-07-28").with("Mcp-Method", message["method"].as_str().expect("a method"));
    ask.with("Mcp-Name", message["params"]["name"].as_str().unwrap_or_default())
}

/// Opens a session; its id.
pub(crate) async fn session(at: SocketAddr) -> String {
    let reply = Ask::mcp(&initialize()).at(at).await;
    assert_eq!(reply.status(), 200, "{reply:?}");
    let id = reply.get("mcp-session-id").expect("a session").to_owned();
    let done = Ask::mcp(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" })).with("Mcp-Session-Id", &id).at(at).await;
    assert_eq!(done.status(), 202, "{done:?}");
    id
}
