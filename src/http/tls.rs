//! The certificate of the door, read again when its files change.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio_rustls::TlsAcceptor;

use super::Error;
use crate::config;

/// A certificate and its key, as they stand in their files.
#[derive(Debug)]
pub(super) struct Certificate {
    cert: PathBuf,
    key: PathBuf,
    kept: RwLock<Kept>,
    /// What was wrong at the last look, and at how many in a row.
    trouble: Mutex<Option<(String, u64)>>,
}

#[derive(Debug)]
struct Kept {
    certified: Arc<CertifiedKey>,
    bytes: (Vec<u8>, Vec<u8>),
}

impl Certificate {
    /// The certificate of the settings, if there is one.
    pub(super) fn open(config: &config::HttpTls) -> Result<Option<Arc<Self>>, Error> {
        let (Some(cert), Some(key)) = (&config.cert, &config.key) else { return Ok(None) };
        let bytes = read(cert, key)?;
        let certified = certified(cert, key, &bytes)?;
        Ok(Some(Arc::new(Self {
            cert: cert.clone(),
            key: key.clone(),
            kept: RwLock::new(Kept { certified, bytes }),
            trouble: Mutex::default(),
        })))
    }

    /// What connections are wrapped with.
    pub(super) fn acceptor(self: &Arc<Self>) -> Result<TlsAcceptor, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::Tls(error.to_string()))?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }

    /// Reads the files again, if they have changed; a pair that does not fit leaves the one of before in its place.
    pub(super) fn refresh(&self) {
        let renewed = read(&self.cert, &self.key).and_then(|bytes| {
            if self.kept.read().unwrap_or_else(PoisonError::into_inner).bytes == bytes {
                return Ok(None);
            }
            // Of a pair that is being replaced one half may stand there alone for a moment: it is looked at again.
            certified(&self.cert, &self.key, &bytes).map(|certified| Some(Kept { certified, bytes }))
        });
        let looks = self.looks(renewed.as_ref().err());
        match renewed {
            Ok(None) => {}
            Ok(Some(renewed)) => {
                *self.kept.write().unwrap_or_else(PoisonError::into_inner) = renewed;
                tracing::info!(cert = %self.cert.display(), "read the certificate again");
            }
            // The other half of a pair comes within a look; what is still so at the next is a mistake, and said once.
            Err(error) if looks == 2 => tracing::warn!(%error, "the certificate cannot be read again: the one of before stays"),
            Err(error) => tracing::debug!(%error, "the certificate of before stays"),
        }
    }

    /// At how many looks in a row this was wrong.
    fn looks(&self, trouble: Option<&Error>) -> u64 {
        let mut kept = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(text) = trouble.map(ToString::to_string) else {
            *kept = None;
            return 0;
        };
        let looks = kept.as_ref().filter(|(before, _)| *before == text).map_or(1, |(_, looks)| looks + 1);
        *kept = Some((text, looks));
        looks
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.kept.read().unwrap_or_else(PoisonError::into_inner).certified.clone())
    }
}

fn read(cert: &PathBuf, key: &PathBuf) -> Result<(Vec<u8>, Vec<u8>), Error> {
    let read = |file: &PathBuf| std::fs::read(file).map_err(|error| Error::Certificate { file: file.clone(), reason: error.to_string() });
    Ok((read(cert)?, read(key)?))
}

fn certified(cert: &PathBuf, key: &PathBuf, bytes: &(Vec<u8>, Vec<u8>)) -> Result<Arc<CertifiedKey>, Error> {
    let wrong = |file: &PathBuf, reason: String| Error::Certificate { file: file.clone(), reason };
    let chain: Result<Vec<CertificateDer<'static>>, _> = CertificateDer::pem_slice_iter(&bytes.0).collect();
    let chain = chain.map_err(|error| wrong(cert, error.to_string()))?;
    if chain.is_empty() {
        return Err(wrong(cert, "it has no certificate: PEM is expected, our own first".into()));
    }
    let private = PrivateKeyDer::from_pem_slice(&bytes.1).map_err(|error| wrong(key, format!("it has no private key in PEM ({error})")))?;
    let signing = rustls::crypto::ring::sign::any_supported_type(&private).map_err(|error| wrong(key, error.to_string()))?;
    let certified = CertifiedKey::new(chain, signing);
    certified.keys_match().map_err(|error| wrong(key, format!("it is not the key of {}: {error}", cert.display())))?;
    Ok(Arc::new(certified))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertifiedKey, generate_simple_self_signed};

    use super::*;

    #[test]
    fn a_pair_that_cannot_be_used_leaves_the_one_of_before() {
        let dir = tempfile::tempdir().unwrap();
        let [cert, key] = ["door.pem", "door.key"].map(|name| dir.path().join(name));
        let made = |name: &str| generate_simple_self_signed([name.to_owned()]).unwrap();
        let write = |made: &CertifiedKey<rcgen::KeyPair>| {
            std::fs::write(&cert, made.cert.pem()).unwrap();
            std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        };
        let (one, two) = (made("one.example"), made("two.example"));
        write(&one);
        let certificate = Certificate::open(&config::HttpTls { cert: Some(cert.clone()), key: Some(key.clone()) }).unwrap().unwrap();
        let served = || certificate.kept.read().unwrap().certified.cert[0].clone();
        for broken in ["nonsense", "", &two.signing_key.serialize_pem()] {
            std::fs::write(&key, broken).unwrap();
            for _ in 0..3 {
                certificate.refresh();
            }
            assert_eq!(served(), *one.cert.der(), "{broken}");
        }
        std::fs::remove_file(&cert).unwrap();
        certificate.refresh();
        assert_eq!(served(), *one.cert.der());
        write(&two);
        certificate.refresh();
        assert_eq!(served(), *two.cert.der());
    }
}
