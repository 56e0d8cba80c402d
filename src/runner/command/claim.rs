//! Whether what an agent says is done is so: looked at outside the agent, in its directory, once nothing of it runs any more.
//!
//! What looks is bounded like the agent itself: a program has a time, a limit on what it prints, and ends with its whole tree.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitStatus;
use std::sync::Arc;

use rustix::process::Pid;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStdin};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::folder::Folder;
use super::schema::{mismatch, shown};
use super::shared::Shared;
use super::spool::Tail;
use super::start::{Start, cwd_of};
use super::streams::{GRACE, Pipe};
use super::tree::{Mark, Tree};
use super::{REAP_MAX, Shop, blocking, environment, signal_name};
use crate::model::accept::{Check, Criteria, What};
use crate::model::agent::{self, Definition, RunnerSpec};
use crate::model::event::{Failure, FailureKind};
use crate::model::hex::hex;
use crate::model::output::Output;
use crate::model::time::Span;
use crate::runner::Order;
use crate::runner::input::{Input, unreadable};
use crate::transport::Blobs;

/// How much of the end of a program's output is evidence.
const EVIDENCE_MAX: usize = 2048;
/// How many paths are named of those that are not as they should be.
const WRONGS_MAX: usize = 5;
const CHUNK: usize = 16 * 1024;
/// The mesh of whatever checks: it takes no part in the lattice.
const NO_MESH: &str = r#"{"mcpServers": {}}"#;
/// The program's variables and folder, where the agent has none of its own.
static NOTHING: agent::Command =
    agent::Command { command: Vec::new(), interactive: false, cwd: None, env_pass: Vec::new(), env: std::collections::BTreeMap::new() };

impl Shop {
    /// Whether a claim can be checked here: what is certain before the agent has run.
    pub(in crate::runner) fn can_check(&self, definition: &Definition, criteria: &Criteria) -> Result<(), Failure> {
        if let Some(schema) = &criteria.schema {
            self.schemas.get(schema).map_err(|error| unusable(&format!("accept.schema is not a JSON Schema: {error}")))?;
        }
        let Some(program) = criteria.command.first() else { return Ok(()) };
        if !self.context.runner.accept_commands {
            let text = "accept.command is not run at this station (runner.accept_commands is off): leave it out, or use schema and paths";
            return Err(unusable(text));
        }
        // A program in the directory may be what the agent is to make.
        if program.contains('/') {
            return Ok(());
        }
        let spec = spec_of(definition);
        let environment = environment::base(&self.context.runner.env_pass, spec)?;
        Start::plain(&criteria.command, cwd_of(definition, Some(spec))?, environment).map(|_| ()).map_err(|mut failure| {
            failure.message = format!("accept.command cannot be run at this station: {}", failure.message);
            failure
        })
    }

    /// Makes every check, the cheap ones first; `None` when it was stopped.
    pub(in crate::runner) async fn check_claim(
        &self,
        order: &Order,
        criteria: &Criteria,
        result: &Output,
        stop: &CancellationToken,
    ) -> Result<Option<Vec<Check>>, Failure> {
        let cwd = cwd_of(&order.definition, Some(spec_of(&order.definition)))?;
        let mut checks = Vec::new();
        if !criteria.paths.is_empty() {
            let (cwd, paths) = (cwd.clone(), criteria.paths.clone());
            checks.push(blocking(move || Ok(exist(&cwd, &paths))).await?);
        }
        if let Some(schema) = &criteria.schema {
            checks.push(self.fits(schema, result).await?);
        }
        if !criteria.command.is_empty() && !stop.is_cancelled() {
            let timeout = criteria.timeout.unwrap_or(self.context.runner.accept_timeout);
            match self.passes(order, &criteria.command, timeout, cwd, result, stop).await? {
                Some(check) => checks.push(check),
                None => return Ok(None),
            }
        }
        Ok(Some(checks).filter(|_| !stop.is_cancelled()))
    }

    async fn fits(&self, schema: &Value, result: &Output) -> Result<Check, Failure> {
        let validator = self.schemas.get(schema).map_err(|error| unusable(&format!("accept.schema is not a JSON Schema: {error}")))?;
        let value = match result {
            Output::Inline(value) => value.clone(),
            Output::Blob(blob) if blob.size > self.context.runner.checked_max.get() => {
                let max = self.context.runner.checked_max;
                let text =
                    format!("the result has {} bytes, and at most {max} are checked against a schema (runner.checked_max)", blob.size);
                return Ok(Check::new(What::Schema, false, text));
            }
            Output::Blob(blob) => Value::String(text_of(&self.context.blobs, &blob.sha256, blob.size).await?),
        };
        let schema = schema.clone();
        let checked = tokio::task::spawn_blocking(move || {
            // A text that is JSON counts as what it says, unless it is good as a text.
            let meant = value.as_str().filter(|_| !validator.is_valid(&value)).and_then(|text| serde_json::from_str(text).ok());
            mismatch(&validator, &schema, meant.as_ref().unwrap_or(&value))
        });
        let found =
            checked.await.map_err(|error| Failure::new(FailureKind::Crashed, format!("the result could not be checked: {error}")))?;
        Ok(match found {
            None => Check::new(What::Schema, true, "the result fits the schema"),
            Some(text) => Check::new(What::Schema, false, format!("the result does not fit the schema: {text}")),
        })
    }

    /// Runs a program, with the result on its standard input; `None` when it was stopped.
    async fn passes(
        &self,
        order: &Order,
        words: &[String],
        timeout: Span,
        cwd: PathBuf,
        result: &Output,
        stop: &CancellationToken,
    ) -> Result<Option<Check>, Failure> {
        let input = Input::of(&order.assignment, &self.context.blobs).await?;
        let mut environment = environment::base(&self.context.runner.env_pass, spec_of(&order.definition))?;
        let (task, context) = (input.task_within(environment::INPUT_MAX).await?, input.context_within(environment::INPUT_MAX).await?);
        environment::identity(&mut environment, order, task.as_deref(), context.as_deref());
        let base = self.base().await?;
        let folder = {
            let name = format!("{}.{}.accept", order.assignment.work_id, order.attempt);
            let (running, supervisor) = (base.running.clone(), self.supervisor());
            blocking(move || Folder::create(&running, &name, &supervisor, NO_MESH)).await?
        };
        environment.insert("LATTICE_SUPERVISOR".into(), self.supervisor().into());
        environment.insert("LATTICE_MCP_CONFIG".into(), folder.mesh_config().into());
        let started = match Start::plain(words, cwd, environment) {
            Ok(start) => start.spawn().await,
            Err(failure) => Err(failure),
        };
        let check = match started {
            Ok(child) => self.watch(child, order, words, timeout, result, stop).await,
            // Nothing was looked at: that speaks neither for the claim nor against it.
            Err(failure) if failure.kind == FailureKind::HandedBack => return Err(failure),
            Err(failure) => Some(Check::new(What::Command, false, failure.message)),
        };
        let _ = tokio::task::spawn_blocking(move || drop(folder)).await;
        Ok(check)
    }

    async fn watch(
        &self,
        mut child: Child,
        order: &Order,
        words: &[String],
        timeout: Span,
        result: &Output,
        stop: &CancellationToken,
    ) -> Option<Check> {
        let mut tree = Tree::new(Mark {
            group: child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)),
            entries: vec![
                format!("LATTICE_WORK_ID={}", order.assignment.work_id),
                format!("LATTICE_ATTEMPT={}", order.attempt),
                format!("LATTICE_SUPERVISOR={}", self.supervisor()),
            ],
        });
        // Nobody hears it but this.
        let (reports, _) = mpsc::channel(1);
        let shared = &Shared::new(reports, stop.clone());
        let max = self.context.runner.accept_output_max;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let listening = async {
            let heard = hear(shared, stdout, stderr, max.get()).await;
            shared.heard.cancel();
            heard
        };
        let feeding = feed(stdin, &self.context.blobs, result);
        let child = &mut child;
        let supervising = async {
            let mut feeding = pin!(feeding);
            let mut fed = false;
            let late = tokio::time::sleep(timeout.get());
            let mut late = pin!(late);
            let end = loop {
                tokio::select! {
                    biased;
                    status = child.wait() => break End::Exited(status),
                    () = stop.cancelled() => break End::Stopped,
                    () = shared.raised.cancelled() => break End::Flooded,
                    () = &mut late => break End::Late,
                    () = &mut feeding, if !fed => fed = true,
                }
            };
            if matches!(end, End::Exited(_)) {
                let _ = tokio::time::timeout(GRACE, shared.heard.cancelled()).await;
            }
            tree.stop(self.context.kill_after).await;
            shared.drain.cancel();
            if !matches!(end, End::Exited(_)) {
                let _ = tokio::time::timeout(REAP_MAX, child.wait()).await;
            }
            end
        };
        let (heard, end) = tokio::join!(listening, supervising);
        let flooded = shared.raised.is_cancelled();
        let name = shown(&words.join(" "));
        let (ok, exit_code, found) = match end {
            End::Stopped => return None,
            End::Late => (false, None, format!("{name} did not end within {timeout} and was stopped")),
            End::Exited(Ok(status)) if !flooded => judge(&name, status),
            End::Exited(Ok(_)) | End::Flooded => {
                (false, None, format!("{name} printed more than {max} and was stopped (runner.accept_output_max)"))
            }
            End::Exited(Err(error)) => (false, None, format!("the end of {name} could not be awaited: {error}")),
        };
        Some(Check { what: What::Command, ok, found, exit_code, output: heard.tail, sha256: Some(heard.sha256) })
    }
}

/// How a program came to its end.
enum End {
    Exited(std::io::Result<ExitStatus>),
    Stopped,
    Flooded,
    Late,
}

fn judge(name: &str, status: ExitStatus) -> (bool, Option<i32>, String) {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => (code == 0, Some(code), format!("{name} ended with exit code {code}")),
        (None, signal) => (false, None, format!("{name} was killed by {}", signal_name(signal.unwrap_or(0)))),
    }
}

fn unusable(text: &str) -> Failure {
    Failure::new(FailureKind::Unstartable, text)
}

fn spec_of(definition: &Definition) -> &agent::Command {
    match &definition.runner {
        RunnerSpec::Command(spec) => spec,
        RunnerSpec::Echo | RunnerSpec::Missing(_) => &NOTHING,
    }
}

/// Which paths are not there, or lead out of the directory by a link.
fn exist(cwd: &Path, paths: &[String]) -> Check {
    let Ok(home) = std::fs::canonicalize(cwd) else {
        return Check::new(What::Paths, false, format!("{} cannot be looked at", cwd.display()));
    };
    let wrong = |path: &String| match std::fs::canonicalize(cwd.join(path)) {
        Ok(found) if found.starts_with(&home) => None,
        Ok(_) => Some(format!("{} leads out of the agent's directory", shown(path))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Some(format!("{} does not exist", shown(path))),
        Err(error) => Some(format!("{} cannot be looked at: {error}", shown(path))),
    };
    let mut wrongs: Vec<String> = paths.iter().filter_map(wrong).collect();
    let more = wrongs.len().saturating_sub(WRONGS_MAX);
    wrongs.truncate(WRONGS_MAX);
    wrongs.extend((more > 0).then(|| format!("and so are {more} more")));
    match wrongs.is_empty() {
        true => Check::new(What::Paths, true, "every path exists"),
        false => Check::new(What::Paths, false, wrongs.join("; ")),
    }
}

async fn text_of(blobs: &Arc<dyn Blobs>, sha256: &str, size: u64) -> Result<String, Failure> {
    let mut source = blobs.open(sha256, 0..size).await.map_err(|error| unreadable(&error))?;
    let mut text = Vec::new();
    source.read_to_end(&mut text).await.map_err(|error| unreadable(&error))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Writes the result and closes; a program that does not read is free not to.
async fn feed(stdin: Option<ChildStdin>, blobs: &Arc<dyn Blobs>, result: &Output) {
    use tokio::io::AsyncWriteExt;
    let Some(mut stdin) = stdin else { return };
    match result {
        Output::Inline(value) => _ = stdin.write_all(Output::inline_text(value).as_bytes()).await,
        Output::Blob(blob) => {
            if let Ok(mut source) = blobs.open(&blob.sha256, 0..blob.size).await {
                let _ = tokio::io::copy(&mut source, &mut stdin).await;
            }
        }
    }
    let _ = stdin.flush().await;
}

/// What a program printed, on both of its streams.
struct Heard {
    tail: String,
    sha256: String,
}

async fn hear(
    shared: &Shared,
    stdout: Option<tokio::process::ChildStdout>,
    stderr: Option<tokio::process::ChildStderr>,
    max: u64,
) -> Heard {
    let (mut tail, mut hash, mut printed) = (Tail::new(EVIDENCE_MAX), Sha256::new(), 0u64);
    let mut out = stdout.map(|source| Pipe::new(source, shared));
    let mut err = stderr.map(|source| Pipe::new(source, shared));
    let (mut from_out, mut from_err) = (vec![0; CHUNK], vec![0; CHUNK]);
    while out.is_some() || err.is_some() {
        let chunk = tokio::select! {
            read = async { match &mut out { Some(out) => out.read(&mut from_out).await, None => 0 } }, if out.is_some() => {
                if read == 0 {
                    out = None;
                }
                &from_out[..read]
            }
            read = async { match &mut err { Some(err) => err.read(&mut from_err).await, None => 0 } }, if err.is_some() => {
                if read == 0 {
                    err = None;
                }
                &from_err[..read]
            }
        };
        tail.push(chunk);
        hash.update(chunk);
        printed += chunk.len() as u64;
        if printed > max {
            shared.raised.cancel();
            break;
        }
    }
    Heard { tail: tail.text(), sha256: hex(&hash.finalize()) }
}
