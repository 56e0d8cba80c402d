//! The processes of a run: finding them all, and stopping them all.
//!
//! A run's program leads its own process group. What leaves that group (`setsid`, a double fork) still carries the run's variables in
//! its environment, and on Linux is found by them in `/proc`. Elsewhere only the group is known.

use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::time::Instant;

/// How long KILL is repeated before a process counts as unkillable.
const KILL_MAX: Duration = Duration::from_secs(10);
const POLL_MIN: Duration = Duration::from_millis(5);
const POLL_MAX: Duration = Duration::from_millis(100);

/// How to recognise the processes of a run.
#[derive(Debug, Clone)]
pub(super) struct Mark {
    /// The process group, while we know it.
    pub(super) group: Option<Pid>,
    /// `NAME=value` entries that all stand in the environment.
    pub(super) entries: Vec<String>,
}

/// A running tree; dropping it kills what is left.
pub(super) struct Tree {
    mark: Mark,
    gone: bool,
}

impl Tree {
    /// The tree with this mark.
    pub(super) fn new(mark: Mark) -> Self {
        Self { mark, gone: false }
    }

    /// TERM, then after a while KILL; returns when nothing of it runs any more.
    pub(super) async fn stop(&mut self, kill_after: Duration) {
        let asked = Instant::now();
        let mut pause = POLL_MIN;
        let mut told = Vec::new();
        loop {
            let elapsed = asked.elapsed();
            let signal = if elapsed < kill_after { Signal::TERM } else { Signal::KILL };
            let Some(alive) = self.signal(signal, std::mem::take(&mut told)).await else { return };
            if alive.is_empty() {
                self.gone = true;
                return;
            }
            if elapsed > kill_after + KILL_MAX {
                tracing::error!(pids = ?alive, "these processes of a run do not end, even by KILL");
                self.gone = true;
                return;
            }
            // TERM is said once to each; KILL until it is done.
            told = if signal == Signal::TERM { alive } else { Vec::new() };
            let left = if elapsed < kill_after { kill_after - elapsed } else { POLL_MAX };
            tokio::time::sleep(pause.min(left)).await;
            pause = (pause * 2).min(POLL_MAX);
        }
    }

    /// All that are alive; `None` when the runtime is shutting down.
    async fn signal(&self, signal: Signal, except: Vec<i32>) -> Option<Vec<i32>> {
        let mark = self.mark.clone();
        tokio::task::spawn_blocking(move || platform::signal(&mark, signal, &except)).await.ok()
    }
}

/// Kills everything with these variables, at once and without waiting for long.
pub(super) fn kill_now(entries: Vec<String>) {
    const ROUNDS: u32 = 20;
    let mark = Mark { group: None, entries };
    for _ in 0..ROUNDS {
        if platform::signal(&mark, Signal::KILL, &[]).is_empty() {
            return;
        }
        std::thread::yield_now();
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if !self.gone {
            platform::signal(&self.mark, Signal::KILL, &[]);
        }
    }
}

pub(super) use platform::{Orphan, orphans};

#[cfg(target_os = "linux")]
mod platform {
    use std::collections::HashSet;

    use rustix::process::{PidfdFlags, kill_process, pidfd_open, pidfd_send_signal};

    use super::{Mark, Pid, Signal};

    struct Process {
        pid: i32,
        parent: i32,
        group: i32,
        started: u64,
    }

    /// A process of some run of this program.
    #[derive(Debug, Clone)]
    pub(in super::super) struct Orphan {
        /// Its `LATTICE_` variables.
        variables: Vec<String>,
    }

    impl Orphan {
        /// The value of one of its variables.
        pub(in super::super) fn variable(&self, name: &str) -> Option<&str> {
            self.variables.iter().find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
        }
    }

    /// Signals all processes of a run except these; gives all that are alive.
    pub(super) fn signal(mark: &Mark, signal: Signal, except: &[i32]) -> Vec<i32> {
        let members = members(mark);
        members.iter().filter(|process| !except.contains(&process.pid)).for_each(|process| send(process, signal));
        members.into_iter().map(|process| process.pid).collect()
    }

    /// All processes that belong to a run of this program.
    pub(in super::super) fn orphans() -> Vec<Orphan> {
        let variables = |process: Process| {
            let environ = environ(process.pid)?;
            let entries = environ.split(|byte| *byte == 0).filter(|entry| entry.starts_with(b"LATTICE_"));
            let variables: Vec<String> = entries.map(|entry| String::from_utf8_lossy(entry).into_owned()).collect();
            Some(Orphan { variables }).filter(|orphan| orphan.variable("LATTICE_SUPERVISOR").is_some())
        };
        processes().into_iter().filter_map(variables).collect()
    }

    fn members(mark: &Mark) -> Vec<Process> {
        let processes = processes();
        let belongs = |process: &&Process| {
            mark.group.is_some_and(|group| group.as_raw_nonzero().get() == process.group) || is_marked(process.pid, &mark.entries)
        };
        let mut members: HashSet<i32> = processes.iter().filter(belongs).map(|process| process.pid).collect();
        // What has changed both its group and its environment still has its parent, as long as that lives.
        loop {
            let before = members.len();
            let children = processes.iter().filter(|process| members.contains(&process.parent)).map(|process| process.pid);
            let children: Vec<i32> = children.collect();
            members.extend(children);
            if members.len() == before {
                break;
            }
        }
        processes.into_iter().filter(|process| members.contains(&process.pid)).collect()
    }

    fn is_marked(pid: i32, entries: &[String]) -> bool {
        let Some(environ) = environ(pid) else { return false };
        !entries.is_empty() && entries.iter().all(|entry| environ.split(|byte| *byte == 0).any(|found| found == entry.as_bytes()))
    }

    fn environ(pid: i32) -> Option<Vec<u8>> {
        std::fs::read(format!("/proc/{pid}/environ")).ok().filter(|environ| !environ.is_empty())
    }

    /// All processes but this one and the first, zombies left out.
    fn processes() -> Vec<Process> {
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| *pid != own && *pid != 1).filter_map(stat).collect()
    }

    fn stat(pid: i32) -> Option<Process> {
        let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        let text = String::from_utf8_lossy(&text);
        // The name may hold anything, spaces and brackets too.
        let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
        let dead = matches!(*fields.first()?, "Z" | "X");
        let process = Process {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            group: fields.get(2)?.parse().ok()?,
            started: fields.get(19)?.parse().ok()?,
        };
        (!dead).then_some(process)
    }

    /// Signals this very process, not another that has come to its number since.
    fn send(process: &Process, signal: Signal) {
        let Some(pid) = Pid::from_raw(process.pid) else { return };
        let same = || stat(process.pid).is_some_and(|now| now.started == process.started);
        let sent = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) if same() => pidfd_send_signal(handle, signal),
            Ok(_) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(_) if same() => kill_process(pid, signal),
            Err(_) => Ok(()),
        };
        if let Err(error) = sent
            && error != rustix::io::Errno::SRCH
        {
            tracing::warn!(pid = process.pid, %error, "a process of a run cannot be signalled");
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    use rustix::process::{kill_process_group, test_kill_process_group};

    use super::{Mark, Signal};

    /// A process of some run of this program: none can be found here.
    #[derive(Debug, Clone)]
    pub(in super::super) struct Orphan;

    impl Orphan {
        /// The value of one of its variables.
        pub(in super::super) fn variable(&self, _name: &str) -> Option<&str> {
            None
        }
    }

    /// Signals the run's group unless it was told; gives it while it is alive.
    pub(super) fn signal(mark: &Mark, signal: Signal, except: &[i32]) -> Vec<i32> {
        let Some(group) = mark.group.filter(|group| test_kill_process_group(*group).is_ok()) else { return Vec::new() };
        let raw = group.as_raw_nonzero().get();
        if !except.contains(&raw) {
            let _ = kill_process_group(group, signal);
        }
        vec![raw]
    }

    /// Nothing: environments of other processes cannot be read here.
    pub(in super::super) fn orphans() -> Vec<Orphan> {
        Vec::new()
    }
}
