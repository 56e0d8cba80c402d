//! Fetching a small JSON document from an issuer: one request, bounded in time and size, with no redirects.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::header::{ACCEPT, HOST, USER_AGENT};
use http::{Request, StatusCode, Uri};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::http::Error;

/// Fetches documents.
pub(super) struct Fetch {
    tls: TlsConnector,
    timeout: Duration,
    max: usize,
}

impl Fetch {
    /// Trusts the system's authorities, and those of a file if one is given.
    pub(super) fn new(ca: Option<&Path>, timeout: Duration, max: usize) -> Result<Self, Error> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(file) = ca {
            let wrong = |reason: String| Error::Certificate { file: file.to_owned(), reason };
            let certificates: Result<Vec<CertificateDer<'_>>, _> =
                CertificateDer::pem_file_iter(file).map_err(|error| wrong(error.to_string()))?.collect();
            let (added, _) = roots.add_parsable_certificates(certificates.map_err(|error| wrong(error.to_string()))?);
            if added == 0 {
                return Err(wrong("it has no certificate that can be used".into()));
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::Tls(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { tls: TlsConnector::from(Arc::new(config)), timeout, max })
    }

    /// The document at an address.
    ///
    /// # Errors
    /// What went wrong, with the address.
    pub(super) async fn json(&self, place: &str) -> Result<Value, String> {
        let fetched = tokio::time::timeout(self.timeout, self.fetch(place)).await;
        let bytes =
            fetched.unwrap_or_else(|_| Err(format!("no answer within {:?}", self.timeout))).map_err(|why| format!("{place}: {why}"))?;
        serde_json::from_slice(&bytes).map_err(|error| format!("{place}: the answer is no JSON ({error})"))
    }

    async fn fetch(&self, place: &str) -> Result<bytes::Bytes, String> {
        let uri: Uri = place.parse().map_err(|_| "this is no address".to_owned())?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err("this is no address".into()) };
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        let is_plain = scheme == "http";
        let port = authority.port_u16().unwrap_or(if is_plain { 80 } else { 443 });
        let stream = TcpStream::connect((host.as_str(), port)).await.map_err(|error| format!("cannot connect: {error}"))?;
        let request = Request::get(uri.path_and_query().map_or("/", |path| path.as_str()))
            .header(HOST, authority.as_str())
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, concat!("lattice-mcp/", env!("CARGO_PKG_VERSION")))
            .body(Body::empty())
            .map_err(|error| error.to_string())?;
        if is_plain {
            return self.exchange(stream, request).await;
        }
        let name = ServerName::try_from(host).map_err(|error| error.to_string())?;
        let stream = self.tls.connect(name, stream).await.map_err(|error| format!("cannot connect: {error}"))?;
        self.exchange(stream, request).await
    }

    async fn exchange(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        request: Request<Body>,
    ) -> Result<bytes::Bytes, String> {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
            if response.status() != StatusCode::OK {
                return Err(format!("the answer is {}", response.status()));
            }
            let body = axum::body::to_bytes(Body::new(response.into_body()), self.max).await;
            body.map_err(|error| format!("the answer broke off or is larger than {} bytes ({error})", self.max))
        };
        let mut connection = std::pin::pin!(connection);
        let mut answer = std::pin::pin!(answer);
        let mut is_open = true;
        loop {
            tokio::select! {
                biased;
                answer = answer.as_mut() => return answer,
                // What it had received by its end is still there to read.
                _ = connection.as_mut(), if is_open => is_open = false,
            }
        }
    }
}
