//! A bad line between one station and the server.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the line does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line {
    /// Everything passes.
    Open,
    /// Everything passes, until the server is told this.
    MuteAfter(&'static str),
    /// What the server says does not arrive; what it is told does.
    Mute,
    /// Nothing passes, and nobody is told.
    Frozen,
    /// Connections end, and no new ones are made.
    Cut,
}

/// Listens in front of a server; it ends with this value.
pub(super) struct Proxy {
    port: u16,
    line: Arc<watch::Sender<Line>>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub(super) async fn before(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let line = Arc::new(watch::Sender::new(Line::Open));
        let state = line.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (switch, mut state) = (state.clone(), state.subscribe());
                if *state.borrow_and_update() == Line::Cut {
                    continue;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { continue };
                tokio::spawn(async move {
                    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                    let (told, said) = (state.clone(), state.clone());
                    let hears = |bytes: &[u8]| {
                        let said = *switch.borrow();
                        if let Line::MuteAfter(text) = said
                            && bytes.windows(text.len()).any(|part| part == text.as_bytes())
                        {
                            switch.send_replace(Line::Mute);
                        }
                    };
                    tokio::select! {
                        () = pass(from_client, to_server, told, hears, |line| matches!(line, Line::Open | Line::Mute | Line::MuteAfter(_))) => {}
                        () = pass(from_server, to_client, said, |_| {}, |line| matches!(line, Line::Open | Line::MuteAfter(_))) => {}
                        _ = state.wait_for(|line| *line == Line::Cut) => {}
                    }
                });
            }
        });
        Self { port, line, task }
    }

    pub(super) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub(super) fn set(&self, line: Line) {
        self.line.send_replace(line);
    }

    /// Waits until the line does this.
    pub(super) async fn until(&self, line: Line) {
        self.line.subscribe().wait_for(|now| *now == line).await.unwrap();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.line.send_replace(Line::Cut);
    }
}

/// Passes bytes on, whenever the line lets them.
async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut line: watch::Receiver<Line>,
    hears: impl Fn(&[u8]),
    lets: impl Fn(Line) -> bool,
) {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let Ok(read @ 1..) = from.read(&mut bytes).await else { return };
        hears(&bytes[..read]);
        if line.wait_for(|line| lets(*line)).await.is_err() || to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}
