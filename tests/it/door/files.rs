//! A server that may have few files open.

use serde_json::json;
use tokio::net::TcpSocket;
use tokio::process::Command;

use super::ANN;
use super::server::Server;
use crate::lifecycle::Place;
use crate::rpc::binary;

/// The same command, in a process that may have so many files open.
fn within(files: u32, command: &Command) -> Command {
    let command = command.as_std();
    let mut bounded = Command::new("sh");
    bounded.arg("-c").arg(format!("ulimit -n {files}; exec \"$@\"")).arg("sh").arg(command.get_program()).args(command.get_args());
    bounded.current_dir(command.get_current_dir().unwrap()).kill_on_drop(true);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bounded.env(name, value),
            None => bounded.env_remove(name),
        };
    }
    bounded
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_leave_the_agents_and_other_clients_theirs() {
    let place = Place::new();
    let server = Server::start(within(192, &binary(place.data.path(), place.agents.path()))).await;
    let mut idle = Vec::new();
    for _ in 0..240 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        idle.push(socket.connect(server.at).await.unwrap());
    }
    let client = server.client(ANN);
    let assigned = client.assign("upper", json!({})).await;
    let settled = client.call("await_work", json!({"work_id": assigned["work_id"], "timeout": "30s"})).await.unwrap();
    assert_eq!((&settled["status"], &settled["result"]), (&json!("COMPLETE"), &json!("X")), "{settled}");
    drop(idle);
}
