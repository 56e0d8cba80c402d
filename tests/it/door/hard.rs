//! Clients that come too often, open too much, send too much and read too little.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lattice_mcp::config;
use lattice_mcp::model::size::Size;
use lattice_mcp::model::time::Span;
use tokio::io::AsyncWriteExt as _;

use super::{ANN, BOB, by, listening, lists, tokens_file, with_tokens};
use crate::http::{Door, Memory};
use crate::lifecycle::eventually;
use crate::web::{Ask, Wire, initialize};

async fn statuses(at: std::net::SocketAddr, ask: &Ask, count: usize) -> Vec<u16> {
    futures_util::future::join_all((0..count).map(|_| ask.at(at))).await.into_iter().map(|reply| reply.status()).collect()
}

fn how_many(statuses: &[u16], status: u16) -> usize {
    statuses.iter().filter(|found| **found == status).count()
}

#[tokio::test]
async fn an_address_that_comes_too_often_is_told_to_wait() {
    let door = Door::open(config::Http { rate_per_address: 5, ..Default::default() }).await;
    let statuses = statuses(door.at, &lists(), 60).await;
    assert!(how_many(&statuses, 200) >= 5 && how_many(&statuses, 429) >= 20, "{statuses:?}");
    let refused = async {
        loop {
            let reply = lists().at(door.at).await;
            if reply.status() == 429 {
                return reply;
            }
        }
    };
    let refused = refused.await;
    assert_eq!(refused.get("retry-after"), Some("1"));
    assert!(refused.error().contains("http.rate_per_address"), "{refused:?}");
    assert!(door.turned.lock().unwrap().iter().any(|turned| turned.cause == "rate"));
}

#[tokio::test]
async fn a_principal_that_comes_too_often_slows_nobody_else() {
    let (_dir, file) = tokens_file();
    let door = Door::open(config::Http { rate_per_principal: 3, ..with_tokens(&file) }).await;
    let ann = statuses(door.at, &by(ANN, lists()), 40).await;
    assert!(how_many(&ann, 200) >= 3 && how_many(&ann, 429) >= 10, "{ann:?}");
    assert_eq!(by(BOB, lists()).at(door.at).await.status(), 200);
}

#[tokio::test]
async fn whoever_guesses_at_tokens_is_slowed_and_good_ones_still_count() {
    let (_dir, file) = tokens_file();
    let door = Door::open(config::Http { rate_refused: 4, ..with_tokens(&file) }).await;
    let guesses = statuses(door.at, &by("a-guess", lists()), 60).await;
    assert!(how_many(&guesses, 401) >= 4 && how_many(&guesses, 429) >= 20, "{guesses:?}");
    assert_eq!(how_many(&guesses, 200), 0);
    assert_eq!(by(ANN, lists()).at(door.at).await.status(), 200);
}

#[tokio::test]
async fn a_flood_of_refusals_is_told_in_part() {
    let door = Door::open(config::Http { refusals_told: 5, ..Default::default() }).await;
    let refused = statuses(door.at, &lists().with("Origin", "https://evil.example"), 100).await;
    assert_eq!(how_many(&refused, 403), 100);
    let told = door.turned.lock().unwrap().clone();
    assert!((1..60).contains(&told.len()) && told.iter().all(|turned| turned.cause == "origin"), "{told:?}");
    assert_eq!(lists().with("Host", "evil.example").at(door.at).await.status(), 403);
    assert_eq!(door.turned.lock().unwrap().last().unwrap().cause, "host", "a flood of one cause drowns no other");
    // What was held back is told with the first refusal of its cause that there is room for again.
    let mut sent = 101;
    let told = eventually("all are told of", async || {
        assert_eq!(lists().with("Origin", "https://evil.example").at(door.at).await.status(), 403);
        sent += 1;
        let told = door.turned.lock().unwrap().clone();
        let count: u64 = told.iter().map(|turned| turned.untold + 1).sum();
        assert!(count <= sent, "none is told of twice: {told:?}");
        (count == sent).then_some(told)
    })
    .await;
    assert_eq!(told.last().unwrap().cause.as_str(), "origin");
}

#[tokio::test]
async fn whoever_calls_the_server_by_a_foreign_name_is_slowed_like_everybody() {
    let door = Door::open(config::Http { rate_per_address: 5, ..Default::default() }).await;
    for ask in [lists().with("Host", "evil.example"), lists().with("Origin", "https://evil.example")] {
        let statuses = statuses(door.at, &ask, 60).await;
        assert!(how_many(&statuses, 429) >= 20 && how_many(&statuses, 200) == 0, "{statuses:?}");
    }
}

#[tokio::test]
async fn one_address_has_so_many_connections_and_no_more() {
    let door = Door::open(config::Http { connections_per_address: 3, ..Default::default() }).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut wire = Wire::open(door.at).await;
        wire.send(lists().text()).await;
        assert_eq!(wire.reply().await.status(), 200);
        open.push(wire);
    }
    assert!(Wire::open(door.at).await.is_closed().await);
    assert!(door.turned.lock().unwrap().iter().any(|turned| turned.cause == "connections"));
    drop(open.pop());
    crate::lifecycle::eventually("there is room again", async || {
        let mut wire = Wire::open(door.at).await;
        wire.try_send(lists().text()).await.ok()?;
        wire.head().await.filter(|head| head.status == 200)
    })
    .await;
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let door = Door::open(config::Http { head_max: Size::kib(16), ..Default::default() }).await;
    assert_eq!(lists().with("X-Large", &"x".repeat(8_000)).at(door.at).await.status(), 200);
    let mut wire = Wire::open(door.at).await;
    let _ = wire.try_send(lists().with("X-Large", &"x".repeat(40_000)).text()).await;
    assert_eq!(wire.head().await.map(|head| head.status), Some(431));
    let mut many = lists();
    for n in 0..200 {
        many = many.with(&format!("X-{n}"), "x");
    }
    assert_eq!(many.at(door.at).await.status(), 431);
    assert!(door.turned.lock().unwrap().iter().any(|turned| turned.cause == "head"));
}

#[tokio::test]
async fn a_client_that_never_reads_is_cut_off() {
    let door = Door::open(config::Http { write_stall: Span::millis(500), ..Default::default() }).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut wire = socket.connect(door.at).await.unwrap();
    let ask = Ask::new("GET", &format!("/{}", "x".repeat(200))).text().repeat(100);
    let begun = Instant::now();
    let cut = async {
        // What it asks for piles up at our end until nothing more fits between us.
        while wire.write_all(ask.as_bytes()).await.is_ok() {}
    };
    tokio::time::timeout(Duration::from_secs(60), cut).await.expect("the server holds on to a client that reads nothing");
    assert!(begun.elapsed() >= Duration::from_millis(500));
    assert_eq!(lists().at(door.at).await.status(), 200);
}

#[tokio::test]
async fn a_client_that_opens_a_thousand_sessions_takes_nobody_elses() {
    let (_dir, file) = tokens_file();
    let table = Arc::new(Memory::default());
    let config = config::Http { sessions_per_principal: 10, sessions_max: 100, rate_per_principal: 100_000, ..with_tokens(&file) };
    let door = Door::on(config, table.clone()).await;
    let opened = by(ANN, Ask::mcp(&initialize())).at(door.at).await;
    let id = opened.get("mcp-session-id").unwrap().to_owned();
    for _ in 0..20 {
        let statuses = statuses(door.at, &by(BOB, Ask::mcp(&initialize())), 50).await;
        assert!(statuses.iter().all(|status| matches!(status, 200 | 503)), "{statuses:?}");
    }
    assert!(table.rows() <= 11, "{} sessions are kept", table.rows());
    let listed = Ask::mcp(&serde_json::json!({"jsonrpc": "2.0", "id": 2, "method": "tools/list"})).with("Mcp-Session-Id", &id);
    assert_eq!(by(ANN, listed).at(door.at).await.status(), 200, "hers goes on");
}

#[tokio::test]
async fn streams_are_bounded_for_each_principal() {
    let (_dir, file) = tokens_file();
    let door = Door::open(config::Http { streams_per_principal: 2, ..with_tokens(&file) }).await;
    let (one, _two) = (listening(door.at, ANN).await.unwrap(), listening(door.at, ANN).await.unwrap());
    let refused = listening(door.at, ANN).await.err().unwrap();
    assert_eq!(refused.status(), 429);
    let _other = listening(door.at, BOB).await.expect("another principal has streams of its own");
    drop(one);
    crate::lifecycle::eventually("there is room again", async || listening(door.at, ANN).await.ok()).await;
}
