//! MCP over lines of JSON: standard input and output, or any other pair of streams.
//!
//! rmcp has a transport for this as well. Ours answers what cannot be read instead of dropping it, keeps a stray notification
//! before the handshake from ending the server, takes a last line without a newline, and ends waits when the client is gone.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use rmcp::model::{ClientJsonRpcMessage, ClientRequest, GetMeta, JsonRpcMessage, ProtocolVersion, ServerJsonRpcMessage};
use rmcp::service::{RoleServer, ServerInitializeError, serve_server_with_ct};
use rmcp::transport::{Transport, TransportAdapterIdentity};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::server::Server;
use crate::model::size::Size;

/// How many lines may wait for a client that does not read.
const LINES_WAITING_MAX: usize = 256;
/// How much is read at once.
const READ_BUFFER: usize = 64 << 10;
/// A larger buffer is given back after its line.
const KEPT_BUFFER_MAX: usize = 1 << 20;
/// How long the last lines may take to leave at the end.
const FAREWELL: Duration = Duration::from_secs(1);

/// Why a connection ended badly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The handshake failed.
    #[error("the MCP handshake failed")]
    Handshake(#[source] Box<ServerInitializeError>),
    /// The task that served it panicked.
    #[error("the task that served MCP ended early")]
    Task(#[from] tokio::task::JoinError),
}

/// Serves standard input and output until the client closes them or the station stops.
///
/// # Errors
/// The connection ended badly.
pub async fn serve_stdio(server: Server, line_max: Size) -> Result<(), Error> {
    let (read, write) = rmcp::transport::stdio_pipes();
    serve_lines(server, read, write, line_max).await
}

/// Serves a pair of streams until one of them ends or the station stops.
///
/// # Errors
/// The connection ended badly.
pub async fn serve_lines<R, W>(server: Server, read: R, write: W, line_max: Size) -> Result<(), Error>
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let closing = server.closing().clone();
    let stop = server.stop().child_token();
    let (lines, queue) = mpsc::channel(LINES_WAITING_MAX);
    let writing = server.connection().shared.tasks.spawn(write_lines(write, queue, closing.clone()));
    let transport = Lines {
        read: BufReader::with_capacity(READ_BUFFER, read),
        line: Vec::new(),
        line_max: line_max.as_usize(),
        discarding: false,
        open: false,
        replies: VecDeque::new(),
        lines: Some(lines),
        writing: Some(writing),
        closing,
    };
    let served = serve_server_with_ct::<_, _, _, TransportAdapterIdentity>(server, transport, stop).await;
    match served {
        Ok(running) => {
            running.waiting().await?;
            Ok(())
        }
        Err(ServerInitializeError::ConnectionClosed(_) | ServerInitializeError::Cancelled) => Ok(()),
        Err(error) => Err(Error::Handshake(Box::new(error))),
    }
}

/// A line on its way out, and who wants to know that it has left.
struct Line {
    bytes: Vec<u8>,
    left: Option<oneshot::Sender<()>>,
}

/// Writes lines in order, as many at once as there are; ends with the last sender, or with the stream.
async fn write_lines<W: AsyncWrite + Unpin>(mut write: W, mut queue: mpsc::Receiver<Line>, closing: CancellationToken) {
    let mut lines = Vec::with_capacity(LINES_WAITING_MAX);
    while queue.recv_many(&mut lines, LINES_WAITING_MAX).await > 0 {
        let written = async {
            for line in &lines {
                write.write_all(&line.bytes).await?;
            }
            write.flush().await
        };
        if let Err(error) = written.await {
            tracing::debug!(%error, "the client reads no more");
            closing.cancel();
            return;
        }
        for line in lines.drain(..) {
            if let Some(left) = line.left {
                let _ = left.send(());
            }
        }
    }
}

struct Lines<R> {
    read: BufReader<R>,
    /// What has been read of the current line; a dropped `receive` loses none of it.
    line: Vec<u8>,
    line_max: usize,
    /// The current line was too long, and is skipped up to its end.
    discarding: bool,
    /// The client has chosen a protocol; before that, rmcp takes requests only.
    open: bool,
    /// Answers to what could not be read.
    replies: VecDeque<Vec<u8>>,
    lines: Option<mpsc::Sender<Line>>,
    writing: Option<JoinHandle<()>>,
    closing: CancellationToken,
}

enum Read {
    Line,
    TooLong,
    End,
}

impl<R: AsyncRead + Unpin + Send + 'static> Transport<RoleServer> for Lines<R> {
    type Error = io::Error;

    fn send(&mut self, message: ServerJsonRpcMessage) -> impl Future<Output = io::Result<()>> + Send + 'static {
        let lines = self.lines.clone();
        async move {
            let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the client is gone");
            let lines = lines.ok_or_else(gone)?;
            let mut bytes = serde_json::to_vec(&message)?;
            bytes.push(b'\n');
            let (left, has_left) = oneshot::channel();
            lines.send(Line { bytes, left: Some(left) }).await.map_err(|_| gone())?;
            drop(lines);
            has_left.await.map_err(|_| gone())
        }
    }

    async fn receive(&mut self) -> Option<ClientJsonRpcMessage> {
        loop {
            while !self.replies.is_empty() {
                let room = self.lines.as_ref()?.reserve().await.ok()?;
                if let Some(bytes) = self.replies.pop_front() {
                    room.send(Line { bytes, left: None });
                }
            }
            match self.read_line().await {
                Read::Line => {
                    let taken = take(&self.line);
                    self.line.clear();
                    self.line.shrink_to(KEPT_BUFFER_MAX);
                    match taken {
                        Taken::Message(message) if self.admits(&message) => return Some(*message),
                        Taken::Message(_) | Taken::Nothing => {}
                        Taken::Refused(reply) => self.replies.push_back(reply),
                    }
                }
                Read::TooLong => {
                    tracing::warn!(line_max = self.line_max, "skipped a line that is too long");
                    let text = format!("a line may have at most {} bytes (mcp.line_max), and this one has more", self.line_max);
                    self.replies.push_back(refusal(&Value::Null, INVALID_REQUEST, &text));
                }
                Read::End => {
                    // Whoever waits on behalf of this client need not any more.
                    self.closing.cancel();
                    return None;
                }
            }
        }
    }

    async fn close(&mut self) -> io::Result<()> {
        self.lines = None;
        if let Some(writing) = self.writing.take()
            && tokio::time::timeout(FAREWELL, writing).await.is_err()
        {
            tracing::debug!("the client did not read the last lines");
        }
        Ok(())
    }
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Reads one line; nothing is lost when the future is dropped, since what is consumed stands in `self` by then.
    async fn read_line(&mut self) -> Read {
        loop {
            let available = tokio::select! {
                () = self.closing.cancelled() => return Read::End,
                available = self.read.fill_buf() => match available {
                    Ok(available) => available,
                    Err(error) => {
                        tracing::debug!(%error, "the client's stream broke");
                        return Read::End;
                    }
                },
            };
            if available.is_empty() {
                // The last line may end without a newline.
                let rest = !self.line.is_empty() && !std::mem::take(&mut self.discarding);
                return if rest { Read::Line } else { Read::End };
            }
            let newline = available.iter().position(|byte| *byte == b'\n');
            let taken = newline.map_or(available.len(), |at| at + 1);
            let fits = self.line.len() + taken <= self.line_max.saturating_add(1);
            let keep = fits && !self.discarding;
            if keep {
                self.line.extend_from_slice(&available[..taken]);
            }
            self.read.consume(taken);
            match (keep, newline.is_some()) {
                (true, true) => return Read::Line,
                (true, false) => {}
                (false, ended) => {
                    let first = !std::mem::replace(&mut self.discarding, !ended);
                    self.line = Vec::new();
                    if first {
                        return Read::TooLong;
                    }
                }
            }
        }
    }

    /// Whether rmcp may see a message: before the client has chosen a protocol, anything but a request would end the server.
    fn admits(&mut self, message: &ClientJsonRpcMessage) -> bool {
        if self.open {
            return true;
        }
        let JsonRpcMessage::Request(request) = message else { return false };
        self.open = match &request.request {
            ClientRequest::InitializeRequest(_) => true,
            ClientRequest::DiscoverRequest(_) | ClientRequest::PingRequest(_) => false,
            request => {
                let meta = request.get_meta();
                let known = meta.protocol_version().is_some_and(|version| ProtocolVersion::KNOWN_VERSIONS.contains(&version));
                known && meta.missing_required_keys(&ProtocolVersion::V_2026_07_28).is_empty()
            }
        };
        true
    }
}

pub(super) enum Taken {
    Message(Box<ClientJsonRpcMessage>),
    Refused(Vec<u8>),
    Nothing,
}

const PARSE_ERROR: i32 = -32700;
const INVALID_REQUEST: i32 = -32600;

/// Reads a message, or makes the answer to what is none.
pub(super) fn take(line: &[u8]) -> Taken {
    let line = line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line).trim_ascii();
    if line.is_empty() {
        return Taken::Nothing;
    }
    let error = match serde_json::from_slice(line) {
        Ok(message) => return Taken::Message(Box::new(message)),
        Err(error) => error,
    };
    let Ok(value) = serde_json::from_slice::<Value>(line) else {
        return Taken::Refused(refusal(&Value::Null, PARSE_ERROR, &format!("not JSON: {error}")));
    };
    let id = value.get("id").filter(|id| id.is_string() || id.is_i64() || id.is_u64());
    match (id, value.get("method").is_some()) {
        // JSON-RPC: nobody answers a notification, even one that cannot be read.
        (None, true) if value.get("id").is_none() => {
            tracing::debug!(%error, "skipped a notification that cannot be read");
            Taken::Nothing
        }
        (id, _) => {
            let text = format!("not a JSON-RPC 2.0 message of MCP: {error}");
            Taken::Refused(refusal(id.unwrap_or(&Value::Null), INVALID_REQUEST, &text))
        }
    }
}

fn refusal(id: &Value, code: i32, message: &str) -> Vec<u8> {
    let mut bytes = json!({ "jsonrpc": "2.0", "id": id, "error": { "code": code, "message": message } }).to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}
