//! Two network namespaces with a cable between them, where the machine lets an unprivileged process make them.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::nats_server::NATS_SERVER;

const NEAR: &str = "10.77.0.1";
const FAR: &str = "10.77.0.2";

/// The namespaces live as long as this value.
pub(super) struct Namespaces {
    near: Holder,
    far: Holder,
}

/// A process that does nothing but keep a namespace; it ends with this value.
pub(super) struct Holder(Child);

impl Namespaces {
    /// # Errors
    /// What the machine does not allow.
    pub(super) fn new() -> Result<Self, String> {
        let near = Holder::new(Command::new("unshare").args(["-r", "-n"]))?;
        let far = Holder::new(Command::new(ENTER).args(near.way()).args(["unshare", "-n"]))?;
        let namespaces = Self { near, far };
        let far_pid = namespaces.far.0.id().to_string();
        run(&namespaces.near(), &["ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", &far_pid])?;
        for (way, address) in [(namespaces.near(), NEAR), (namespaces.far(), FAR)] {
            run(&way, &["ip", "address", "add", &format!("{address}/24"), "dev", "cable"])?;
            run(&way, &["ip", "link", "set", "lo", "up"])?;
            run(&way, &["ip", "link", "set", "cable", "up"])?;
        }
        Ok(namespaces)
    }

    /// What leads a command to the near side.
    pub(super) fn near(&self) -> Vec<String> {
        self.near.led()
    }

    /// What leads a command to the far side.
    pub(super) fn far(&self) -> Vec<String> {
        self.far.led()
    }

    /// A server on the near side; it ends with the value.
    pub(super) fn server(&self, config: &Path) -> Holder {
        let way = self.near();
        let mut command = Command::new(&way[0]);
        command.args(&way[1..]).arg(NATS_SERVER).arg("-c").arg(config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Holder(command.spawn().unwrap())
    }

    /// Where the far side finds it.
    pub(super) fn url(&self, port: u16) -> String {
        format!("nats://{NEAR}:{port}")
    }

    /// Plugs the cable in or pulls it out.
    pub(super) fn link(&self, up: bool) {
        run(&self.near(), &["ip", "link", "set", "cable", if up { "up" } else { "down" }]).unwrap();
    }
}

const ENTER: &str = "nsenter";

impl Holder {
    fn new(command: &mut Command) -> Result<Self, String> {
        // It says that it is there, which is when its namespace is.
        let command =
            command.args(["sh", "-c", "echo there; exec cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| format!("{}: {error}", command.get_program().display()))?;
        let mut said = [0; 6];
        let there = std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said);
        if there.is_err() {
            let output = child.wait_with_output().map_err(|error| error.to_string())?;
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        Ok(Self(child))
    }

    fn way(&self) -> Vec<String> {
        ["--target", &self.0.id().to_string(), "--user", "--net", "--preserve-credentials"].map(str::to_owned).into()
    }

    fn led(&self) -> Vec<String> {
        std::iter::once(ENTER.to_owned()).chain(self.way()).collect()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(way: &[String], command: &[&str]) -> Result<(), String> {
    let output = Command::new(&way[0]).args(&way[1..]).args(command).output().map_err(|error| format!("{}: {error}", way[0]))?;
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())) }
}
