//! What fuzzing does with what comes through the HTTP door.

use http::header::{self, HeaderMap, HeaderValue};

use super::door::Rules;
use super::intake::look;
use super::proxies::Proxies;
use crate::config;
use crate::model::access::Scope;

/// The names of hosts and origins, in headers and in the settings.
pub(crate) fn names(text: &str) {
    let (Ok(listen), Ok(address)) = ("127.0.0.1:1".parse(), "127.0.0.1:1".parse()) else { return };
    let Ok(rules) = Rules::new(&config::Http::default(), &listen, address) else { panic!("the default rules hold") };
    if let Ok(value) = HeaderValue::from_str(text) {
        let of = |name| HeaderMap::from_iter([(name, value.clone())]);
        let known = rules.host(&of(header::HOST)).is_ok();
        let is_address = text.chars().all(|c| c.is_ascii_hexdigit() || ".:[]".contains(c));
        assert!(!known || is_address || text.to_ascii_lowercase().contains("localhost"), "{text:?} is let in");
        assert!(rules.origin(&of(header::ORIGIN)).is_err(), "no origin is allowed, and {text:?} is let in");
    }
    let allowed = config::Http { allowed_hosts: vec![text.into()], allowed_origins: vec![text.into()], ..config::Http::default() };
    let _ = Rules::new(&allowed, &listen, address);
}

/// What a client says of itself, before its proxy adds whom it comes from.
pub(crate) fn hops(text: &str) {
    let (Ok(proxy), Ok(client), Ok(network)) = ("10.0.0.1".parse(), "203.0.113.7".parse(), "10.0.0.0/8".parse()) else { return };
    let proxies = Proxies::new(&[network]);
    for (name, added) in [("x-forwarded-for", ", 203.0.113.7"), ("forwarded", ", for=203.0.113.7")] {
        let Ok(value) = HeaderValue::from_str(&format!("{text}{added}")) else { continue };
        let headers = HeaderMap::from_iter([(header::HeaderName::from_static(name), value)]);
        let found = proxies.client(proxy, &headers);
        assert!(found == client || found == proxy, "{text:?} makes somebody {found}");
        assert_eq!(proxies.client(client, &headers), client, "who is no proxy is themself");
    }
}

/// A request's body.
pub(crate) fn body(bytes: &[u8]) {
    if let Ok(look) = look(bytes, |_, _| Scope::Read) {
        assert!(serde_json::from_slice::<serde::de::IgnoredAny>(bytes).is_ok(), "only JSON is looked at");
        assert!(!(look.modern && look.initialize), "what opens a session has one");
    }
}
