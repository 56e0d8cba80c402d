//! Who comes through the HTTP door, what they may do there, and what keeps it standing.

mod files;
mod hard;
mod issuer;
mod logs;
mod oauth;
mod principals;
mod proxied;
mod server;
mod silent;
mod tls;
mod tokens;

use std::path::Path;

use lattice_mcp::config;
use lattice_mcp::model::time::Span;
use serde_json::json;

use crate::web::{Ask, Reply, Wire, call, modern};

/// Tokens of three who may do different things, and one who has no right at all to be called by them.
const TOKENS: &str = "\
ann: { token: anns-token-0123456789 }
bob: { token: bobs-token-0123456789, scopes: [read, assign] }
eve: { token: eves-token-0123456789, scopes: read }
ops: { token: opss-token-0123456789, scopes: admin }
";
const ANN: &str = "anns-token-0123456789";
const BOB: &str = "bobs-token-0123456789";
const EVE: &str = "eves-token-0123456789";
const OPS: &str = "opss-token-0123456789";

/// A door with these tokens, which are looked at often.
fn with_tokens(file: &Path) -> config::Http {
    config::Http { tokens_file: Some(file.to_owned()), reload_interval: Span::millis(50), ..Default::default() }
}

fn tokens_file() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.yaml");
    std::fs::write(&file, TOKENS).unwrap();
    (dir, file)
}

fn by(token: &str, ask: Ask) -> Ask {
    ask.with("Authorization", &format!("Bearer {token}"))
}

/// A call of a tool, as newer clients make it.
fn calls(tool: &str) -> Ask {
    modern(call(1, tool, &json!({})))
}

fn lists() -> Ask {
    modern(json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {} }))
}

/// Begins to listen for changes; the stream, once it is open.
async fn listening(at: std::net::SocketAddr, token: &str) -> Result<Wire, Reply> {
    let filter = json!({ "notifications": { "toolsListChanged": true } });
    let ask = modern(json!({ "jsonrpc": "2.0", "id": 4, "method": "subscriptions/listen", "params": filter }));
    let mut wire = Wire::open(at).await;
    wire.send(by(token, ask).text()).await;
    let head = wire.head().await.unwrap();
    if head.status != 200 {
        return Err(Reply { head, text: String::new() });
    }
    wire.until("acknowledged").await;
    Ok(wire)
}

/// Whether a stream comes to its end soon.
async fn ends(wire: &mut Wire) -> bool {
    let rest = async { while wire.chunk().await.is_some() {} };
    tokio::time::timeout(std::time::Duration::from_secs(20), rest).await.is_ok()
}
