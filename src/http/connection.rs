//! Connections: accepting them, bounding them, and ending them in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Limits;
use super::proxies::Proxies;
use super::rates::{Held, holder};
use super::refusal::Cause;
use super::stall::Stalling;
use super::told::Told;

/// Who is at the other end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub(super) SocketAddr);

/// How long the MCP servers have to say goodbye on their streams before these are cut.
const GOODBYE: Duration = Duration::from_millis(200);
/// How long the last bytes may take to go out.
const FLUSH: Duration = Duration::from_secs(1);
/// How long we wait when the system gives no more connections.
const BREATH: Duration = Duration::from_millis(200);

/// The order in which serving ends.
#[derive(Clone, Default)]
pub(super) struct Ends {
    /// No further request on any connection.
    pub(super) requests: CancellationToken,
    /// Streams that would never end by themselves are cut.
    pub(super) streams: CancellationToken,
    /// Everything of rmcp's: sessions, and calls that outlasted the grace.
    pub(super) servers: CancellationToken,
    /// Connections are dropped.
    sockets: CancellationToken,
    /// The calls that are being answered.
    pub(super) calls: TaskTracker,
    connections: TaskTracker,
}

impl Ends {
    /// Lets running calls end within `grace`, and everything else at once.
    pub(super) async fn drain(&self, grace: Duration) {
        self.requests.cancel();
        self.calls.close();
        self.connections.close();
        let streams = async {
            tokio::time::sleep(GOODBYE).await;
            self.streams.cancel();
        };
        let (_, calls) = tokio::join!(streams, tokio::time::timeout(grace, self.calls.wait()));
        if calls.is_err() {
            tracing::warn!(calls = self.calls.len(), ?grace, "calls did not end in time and are broken off");
        }
        self.servers.cancel();
        if tokio::time::timeout(FLUSH, self.connections.wait()).await.is_err() {
            self.sockets.cancel();
            self.connections.wait().await;
        }
    }
}

/// What connections lead to.
pub(super) struct Way {
    pub(super) router: Router,
    /// None: they are not protected.
    pub(super) acceptor: Option<TlsAcceptor>,
    pub(super) limits: Limits,
    pub(super) proxies: Proxies,
    pub(super) told: Arc<Told>,
}

/// Accepts connections until `stop`.
pub(super) async fn accept(listener: TcpListener, way: Way, stop: &CancellationToken, tasks: &TaskTracker, ends: &Ends) {
    let room = Arc::new(Semaphore::new(way.limits.connections));
    let held = Arc::new(Held::new(u32::MAX, way.limits.connections_of_one));
    let way = Arc::new(way);
    loop {
        let next = async {
            let permit = room.clone().acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            next = next => next,
        };
        match accepted {
            Ok((stream, peer)) => {
                // A proxy's connections are those of all its clients.
                let hold = if way.proxies.trust(peer.ip()) { Ok(None) } else { held.take(holder(peer.ip())).map(Some) };
                let Ok(hold) = hold else {
                    if let Some(untold) = way.told.of(Some(peer.ip()), Cause::Connections, None) {
                        tracing::warn!(%peer, max = way.limits.connections_of_one, untold, "closed a connection: its address has too many (http.connections_per_address)");
                    }
                    continue;
                };
                let served = serve(stream, peer, way.clone(), ends.clone());
                tasks.spawn(ends.connections.track_future(async move {
                    served.await;
                    drop((permit, hold));
                }));
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections for a moment");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

fn is_of_one_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn serve(stream: TcpStream, peer: SocketAddr, way: Arc<Way>, ends: Ends) {
    // Nagle's algorithm would hold back the second part of each answer for 40 ms.
    let _ = stream.set_nodelay(true);
    let stream = Stalling::new(stream, way.limits.write_stall);
    let Some(acceptor) = &way.acceptor else { return talk(stream, peer, &way, &ends).await };
    let shaken = tokio::select! {
        () = ends.requests.cancelled() => return,
        shaken = tokio::time::timeout(way.limits.head, acceptor.accept(stream)) => shaken,
    };
    match shaken {
        Ok(Ok(stream)) => talk(stream, peer, &way, &ends).await,
        Ok(Err(error)) => tracing::debug!(%peer, %error, "a TLS handshake failed"),
        Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
    }
}

async fn talk(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, peer: SocketAddr, way: &Way, ends: &Ends) {
    let service = TowerToHyperService::new(way.router.clone().layer(Extension(Peer(peer))));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(way.limits.head).max_buf_size(way.limits.head_max);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = ends.requests.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => ended,
                () = ends.sockets.cancelled() => Ok(()),
            }
        }
    };
    if let Err(error) = ended {
        // The client was told so without us.
        if error.is_parse_too_large()
            && let Some(untold) = way.told.of(Some(peer.ip()), Cause::Head, None)
        {
            tracing::warn!(%peer, max = way.limits.head_max, untold, "refused a request whose head is too large (http.head_max)");
        }
        tracing::debug!(%peer, error = &error as &dyn std::error::Error, "an HTTP connection ended");
    }
}
