//! What fuzzing does with what comes through the HTTP door.

use http::header::{self, HeaderMap, HeaderValue};

use super::door::Rules;
use super::intake::look;
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

/// A request's body.
pub(crate) fn body(bytes: &[u8]) {
    if let Ok(look) = look(bytes, |_, _| Scope::Read) {
        assert!(serde_json::from_slice::<serde::de::IgnoredAny>(bytes).is_ok(), "only JSON is looked at");
        assert!(!(look.modern && look.initialize), "what opens a session has one");
    }
}
