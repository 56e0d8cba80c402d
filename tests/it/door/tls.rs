//! The door behind a certificate.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use lattice_mcp::config::{self, HttpTls, OAuth, Secret};
use lattice_mcp::http;
use lattice_mcp::model::time::Span;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose};
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;

use super::lists;
use crate::http::Door;
use crate::lifecycle::eventually;
use crate::web::Wire;

/// Whoever signs certificates, and a folder for them.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: tempfile::TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap(), dir: tempfile::tempdir().unwrap() }
    }

    /// Puts a certificate for a name and its key into files.
    fn issue(&self, name: &str) -> HttpTls {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        let (cert_file, key_file) = (self.dir.path().join("door.pem"), self.dir.path().join("door.key"));
        std::fs::write(&cert_file, certificate.pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        HttpTls { cert: Some(cert_file), key: Some(key_file) }
    }

    /// Asks a server by a name that its certificate must have; the answer's first line.
    async fn ask(&self, at: SocketAddr, name: &'static str) -> std::io::Result<String> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.issuer.pem().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(roots).with_no_client_auth();
        let stream = tokio::net::TcpStream::connect(at).await?;
        let mut stream = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(name).unwrap(), stream).await?;
        stream.write_all(lists().with("Authorization", "Bearer s3cret").with("Connection", "close").text().as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }
}

fn with_tls(tls: HttpTls) -> config::Http {
    config::Http { tls, token: Some(Secret::new("s3cret")), reload_interval: Span::millis(50), ..Default::default() }
}

#[tokio::test]
async fn the_door_serves_tls_and_takes_up_a_new_certificate() {
    let authority = Authority::new();
    let door = Door::open(with_tls(authority.issue("one.example"))).await;
    assert!(door.url.starts_with("https://"), "{}", door.url);
    assert_eq!(authority.ask(door.at, "one.example").await.unwrap(), "HTTP/1.1 200 OK");
    assert!(authority.ask(door.at, "two.example").await.is_err(), "it is for another name");
    let mut plain = Wire::open(door.at).await;
    plain.send(lists().text()).await;
    assert!(!plain.rest().await.contains("HTTP/1.1 200"), "nothing is served without TLS");

    authority.issue("two.example");
    eventually("the new certificate is there", async || authority.ask(door.at, "two.example").await.ok()).await;
    door.close().await;
}

#[tokio::test]
async fn a_handshake_that_never_ends_holds_no_connection() {
    let authority = Authority::new();
    let config = config::Http { head_timeout: Span::millis(300), ..with_tls(authority.issue("one.example")) };
    let door = Door::open(config).await;
    let mut silent = Wire::open(door.at).await;
    assert!(silent.is_closed().await);
}

async fn refusal(config: config::Http) -> String {
    http::bind(&config, "0".parse().unwrap()).await.err().unwrap().to_string()
}

#[tokio::test]
async fn files_that_are_no_certificate_and_key_are_named() {
    let authority = Authority::new();
    let write = |name: &str, text: &str| {
        let file = authority.dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        Some(file)
    };
    let tls = authority.issue("one.example");
    let (cert, key) = (std::fs::read_to_string(tls.cert.as_ref().unwrap()).unwrap(), tls.key.clone());
    let other = KeyPair::generate().unwrap().serialize_pem();
    for (cert, key, said) in [
        (Some(Path::new("/nowhere/door.pem").to_owned()), key.clone(), "/nowhere/door.pem: "),
        (write("empty.pem", ""), key.clone(), "empty.pem: it has no certificate"),
        (write("good.pem", &cert), write("bad.key", "nonsense"), "bad.key: it has no private key"),
        (write("good.pem", &cert), write("other.key", &other), "other.key: it is not the key of"),
    ] {
        let error = refusal(with_tls(HttpTls { cert, key })).await;
        assert!(error.contains(said), "{error}");
    }
    let oauth = OAuth { issuer: Some("https://id.example".into()), ca: write("ca.pem", "nonsense"), ..OAuth::default() };
    let error = refusal(config::Http { oauth, ..Default::default() }).await;
    assert!(error.contains("ca.pem: it has no certificate"), "{error}");
}
