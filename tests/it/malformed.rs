//! Floods of what is no message of MCP: the real binary answers, stays up, and holds no more memory at the end than soon after the
//! beginning.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use serde_json::{Value, json};

use crate::clients::ended;
use crate::harness::{Lattice, TOKEN};
use crate::lifecycle::resident_kib;
use crate::web::{Ask, Wire, call, initialize};

const PATIENCE: Duration = Duration::from_secs(120);
/// How much more the process may hold after the last third than after the first, in KiB.
const GROWTH_MAX: u64 = 8 << 10;
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// Messages of which none is good, each another one.
struct Malformed(u64);

impl Malformed {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn bytes(&mut self, count: u64) -> Vec<u8> {
        (0..count).map(|_| u8::try_from(self.below(256)).unwrap()).filter(|byte| !matches!(byte, b'\n' | b'\r')).collect()
    }

    /// The next one, without its newline; never one that would end the connection by the rules.
    fn next(&mut self) -> Vec<u8> {
        let id = self.below(1 << 40);
        let good =
            json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": { "name": "check_work", "arguments": {} } }).to_string();
        let method = format!("no/such/method{}", self.below(1 << 30));
        let depth = usize::try_from(self.below(300)).unwrap();
        match self.below(12) {
            0 => good.as_bytes()[..usize::try_from(self.below(good.len() as u64 - 1)).unwrap()].to_vec(),
            1 => {
                let mut bytes = good.into_bytes();
                let at = usize::try_from(self.below(bytes.len() as u64)).unwrap();
                bytes[at] = b'\x01';
                bytes
            }
            2 => {
                let count = self.below(200);
                self.bytes(count)
            }
            3 => format!("{}{}", "[".repeat(depth), "]".repeat(depth / 2)).into_bytes(),
            4 => format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"x\",\"params\":{}1{}}}", "{\"a\":".repeat(depth), "}".repeat(depth)).into_bytes(),
            5 => json!({ "jsonrpc": "1.0", "id": id, "method": method }).to_string().into_bytes(),
            6 => json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": "x".repeat(depth) }).to_string().into_bytes(),
            7 => json!({ "jsonrpc": "2.0", "id": [id], "method": 7 }).to_string().into_bytes(),
            8 => json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": { "name": method, "arguments": [depth] } }).to_string().into_bytes(),
            9 => json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": { "name": "check_work", "arguments": { "work_id": method } } })
                .to_string()
                .into_bytes(),
            10 => json!({ "jsonrpc": "2.0", "id": id, "result": { "of": "nothing" } }).to_string().into_bytes(),
            _ => json!({ "jsonrpc": "2.0", "method": format!("notifications/{method}"), "params": { "requestId": id } }).to_string().into_bytes(),
        }
    }
}

/// A server on pipes; its answers are counted, and those to our own marks are told of.
struct Flooded {
    child: Child,
    stdin: Option<ChildStdin>,
    marks: Receiver<String>,
}

impl Flooded {
    fn start(lattice: &Lattice) -> Self {
        let argv = lattice.command(&["--stdio"]);
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).current_dir(lattice.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("the program");
        let stdout = BufReader::new(child.stdout.take().expect("its output"));
        let (tell, marks) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                assert!(line.starts_with('{') && line.contains("\"jsonrpc\":\"2.0\""), "not a message: {line}");
                if line.contains("\"id\":\"mark") {
                    let _ = tell.send(line);
                }
            }
        });
        let stdin = child.stdin.take();
        let mut server = Self { child, stdin, marks };
        let mut hello = initialize();
        hello["id"] = "mark".into();
        server.ask(&hello);
        server.send(json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }).to_string().as_bytes());
        server
    }

    fn send(&mut self, line: &[u8]) {
        let stdin = self.stdin.as_mut().expect("an open input");
        stdin.write_all(line).and_then(|()| stdin.write_all(b"\n")).expect("the server reads on");
    }

    fn ask(&mut self, message: &Value) -> Value {
        self.send(message.to_string().as_bytes());
        let line = self.marks.recv_timeout(PATIENCE).expect("an answer in time");
        serde_json::from_str(&line).expect("JSON")
    }

    /// Sends so many lines, and waits until the server is through with them; the memory that it holds then, in KiB.
    fn flood(&mut self, malformed: &mut Malformed, lines: u64) -> u64 {
        for _ in 0..lines {
            let line = malformed.next();
            self.send(&line);
        }
        let mut check = call(0, "check_work", &json!({}));
        check["id"] = "mark".into();
        let answer = self.ask(&check);
        assert!(answer["result"]["structuredContent"].is_object(), "{answer}");
        resident_kib(self.child.id())
    }

    fn end(mut self) {
        drop(self.stdin.take());
        let status = ended(&mut self.child, PATIENCE).expect("the server leaves");
        assert!(status.success(), "{status}");
    }
}

/// Thirds of a flood: what the process holds after each.
#[expect(clippy::print_stderr, reason = "the figures are worth reading where the test is asked for alone")]
fn stays_flat(what: &str, count: u64, mut third: impl FnMut(u64) -> u64) {
    let held = [third(count / 3), third(count / 3), third(count / 3)];
    eprintln!("{what}: {count} sent, and {held:?} KiB held after each third");
    assert!(held[2] <= held[0] + GROWTH_MAX, "memory grows with what is sent: {held:?} KiB");
}

fn lines(count: u64) {
    let lattice = Lattice::new();
    let mut server = Flooded::start(&lattice);
    let mut malformed = Malformed(SEED);
    stays_flat("malformed lines", count, |share| server.flood(&mut malformed, share));
    server.end();
}

#[test]
fn a_hundred_thousand_malformed_lines_are_answered_without_growth() {
    lines(100_000);
}

#[test]
#[ignore = "takes minutes: cargo test --release --test it malformed:: -- --ignored --nocapture"]
fn two_million_malformed_lines_are_answered_without_growth() {
    lines(2_000_000);
}

fn bodies(count: u64) {
    const LANES: u64 = 8;
    let lattice = Lattice::new();
    let server = lattice.serve();
    let at = server.url.trim_start_matches("http://").trim_end_matches("/mcp").parse().expect("an address");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut seed = SEED;
    stays_flat("malformed bodies", count, |share| {
        runtime.block_on(async {
            let lanes = (0..LANES).map(|lane| async move {
                let mut malformed = Malformed(seed ^ (lane + 1));
                let mut wire = Wire::open(at).await;
                for _ in 0..share / LANES {
                    let body = malformed.next();
                    let head = Ask::mcp(&Value::Null).with("Authorization", &format!("Bearer {TOKEN}")).body("").text();
                    let head = head.trim_end();
                    wire.send([format!("{head}\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), &body].concat()).await;
                    let reply = wire.reply().await;
                    assert!((400..500).contains(&reply.status()), "{} for {}", reply.status(), String::from_utf8_lossy(&body));
                }
            });
            futures_util::future::join_all(lanes).await;
        });
        seed = seed.rotate_left(7);
        let health = runtime.block_on(Ask::new("GET", "/health").at(at));
        assert_eq!(health.status(), 200);
        resident_kib(server.pid())
    });
}

#[test]
fn malformed_bodies_are_refused_without_growth() {
    bodies(12_000);
}

#[test]
#[ignore = "takes minutes: cargo test --release --test it malformed:: -- --ignored --nocapture"]
fn two_hundred_thousand_malformed_bodies_are_refused_without_growth() {
    bodies(200_000);
}
