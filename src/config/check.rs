//! What values must hold beyond their type; asked once, when the configuration is loaded.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::Config;
use crate::model::agent::RunnerSpec;
use crate::model::retry::Retried;
use crate::model::size::Size;
use crate::model::time::Span;

/// A key whose value cannot be taken, and what is expected of it.
pub(super) type Complaint = (&'static str, String);

/// The first complaint about these settings, if there is one.
pub(super) fn first(config: &Config) -> Option<Complaint> {
    complaints(config).into_iter().find(|(bad, _, _)| *bad).map(|(_, key, expected)| (key, expected))
}

fn complaints(config: &Config) -> Vec<(bool, &'static str, String)> {
    let Config { lattice, agents, runner, results, http, mcp, log } = config;
    let (work, retry, presence, storage) = (&lattice.work, &lattice.retry, &lattice.presence, &lattice.storage);
    let zero = Span::millis(0);
    let positive = |span: Span, key: &'static str| (span == zero, key, "a duration above 0s".to_owned());
    let counted = |n: u32, key: &'static str| (n == 0, key, "a number of at least 1".to_owned());
    let at_least = |size: Size, min: Size, key: &'static str| (size < min, key, format!("a size of at least {min}"));
    let mut all = vec![
        positive(work.default_timeout, "lattice.work.default_timeout"),
        (
            work.default_timeout > work.timeout_max,
            "lattice.work.default_timeout",
            format!("a duration of at most lattice.work.timeout_max, {}", work.timeout_max),
        ),
        (work.silence == Some(zero), "lattice.work.silence", "a duration above 0s".to_owned()),
        (work.queue_timeout == Some(zero), "lattice.work.queue_timeout", "a duration above 0s".to_owned()),
        counted(work.max_parallel, "lattice.work.max_parallel"),
        counted(work.queue_size, "lattice.work.queue_size"),
        counted(work.held_back_max, "lattice.work.held_back_max"),
        at_least(work.input_max, Size::kib(1), "lattice.work.input_max"),
        at_least(work.text_max, Size::kib(1), "lattice.work.text_max"),
        counted(work.progress_per_second, "lattice.work.progress_per_second"),
        (work.progress_interval < Span::millis(100), "lattice.work.progress_interval", "a duration of at least 100ms".to_owned()),
        (work.lease < Span::secs(2), "lattice.work.lease", "a duration of at least 2s".to_owned()),
        positive(work.answer_timeout, "lattice.work.answer_timeout"),
        positive(work.outcome_patience, "lattice.work.outcome_patience"),
        counted(work.questions_max, "lattice.work.questions_max"),
        (work.priority_max < 0, "lattice.work.priority_max", "a number of at least 0".to_owned()),
        positive(work.ageing, "lattice.work.ageing"),
        (!(1..=64).contains(&work.depth_max), "lattice.work.depth_max", "a number from 1 to 64".to_owned()),
        counted(work.children_max, "lattice.work.children_max"),
        counted(work.descendants_max, "lattice.work.descendants_max"),
        counted(work.after_max, "lattice.work.after_max"),
        positive(work.wait_max, "lattice.work.wait_max"),
        counted(work.map_max, "lattice.work.map_max"),
        counted(work.map_parallel, "lattice.work.map_parallel"),
        (work.recheck < Span::millis(100), "lattice.work.recheck", "a duration of at least 100ms".to_owned()),
        counted(retry.max_attempts, "lattice.retry.max_attempts"),
        (
            retry.initial_delay > retry.max_delay,
            "lattice.retry.initial_delay",
            format!("a duration of at most lattice.retry.max_delay, {}", retry.max_delay),
        ),
        (retry.jitter_percent > 100, "lattice.retry.jitter_percent", "a number from 0 to 100".to_owned()),
        (retry.on.contains(&Retried::Unknown), "lattice.retry.on", format!("some of {}", Retried::ALL.map(|(name, _)| name).join(", "))),
        positive(retry.quota_pause, "lattice.retry.quota_pause"),
        (
            retry.quota_pause > retry.quota_pause_max,
            "lattice.retry.quota_pause",
            format!("a duration of at most lattice.retry.quota_pause_max, {}", retry.quota_pause_max),
        ),
        positive(presence.heartbeat, "lattice.presence.heartbeat"),
        (
            presence.heartbeat >= presence.ttl,
            "lattice.presence.heartbeat",
            format!("a duration shorter than lattice.presence.ttl, {}", presence.ttl),
        ),
        positive(storage.max_age, "lattice.storage.max_age"),
        (
            storage.blob_max_age.get() <= work.timeout_max.get() + work.answer_timeout.get(),
            "lattice.storage.blob_max_age",
            format!(
                "a duration longer than lattice.work.timeout_max and answer_timeout together, {} and {}",
                work.timeout_max, work.answer_timeout
            ),
        ),
        at_least(storage.max_bytes, Size::mib(1), "lattice.storage.max_bytes"),
        (!(Size::bytes(1)..=Size::mib(16)).contains(&agents.file_max), "agents.file_max", format!("a size from 1 to {}", Size::mib(16))),
        counted(agents.count_max, "agents.count_max"),
        at_least(runner.output_max, Size::bytes(1), "runner.output_max"),
        at_least(runner.line_max, Size::kib(1), "runner.line_max"),
        at_least(runner.checked_max, Size::bytes(1), "runner.checked_max"),
        positive(runner.accept_timeout, "runner.accept_timeout"),
        at_least(runner.accept_output_max, Size::kib(1), "runner.accept_output_max"),
        (results.inline_max > Size::kib(64), "results.inline_max", format!("a size of at most {}", Size::kib(64))),
        at_least(results.selection_max, Size::bytes(1), "results.selection_max"),
        at_least(results.resource_max, Size::bytes(1), "results.resource_max"),
        positive(results.search_timeout, "results.search_timeout"),
        at_least(http.body_max, Size::kib(1), "http.body_max"),
        (http.bodies_max < http.body_max, "http.bodies_max", format!("a size of at least http.body_max, {}", http.body_max)),
        positive(http.session_idle, "http.session_idle"),
        counted(http.sessions_max, "http.sessions_max"),
        counted(http.sessions_per_principal, "http.sessions_per_principal"),
        counted(http.connections_max, "http.connections_max"),
        counted(http.connections_per_address, "http.connections_per_address"),
        counted(http.streams_max, "http.streams_max"),
        counted(http.streams_per_principal, "http.streams_per_principal"),
        counted(http.rate_per_address, "http.rate_per_address"),
        counted(http.rate_per_principal, "http.rate_per_principal"),
        counted(http.rate_refused, "http.rate_refused"),
        counted(http.refusals_told, "http.refusals_told"),
        (http.head_max < Size::kib(8) || http.head_max > Size::mib(1), "http.head_max", "a size from 8KiB to 1MiB".to_owned()),
        positive(http.head_timeout, "http.head_timeout"),
        positive(http.body_stall, "http.body_stall"),
        positive(http.body_timeout, "http.body_timeout"),
        positive(http.write_stall, "http.write_stall"),
        (http.reload_interval < Span::millis(50), "http.reload_interval", "a duration of at least 50ms".to_owned()),
        (http.oauth.algorithms.is_empty(), "http.oauth.algorithms", "at least one of RS256, PS256, ES256, ES384, EdDSA".to_owned()),
        (http.oauth.skew > Span::secs(600), "http.oauth.skew", "a duration of at most 10m".to_owned()),
        positive(http.oauth.jwks_max_age, "http.oauth.jwks_max_age"),
        positive(http.oauth.jwks_stale_max, "http.oauth.jwks_stale_max"),
        positive(http.oauth.jwks_pause, "http.oauth.jwks_pause"),
        positive(http.oauth.jwks_timeout, "http.oauth.jwks_timeout"),
        (
            http.oauth.jwks_max < Size::kib(1) || http.oauth.jwks_max > Size::mib(16),
            "http.oauth.jwks_max",
            "a size from 1KiB to 16MiB".to_owned(),
        ),
        (mcp.await_default > mcp.await_max, "mcp.await_default", format!("a duration of at most mcp.await_max, {}", mcp.await_max)),
        positive(mcp.await_max, "mcp.await_max"),
        counted(mcp.works_max, "mcp.works_max"),
        (
            mcp.workspace.as_ref().is_some_and(|name| !(1..=256).contains(&name.trim().chars().count())),
            "mcp.workspace",
            "a name of 1 to 256 characters".to_owned(),
        ),
        positive(mcp.form_timeout, "mcp.form_timeout"),
        (mcp.task_ttl < Span::secs(60), "mcp.task_ttl", "a duration of at least 1m".to_owned()),
        (mcp.task_poll < Span::millis(10), "mcp.task_poll", "a duration of at least 10ms".to_owned()),
        at_least(mcp.line_max, Size::kib(1), "mcp.line_max"),
    ];
    all.extend(texts(config));
    let filter = tracing_subscriber::EnvFilter::try_new(&log.filter);
    if let Err(error) = filter {
        all.push((true, "log.filter", format!("a filter like warn or lattice_mcp=debug ({error})")));
    }
    all
}

fn texts(config: &Config) -> Vec<(bool, &'static str, String)> {
    let http = &config.http;
    let token = http.token.as_ref().map(super::Secret::expose);
    let command_empty = matches!(&config.agents.default_runner, Some(RunnerSpec::Command(command)) if command.command.first().is_none_or(|program| program.trim().is_empty()));
    let (nats, auth) = (&config.lattice.nats, &config.lattice.nats.auth);
    let ways = [auth.user.is_some(), auth.token.is_some(), auth.creds_file.is_some(), auth.nkey_file.is_some()];
    let variable = |name: &String| !name.is_empty() && !name.contains(['=', '\0']);
    vec![
        (
            http.listen.as_deref().is_some_and(|listen| address(listen).is_err()),
            "http.listen",
            "an address like 127.0.0.1:8765, [::1]:8765, :8765 or 8765 (a bare port binds loopback)".to_owned(),
        ),
        (
            token.is_some_and(|token| token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic())),
            "http.token",
            "a text of visible ASCII characters without spaces, as it must fit into a header".to_owned(),
        ),
        (
            !http.allowed_origins.iter().all(|origin| is_origin(origin)),
            "http.allowed_origins",
            "origins like https://app.example or http://localhost:3000, without a path".to_owned(),
        ),
        (
            !http.allowed_hosts.iter().all(|host| is_host(host)),
            "http.allowed_hosts",
            "host names like lattice.example or lattice.example:8765, without a scheme or path".to_owned(),
        ),
        (
            http.public_url.as_deref().is_some_and(|url| !is_origin(url.trim_end_matches('/'))),
            "http.public_url",
            "an address like https://lattice.example, without a path".to_owned(),
        ),
        (
            http.oauth.issuer.as_deref().is_some_and(|url| !is_trustworthy(url)),
            "http.oauth.issuer",
            "an address like https://id.example or https://id.example/realms/one (http only on this machine)".to_owned(),
        ),
        (
            http.oauth.jwks_uri.as_deref().is_some_and(|url| !is_trustworthy(url)),
            "http.oauth.jwks_uri",
            "an address like https://id.example/keys (http only on this machine)".to_owned(),
        ),
        (
            http.oauth.issuer.is_none() && http.oauth.jwks_uri.is_some(),
            "http.oauth.jwks_uri",
            "http.oauth.issuer beside it: the issuer that its tokens must name".to_owned(),
        ),
        (http.tls.cert.is_some() != http.tls.key.is_some(), "http.tls.key", "both http.tls.cert and http.tls.key, or neither".to_owned()),
        (!config.runner.env_pass.iter().all(variable), "runner.env_pass", "names of variables, without values".to_owned()),
        (
            nats.url.as_deref().is_some_and(|url| !nats.is_embedded() && !url.split(',').all(is_server)),
            "lattice.nats.url",
            "embedded, or addresses like nats://host:4222 or tls://host:4222, with commas between them".to_owned(),
        ),
        (
            ways.iter().filter(|way| **way).count() > 1,
            "lattice.nats.auth",
            "one of user and password, token, creds_file and nkey_file".to_owned(),
        ),
        (
            auth.user.is_some() != auth.password.is_some(),
            "lattice.nats.auth.password",
            "both lattice.nats.auth.user and lattice.nats.auth.password, or neither".to_owned(),
        ),
        (
            nats.tls.cert.is_some() != nats.tls.key.is_some(),
            "lattice.nats.tls.key",
            "both lattice.nats.tls.cert and lattice.nats.tls.key, or neither".to_owned(),
        ),
        (!matches!(nats.replicas, 1 | 3 | 5), "lattice.nats.replicas", "1, 3 or 5".to_owned()),
        (nats.ping_interval < Span::millis(500), "lattice.nats.ping_interval", "a duration of at least 500ms".to_owned()),
        (nats.request_timeout < Span::millis(100), "lattice.nats.request_timeout", "a duration of at least 100ms".to_owned()),
        (nats.connect_timeout < Span::millis(100), "lattice.nats.connect_timeout", "a duration of at least 100ms".to_owned()),
        (nats.body_inline_max < Size::kib(1), "lattice.nats.body_inline_max", "a size of at least 1KiB".to_owned()),
        (command_empty, "agents.default_runner", "a runner whose command names a program".to_owned()),
    ]
}

/// Where a text says to listen.
///
/// # Errors
/// What an address looks like.
pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    let text = text.trim();
    let port = text.strip_prefix(':').unwrap_or(text);
    if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) {
        let port = port.parse::<u16>().map_err(|_| format!("{port:?} is not a port: it goes up to 65535"))?;
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    let named = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
    named.as_deref().unwrap_or(text).parse().map_err(|_| format!("{text:?} is not an address: write it like 127.0.0.1:8765 or :8765"))
}

/// Whether a text is the address of a NATS server.
fn is_server(text: &str) -> bool {
    let text = text.trim();
    let rest = match text.split_once("://") {
        Some(("nats" | "tls", rest)) => rest,
        Some(_) => return false,
        None => text,
    };
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    is_host(host)
}

fn is_origin(text: &str) -> bool {
    let Some((scheme, rest)) = text.split_once("://") else { return false };
    let scheme_ok = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
    scheme_ok && is_host(rest)
}

/// Whether what is read there can be trusted to be the issuer's: over TLS, or on this machine.
pub(crate) fn is_trustworthy(text: &str) -> bool {
    let Some((scheme, rest)) = text.split_once("://") else { return false };
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let loopback = || {
        let name = host.parse::<http::uri::Authority>().map(|authority| authority.host().trim_matches(['[', ']']).to_owned());
        name.is_ok_and(|name| name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()))
    };
    let path_ok = path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
    is_host(host) && path_ok && (scheme == "https" || (scheme == "http" && loopback()))
}

fn is_host(text: &str) -> bool {
    let authority: Result<http::uri::Authority, _> = text.parse();
    let port_ok = |authority: &http::uri::Authority| {
        let after = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
        after.is_empty() || authority.port_u16().is_some()
    };
    authority.is_ok_and(|authority| !authority.as_str().contains(['@', '*']) && !authority.host().is_empty() && port_ok(&authority))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_port_binds_loopback() {
        for (text, address_there) in [
            (":8765", "127.0.0.1:8765"),
            ("8765", "127.0.0.1:8765"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("[::1]:8765", "[::1]:8765"),
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("localhost:80", "127.0.0.1:80"),
        ] {
            assert_eq!(address(text).map(|address| address.to_string()), Ok(address_there.to_owned()));
        }
        for bad in ["", ":", "x", "70000", "127.0.0.1", "::1:x", "http://127.0.0.1:80", "a.example:80"] {
            assert!(address(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn origins_are_scheme_host_and_port() {
        for good in ["https://app.example", "http://localhost:3000", "http://[::1]:80", "vscode-webview://abc"] {
            assert!(is_origin(good), "{good:?} was refused");
        }
        for bad in
            ["", "*", "app.example", "https://", "https://a/", "https://a/b", "https://a:x", "https://a:", "https://u@a", "https://*.a"]
        {
            assert!(!is_origin(bad), "{bad:?} was taken");
        }
    }

    #[test]
    fn an_issuer_is_read_over_tls_or_on_this_machine() {
        for good in
            ["https://id.example", "https://id.example:8443/realms/one", "http://127.0.0.1:80/x", "http://[::1]:1", "http://localhost"]
        {
            assert!(is_trustworthy(good), "{good:?} was refused");
        }
        for bad in ["", "id.example", "http://id.example", "ftp://id.example", "https://", "https://u@id.example", "https://id.example/#x"]
        {
            assert!(!is_trustworthy(bad), "{bad:?} was taken");
        }
    }

    #[test]
    fn the_defaults_hold() {
        assert_eq!(first(&Config::default()), None);
    }
}
