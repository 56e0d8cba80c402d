//! Addresses to listen on, as people write them.

use std::net::SocketAddr;
use std::str::FromStr;

use super::Error;

/// Where to listen: a bare port means this machine only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    host: String,
    port: u16,
}

impl Listen {
    /// The host as it was written, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port; 0 takes any free one.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// All addresses of the host, at least one.
    pub(super) async fn addresses(&self) -> Result<Vec<SocketAddr>, Error> {
        let found = tokio::net::lookup_host((self.host.as_str(), self.port)).await;
        let mut addresses: Vec<_> = found.map_err(|source| Error::Resolve(self.host.clone(), source))?.collect();
        // `localhost` is both ::1 and 127.0.0.1, and more clients try the latter.
        addresses.sort_by_key(SocketAddr::is_ipv6);
        if addresses.is_empty() {
            return Err(Error::Resolve(self.host.clone(), std::io::Error::other("the name has no address")));
        }
        Ok(addresses)
    }
}

impl FromStr for Listen {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || Error::Listen(text.to_owned());
        let trimmed = text.trim();
        let (host, port) = trimmed.rsplit_once(':').unwrap_or(("", trimmed));
        if !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let port = port.parse().map_err(|_| wrong())?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().map_err(|_| wrong())?.to_string(),
            None if host.is_empty() => "127.0.0.1".to_owned(),
            None if is_name(host) => host.to_owned(),
            None => return Err(wrong()),
        };
        Ok(Self { host, port })
    }
}

fn is_name(host: &str) -> bool {
    host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_port_means_this_machine_only() {
        for text in ["8765", ":8765", " :8765 "] {
            let listen: Listen = text.parse().unwrap();
            assert_eq!((listen.host(), listen.port()), ("127.0.0.1", 8765), "{text}");
        }
    }

    #[test]
    fn hosts_are_names_or_addresses() {
        for (text, host, port) in [
            ("127.0.0.1:0", "127.0.0.1", 0),
            ("[::1]:80", "::1", 80),
            ("[::]:1", "::", 1),
            ("0.0.0.0:8765", "0.0.0.0", 8765),
            ("my-box.local:9", "my-box.local", 9),
        ] {
            let listen: Listen = text.parse().unwrap();
            assert_eq!((listen.host(), listen.port()), (host, port), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", ":", "localhost", "host:", "::1:80", "[::1]", "[x]:1", "http://a:1", "a/b:1", ":65536", ":-1", ":+1", "*:80"] {
            let error = text.parse::<Listen>().unwrap_err().to_string();
            assert!(error.contains("127.0.0.1:8765"), "{text}: {error}");
        }
    }
}
