//! Whose a request is that comes through a proxy: what trusted proxies say of it, and nothing that others may have made up.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use http::header::{FORWARDED, HeaderMap, HeaderName};

use crate::config::Network;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The proxies whose word counts.
#[derive(Debug, Clone)]
pub(super) struct Proxies(Vec<Network>);

/// The addresses that one header names, from the client on; what cannot be read is none.
type Hops = Vec<Option<IpAddr>>;

impl Proxies {
    pub(super) fn new(trusted: &[Network]) -> Self {
        Self(trusted.to_vec())
    }

    pub(super) fn trust(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(address))
    }

    /// The address that a request comes from: its peer's, or the nearest one behind trusted proxies that is none of theirs.
    ///
    /// A proxy writes one of the two headers and hands the other on as its client sent it. So where both are there and say different
    /// things, neither counts.
    pub(super) fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        if !self.trust(peer) {
            return peer;
        }
        let said =
            |name: &HeaderName, read: fn(&str) -> Hops| headers.contains_key(name).then(|| self.behind(peer, hops(headers, name, read)));
        match (said(&X_FORWARDED_FOR, listed), said(&FORWARDED, forwarded)) {
            (Some(one), Some(other)) if one != other => peer,
            (Some(one), _) | (None, Some(one)) => one,
            (None, None) => peer,
        }
    }

    /// Goes back from the peer for as long as proxies of ours speak; behind what cannot be read nobody is known.
    fn behind(&self, peer: IpAddr, hops: Hops) -> IpAddr {
        let mut nearest = peer;
        for hop in hops.into_iter().rev() {
            match hop {
                Some(address) if self.trust(address) => nearest = address,
                Some(address) => return address,
                None => return nearest,
            }
        }
        nearest
    }
}

/// What all headers of a name say: several are one list.
fn hops(headers: &HeaderMap, name: &HeaderName, read: fn(&str) -> Hops) -> Hops {
    headers.get_all(name).iter().flat_map(|value| value.to_str().map_or_else(|_| vec![None], read)).collect()
}

/// `X-Forwarded-For: 203.0.113.7, 10.0.0.1`
fn listed(text: &str) -> Hops {
    text.split(',').map(str::trim).filter(|hop| !hop.is_empty()).map(address).collect()
}

/// `Forwarded: for=203.0.113.7;proto=https, for="[2001:db8::1]:4711"` (RFC 7239)
fn forwarded(text: &str) -> Hops {
    let Some(elements) = parts(text, ',') else { return vec![None] };
    elements.into_iter().filter(|element| !element.trim().is_empty()).map(sender).collect()
}

/// For whom an element of `Forwarded` was sent on.
fn sender(element: &str) -> Option<IpAddr> {
    let pairs = parts(element, ';')?.into_iter().filter_map(|pair| pair.split_once('='));
    let mut named = pairs.filter(|(name, _)| name.trim().eq_ignore_ascii_case("for")).map(|(_, value)| value.trim());
    let (value, None) = (named.next()?, named.next()) else { return None };
    address(value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value))
}

/// The parts of a text between separators that stand in no quoted string; none when one has no end.
fn parts(text: &str, separator: char) -> Option<Vec<&str>> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    let found = text.split(|c| {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' if is_quoted => is_escaped = true,
            '"' => is_quoted = !is_quoted,
            _ => return c == separator && !is_quoted,
        }
        false
    });
    let found = found.collect();
    (!is_quoted).then_some(found)
}

/// An address, with or without a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = || text.strip_prefix('[')?.strip_suffix(']')?.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    let with_port = || text.parse::<SocketAddr>().ok().map(|at| at.ip());
    Some(text.parse().ok().or_else(with_port).or_else(bare)?.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROXY: &str = "10.0.0.1";

    fn client_of(peer: &str, headers: &[(&str, &str)]) -> String {
        let proxies = Proxies::new(&["10.0.0.0/8", "2001:db8:aaaa::/48"].map(|network| network.parse().unwrap()));
        let mut given = HeaderMap::new();
        for (name, value) in headers {
            given.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), http::HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        proxies.client(peer.parse().unwrap(), &given).to_string()
    }

    #[test]
    fn the_nearest_address_that_is_no_trusted_proxy_is_the_clients() {
        for (said, client) in [
            ("203.0.113.7", "203.0.113.7"),
            ("6.6.6.6, 203.0.113.7", "203.0.113.7"),
            ("6.6.6.6, 203.0.113.7, 10.2.3.4", "203.0.113.7"),
            ("203.0.113.7:51234", "203.0.113.7"),
            (" 203.0.113.7 , , ", "203.0.113.7"),
            ("2001:db8::7", "2001:db8::7"),
            ("[2001:db8::7]", "2001:db8::7"),
            ("[2001:db8::7]:443, 2001:db8:aaaa::1", "2001:db8::7"),
            ("::ffff:203.0.113.7", "203.0.113.7"),
            // Nobody but proxies: the first of them asks for itself.
            ("10.7.7.7, 10.2.3.4", "10.7.7.7"),
            // Behind what cannot be read nobody is known.
            ("", PROXY),
            ("unknown", PROXY),
            ("203.0.113.7, nonsense", PROXY),
            ("203.0.113.7, 1.2.3.4.5, 10.2.3.4", "10.2.3.4"),
            ("203.0.113.7\u{e9}", PROXY),
            ("203.0.113.7 6.6.6.6", PROXY),
        ] {
            assert_eq!(client_of(PROXY, &[("x-forwarded-for", said)]), client, "{said:?}");
            assert_eq!(client_of("198.51.100.1", &[("x-forwarded-for", said)]), "198.51.100.1", "a stranger says {said:?}");
        }
        assert_eq!(client_of("::ffff:10.0.0.1", &[("x-forwarded-for", "203.0.113.7")]), "203.0.113.7");
        assert_eq!(client_of(PROXY, &[]), PROXY);
    }

    #[test]
    fn several_headers_are_one_list() {
        let line = |value| ("x-forwarded-for", value);
        assert_eq!(client_of(PROXY, &[line("6.6.6.6"), line("203.0.113.7"), line("10.2.3.4")]), "203.0.113.7");
        let mut many = vec![line("6.6.6.6, 10.1.1.1"); 5000];
        many.push(line("203.0.113.7"));
        assert_eq!(client_of(PROXY, &many), "203.0.113.7");
    }

    #[test]
    fn the_standard_header_counts_as_well() {
        for (said, client) in [
            ("for=203.0.113.7", "203.0.113.7"),
            ("For=6.6.6.6, proto=https;FOR=\"203.0.113.7:80\";by=10.0.0.1", "203.0.113.7"),
            ("for=\"[2001:db8::7]:4711\", for=10.2.3.4;host=\"a,b;for=6.6.6.6\"", "2001:db8::7"),
            ("for=203.0.113.7;host=\"a\\\"b, for=6.6.6.6\"", "203.0.113.7"),
            ("for=203.0.113.7, for=_hidden", PROXY),
            ("for=unknown", PROXY),
            ("proto=https", PROXY),
            ("for=6.6.6.6;for=203.0.113.7", PROXY),
            // A client may leave a string open, so that what its proxy adds is part of it.
            ("for=6.6.6.6;x=\", for=203.0.113.7", PROXY),
            ("for=6.6.6.6;x=\", for=\"[2001:db8::7]\"", PROXY),
            ("for=6.6.6.6;x=\"\\, for=203.0.113.7", PROXY),
            ("", PROXY),
        ] {
            assert_eq!(client_of(PROXY, &[("forwarded", said)]), client, "{said:?}");
            assert_eq!(client_of("198.51.100.1", &[("forwarded", said)]), "198.51.100.1", "a stranger says {said:?}");
        }
    }

    #[test]
    fn headers_that_contradict_each_other_count_for_nothing() {
        let both = |listed, standard| client_of(PROXY, &[("x-forwarded-for", listed), ("forwarded", standard)]);
        assert_eq!(both("203.0.113.7", "for=6.6.6.6"), PROXY, "the client wrote one of them");
        assert_eq!(both("6.6.6.6", "for=203.0.113.7"), PROXY);
        assert_eq!(both("203.0.113.7", "for=203.0.113.7"), "203.0.113.7");
    }
}
