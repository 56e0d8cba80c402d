//! Networks of addresses, as people write them: `10.0.0.0/8`, `2001:db8::/32`, or one address alone.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A network of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network {
    base: IpAddr,
    bits: u8,
}

/// A text is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no network: write an address or a network like 10.0.0.7, 10.0.0.0/8 or 2001:db8::/32")]
pub struct Error(String);

impl Network {
    /// Whether an address is one of this network's.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.base, address.to_canonical()) {
            (IpAddr::V4(base), IpAddr::V4(address)) => (base.to_bits() ^ address.to_bits()) >> (32 - self.bits) == 0,
            (IpAddr::V6(base), IpAddr::V6(address)) => (base.to_bits() ^ address.to_bits()) >> (128 - self.bits) == 0,
            _ => false,
        }
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl FromStr for Network {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error(text.chars().take(60).collect());
        let (address, bits) = text.trim().split_once('/').map_or((text.trim(), None), |(address, bits)| (address, Some(bits)));
        let base = address.parse::<IpAddr>().map_err(|_| bad())?.to_canonical();
        let bits = match bits {
            None => width(base),
            Some(bits) if bits.bytes().all(|byte| byte.is_ascii_digit()) => bits.parse().map_err(|_| bad())?,
            Some(_) => return Err(bad()),
        };
        // What holds every address names nobody.
        if (1..=width(base)).contains(&bits) { Ok(Self { base, bits }) } else { Err(bad()) }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.bits == width(self.base) { self.base.fmt(f) } else { write!(f, "{}/{}", self.base, self.bits) }
    }
}

impl TryFrom<String> for Network {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(network: &str, address: &str) -> bool {
        network.parse::<Network>().unwrap().contains(address.parse().unwrap())
    }

    #[test]
    fn a_network_holds_its_addresses_and_no_others() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.1"),
            ("192.168.1.7", "192.168.1.7", "192.168.1.8"),
            ("10.1.2.3/31", "10.1.2.2", "10.1.2.4"),
            ("128.0.0.0/1", "255.255.255.255", "127.255.255.255"),
            ("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::1"),
            ("::1", "::1", "::2"),
            ("10.0.0.0/8", "::ffff:10.9.9.9", "::10.9.9.9"),
            ("::ffff:10.0.0.7", "10.0.0.7", "10.0.0.8"),
            ("8000::/1", "ffff::", "127.0.0.1"),
        ] {
            assert!(holds(network, inside), "{inside} in {network}");
            assert!(!holds(network, outside), "{outside} in {network}");
        }
    }

    #[test]
    fn what_is_no_network_is_refused() {
        let bad = ["", "/8", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/+8", "10.0.0/8", "::/129", "10.0.0.0/8/8", "proxy"];
        for bad in bad.into_iter().chain(["0.0.0.0/0", "::/0", "::ffff:10.0.0.0/104", "[::1]", "10.0.0.1:80", "*"]) {
            assert!(bad.parse::<Network>().is_err(), "{bad:?} was taken");
        }
        for good in ["10.0.0.0/8", "::1", "2001:db8::/32"] {
            assert_eq!(good.parse::<Network>().unwrap().to_string(), good);
        }
    }
}
