//! Clients behind a proxy: each is itself where the proxy is trusted, and nobody is whom they say they are where it is not.

use std::net::SocketAddr;

use lattice_mcp::config;

use super::{ANN, by, lists, tokens_file, with_tokens};
use crate::http::Door;
use crate::web::{Ask, Wire};

fn behind(proxies: &[&str]) -> config::Http {
    let trusted_proxies = proxies.iter().map(|proxy| proxy.parse().unwrap()).collect();
    config::Http { trusted_proxies, rate_per_address: 5, ..Default::default() }
}

/// What becomes of sixty requests at once, the nth of them with what `named` says.
async fn flood(at: SocketAddr, named: impl Fn(u32) -> Ask) -> Vec<u16> {
    let asks: Vec<_> = (0..60).map(&named).collect();
    futures_util::future::join_all(asks.iter().map(|ask| ask.at(at))).await.iter().map(|reply| reply.status()).collect()
}

fn slowed(statuses: &[u16]) -> usize {
    statuses.iter().filter(|status| **status == 429).count()
}

fn said_of(door: &Door, cause: &str) -> Vec<String> {
    let turned = door.turned.lock().unwrap();
    let mut peers: Vec<_> = turned.iter().filter(|turned| turned.cause == cause).map(|turned| turned.peer.clone()).collect();
    peers.dedup();
    peers
}

#[tokio::test]
async fn each_client_of_a_trusted_proxy_has_limits_of_its_own() {
    for (header, one, other) in [
        ("X-Forwarded-For", "203.0.113.7", "203.0.113.8"),
        ("Forwarded", "for=203.0.113.7;proto=https", "for=203.0.113.8"),
        ("X-Forwarded-For", "2001:db8:1:2::7", "2001:db8:1:3::7"),
        ("Forwarded", "for=\"[2001:db8:1:2::7]:443\"", "for=\"[2001:db8:1:3::7]\""),
    ] {
        let door = Door::open(behind(&["127.0.0.0/8"])).await;
        // Before its own address stands whatever it has written there itself.
        let made_up = if header == "Forwarded" { "for=198.51.100." } else { "198.51.100." };
        let statuses = flood(door.at, |n| lists().with(header, &format!("{made_up}{n}, {one}"))).await;
        assert!(slowed(&statuses) >= 20, "{header}: {statuses:?}");
        assert_eq!(lists().with(header, other).at(door.at).await.status(), 200, "{header}: others are not slowed");
        let said = said_of(&door, "rate");
        assert!(said.iter().any(|peer| one.contains(peer.as_str())) && !said.iter().any(|peer| other.contains(peer.as_str())), "{said:?}");
    }
}

#[tokio::test]
async fn what_anybody_else_says_of_whom_they_bring_counts_for_nothing() {
    for proxies in [&[][..], &["10.0.0.0/8", "::1"]] {
        let door = Door::open(behind(proxies)).await;
        let named = |n| lists().with("X-Forwarded-For", &format!("203.0.113.{n}")).with("Forwarded", &format!("for=203.0.113.{n}"));
        assert!(slowed(&flood(door.at, named).await) >= 20, "{proxies:?}");
        assert_eq!(said_of(&door, "rate"), ["127.0.0.1"], "{proxies:?}");
    }
}

#[tokio::test]
async fn what_a_proxy_says_that_cannot_be_read_or_not_be_so_is_the_proxys_own() {
    for (listed, standard) in [("nonsense", ""), ("203.0.113.7, _hidden", ""), ("203.0.113.1", "for=6.6.6.6"), ("", "for=\"203.0.113.1")] {
        let door = Door::open(behind(&["127.0.0.1"])).await;
        let named = |n| {
            let standard = if standard.is_empty() { String::new() } else { format!("{standard};x={n}") };
            lists().with("X-Forwarded-For", listed).with("Forwarded", &standard)
        };
        assert!(slowed(&flood(door.at, named).await) >= 20, "{listed:?} {standard:?}");
        assert_eq!(said_of(&door, "rate"), ["127.0.0.1"], "{listed:?} {standard:?}");
    }
}

#[tokio::test]
async fn whoever_guesses_through_a_proxy_slows_nobody_else_who_guesses() {
    let (_dir, file) = tokens_file();
    let config = config::Http { trusted_proxies: behind(&["127.0.0.1"]).trusted_proxies, rate_refused: 4, ..with_tokens(&file) };
    let door = Door::open(config).await;
    let guess = |n: &str| by("a-guess", lists()).with("X-Forwarded-For", n);
    assert!(slowed(&flood(door.at, |_| guess("203.0.113.7")).await) >= 20);
    assert_eq!(guess("203.0.113.8").at(door.at).await.status(), 401);
    assert_eq!(by(ANN, lists()).with("X-Forwarded-For", "203.0.113.7").at(door.at).await.status(), 200);
}

#[tokio::test]
async fn a_proxys_connections_are_not_one_clients() {
    for (proxies, are_taken) in [(&["127.0.0.1"][..], true), (&[], false)] {
        let door = Door::open(config::Http { connections_per_address: 2, ..behind(proxies) }).await;
        let mut open = Vec::new();
        for n in 0..4 {
            let mut wire = Wire::open(door.at).await;
            let sent = wire.try_send(lists().with("X-Forwarded-For", &format!("203.0.113.{n}")).text()).await;
            let head = if sent.is_ok() { wire.head().await } else { None };
            open.push((wire, head.map(|head| head.status)));
        }
        assert_eq!(open[3].1 == Some(200), are_taken, "{proxies:?}");
        assert_eq!(said_of(&door, "connections").is_empty(), are_taken, "{proxies:?}");
    }
}
