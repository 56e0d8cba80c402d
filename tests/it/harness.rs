//! A lattice in a temporary folder, and the program itself as a server over it.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use tempfile::TempDir;

/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_lattice-mcp");
/// The token of servers on HTTP.
pub(crate) const TOKEN: &str = "a-token-for-tests";
/// How long a server may take to listen.
const START: Duration = Duration::from_secs(20);

/// Prints its task in upper case.
const UPPER: (&str, &str, &str) = ("upper", "Prints its task in upper case", r#"printf %s "$LATTICE_TASK" | tr a-z A-Z"#);
/// Takes as many steps as its task says, and tells of each.
const SLOW: (&str, &str, &str) = (
    "slow",
    "Takes as many steps as its task says",
    r#"n=0
while [ "$n" -lt "$LATTICE_TASK" ]; do
  n=$((n + 1))
  echo "::lattice {\"progress\": $((n * 100 / LATTICE_TASK)), \"message\": \"step $n\"}"
  sleep 0.15
done
echo "::lattice {\"result\": {\"steps\": $n}}""#,
);
/// Asks a question and gives the answer back.
const ASKER: (&str, &str, &str) = (
    "asker",
    "Asks for a colour and gives the answer back",
    r#"read -r work
echo '::lattice {"escalate": {"reason": "which colour?", "context": {"choices": ["blue", "green"]}}}'
read -r answer
printf 'the answer was %s' "$answer""#,
);

/// Asks a person, and gives their answer back.
const CAREFUL: (&str, &str, &str) = (
    "careful",
    "Asks a person before it acts",
    r#"read -r work
echo '::lattice {"escalate": {"reason": "may I?", "context": {"choices": ["yes", "no"]}, "needs": "human"}}'
read -r answer
printf 'they said %s' "$answer""#,
);

/// A data folder and a folder of agents, both gone with this value.
pub(crate) struct Lattice {
    dir: TempDir,
}

impl Lattice {
    /// With the agents `upper`, `slow`, `asker` and `careful`, which need nothing but a POSIX shell.
    pub(crate) fn new() -> Self {
        let lattice = Self { dir: tempfile::tempdir().expect("a temporary folder") };
        std::fs::create_dir_all(lattice.agents()).expect("a folder for agents");
        for (name, description, script) in [UPPER, SLOW, ASKER, CAREFUL] {
            let program = lattice.dir.path().join(format!("{name}.sh"));
            std::fs::write(&program, format!("{script}\n")).expect("a script");
            let interactive = if ["asker", "careful"].contains(&name) { "  interactive: true\n" } else { "" };
            let file = format!(
                "---\nname: {name}\ndescription: {description}\nrunner:\n  kind: command\n{interactive}  command: [sh, {}]\n---\n",
                program.display()
            );
            std::fs::write(lattice.agents().join(format!("{name}.md")), file).expect("an agent file");
        }
        lattice
    }

    pub(crate) fn agents(&self) -> PathBuf {
        self.dir.path().join("agents")
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The program and its arguments, as a client would start it on this lattice.
    pub(crate) fn command(&self, arguments: &[&str]) -> Vec<String> {
        let (data, agents) = (self.dir.path().join("data"), self.agents());
        let common = ["--data-dir".into(), data.display().to_string(), "--agents".into(), agents.display().to_string()];
        std::iter::once(PROGRAM.into()).chain(arguments.iter().map(|&text| text.into())).chain(common).collect()
    }

    /// Starts the program as a server on HTTP that wants `TOKEN`.
    pub(crate) fn serve(&self) -> HttpServer {
        let token = self.dir.path().join("token");
        std::fs::write(&token, format!("{TOKEN}\n")).expect("a token file");
        let argv = self.command(&["--http", "127.0.0.1:0", "--token-file", &token.display().to_string()]);
        HttpServer::start(&argv, self.path())
    }

    /// Starts the program as a server on HTTP that wants no token.
    pub(crate) fn serve_to_anybody(&self) -> HttpServer {
        HttpServer::start(&self.command(&["--http", "127.0.0.1:0"]), self.path())
    }
}

/// A running server; it ends with this value.
pub(crate) struct HttpServer {
    child: Child,
    pub(crate) url: String,
}

impl HttpServer {
    #[expect(clippy::print_stderr, reason = "what a server logs belongs to the test's output")]
    fn start(argv: &[String], dir: &Path) -> Self {
        let mut command = Command::new(&argv[0]);
        let mut child = command
            .args(&argv[1..])
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", argv[0]));
        let stderr = BufReader::new(child.stderr.take().expect("its standard error"));
        let (found, url) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                match line.strip_prefix("listening on ") {
                    Some(url) => drop(found.send(url.to_owned())),
                    None => eprintln!("server: {line}"),
                }
            }
        });
        match url.recv_timeout(START) {
            Ok(url) => Self { child, url },
            Err(_) => {
                let _ = child.kill();
                panic!("the server did not say where it listens: {}", argv.join(" "));
            }
        }
    }
}

impl HttpServer {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not left.
    pub(crate) fn is_alive(&self) -> bool {
        rustix::process::test_kill_process(rustix::process::Pid::from_child(&self.child)).is_ok()
            && !std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).is_ok_and(|stat| stat.contains(") Z "))
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        for _ in 0..200 {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
