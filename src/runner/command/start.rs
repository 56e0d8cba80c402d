//! From an agent's file and a work to a program that can be started: which file, where, with which arguments.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::process::{Child, Command};

use super::environment::{Environment, INPUT_MAX};
use super::placeholder::{Piece, Placeholder, Values, pieces};
use super::shell::{Quotes, script_at};
use super::{environment, prompt};
use crate::model::agent::{self, Definition, Prompt};
use crate::model::event::{Failure, FailureKind};
use crate::runner::input::Input;
use crate::runner::{Order, kind_of};

/// The longest argument that Linux takes, its end mark not counted.
const ARGUMENT_MAX: usize = 128 * 1024 - 1;
/// A file that is being written or copied is busy for moments only.
const BUSY_TRIES: u32 = 100;
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// All that is needed to start a program.
pub(super) struct Start {
    program: PathBuf,
    name: OsString,
    args: Vec<String>,
    cwd: PathBuf,
    /// Its variables; more may be added.
    pub(super) environment: Environment,
    /// The agent's prompt for this work.
    pub(super) prompt: String,
}

fn unstartable(text: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Unstartable, text)
}

impl Start {
    /// Works it out.
    pub(super) async fn prepare(spec: &agent::Command, order: &Order, input: &Input, env_pass: &[String]) -> Result<Self, Failure> {
        let definition = &*order.definition;
        let mut environment = environment::base(env_pass, spec)?;
        let wants_context = matches!(definition.prompt, Prompt::Template(_)) || spec.command.iter().any(|word| word.contains("{context"));
        let context = if wants_context { input.context().await? } else { Map::new() };
        let prompt = prompt::render(&definition.prompt, &context, definition.manifest.input_schema.as_ref())
            .map_err(|error| unstartable(format!("the prompt of agent {} cannot be filled: {error}", definition.manifest.name)))?;
        let task = input.task_within(ARGUMENT_MAX).await?;
        let context_text = input.context_within(INPUT_MAX).await?;
        environment::identity(&mut environment, order, task.as_deref(), context_text.as_deref());
        let filled = Filled { order, task: task.as_deref(), prompt: &prompt, context: &context };
        let args = filled.args(&spec.command, &mut environment)?;
        let folder = folder_of(definition);
        let cwd = cwd_of(definition, Some(spec))?;
        let name = spec.command.first().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| unstartable("the agent's command is empty: name a program, like [\"./scan.sh\"]"))?;
        let program = resolve(name, &folder, environment.get(OsStr::new("PATH")).map(OsString::as_os_str))?;
        Ok(Self { program, name: name.into(), args, cwd, environment, prompt })
    }

    /// A program that is no agent, as it was named: in an agent's directory, with this environment.
    pub(super) fn plain(words: &[String], cwd: PathBuf, environment: Environment) -> Result<Self, Failure> {
        let (name, args) = words.split_first().ok_or_else(|| unstartable("the command is empty"))?;
        let program = resolve(name, &cwd, environment.get(OsStr::new("PATH")).map(OsString::as_os_str))?;
        Ok(Self { program, name: name.into(), args: args.to_vec(), cwd, environment, prompt: String::new() })
    }

    /// Starts it as the leader of its own process group.
    pub(super) async fn spawn(&self) -> Result<Child, Failure> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).env_clear().envs(&self.environment).current_dir(&self.cwd);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        if Path::new(&self.name).components().count() == 1 {
            command.arg0(&self.name);
        }
        let mut tries = 0;
        loop {
            match command.spawn() {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES => {
                    tries += 1;
                    tokio::time::sleep(BUSY_PAUSE).await;
                }
                started => return started.map_err(|error| self.refused(&error)),
            }
        }
    }

    fn refused(&self, error: &io::Error) -> Failure {
        let program = self.program.display();
        let hint = match error.kind() {
            io::ErrorKind::NotFound => "its first line may name an interpreter that is not installed",
            io::ErrorKind::ArgumentListTooLong => "its arguments are too long together: the task arrives on standard input whole",
            io::ErrorKind::PermissionDenied => "make it executable (chmod +x) on a file system that allows it",
            _ if error.raw_os_error() == Some(rustix::io::Errno::NOEXEC.raw_os_error()) => {
                "a script's first line must name its interpreter, like #!/bin/sh"
            }
            _ => return Failure::new(kind_of(error, FailureKind::Unstartable), format!("{program} could not be started: {error}")),
        };
        unstartable(format!("{program} could not be started ({error}): {hint}"))
    }
}

/// The directory that an agent runs in.
pub(super) fn cwd_of(definition: &Definition, spec: Option<&agent::Command>) -> Result<PathBuf, Failure> {
    let folder = folder_of(definition);
    let cwd = spec.and_then(|spec| spec.cwd.as_ref()).map_or_else(|| folder.clone(), |cwd| folder.join(cwd));
    match cwd.is_dir() {
        true => Ok(cwd),
        false => Err(unstartable(format!("{} is not a folder to run in: create it, or correct cwd in the agent's file", cwd.display()))),
    }
}

/// The folder that relative paths of an agent's file start from.
fn folder_of(definition: &Definition) -> PathBuf {
    let folder = definition.source.as_deref().and_then(Path::parent);
    let folder = folder.unwrap_or(Path::new(""));
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
}

fn resolve(name: &str, folder: &Path, path: Option<&OsStr>) -> Result<PathBuf, Failure> {
    if name.contains('/') {
        let program = folder.join(name);
        return match is_program(&program) {
            Ok(()) => Ok(program),
            Err(why) => Err(unstartable(format!("{} {why}", program.display()))),
        };
    }
    let path = path.unwrap_or(OsStr::new("/usr/local/bin:/usr/bin:/bin"));
    let found = std::env::split_paths(path).map(|dir| folder.join(dir).join(name)).find(|program| is_program(program).is_ok());
    found.ok_or_else(|| {
        let beside = folder.join(name);
        let hint = match beside.is_file() {
            true => format!("write ./{name} to run {}", beside.display()),
            false => "install it, or write its whole path".to_owned(),
        };
        unstartable(format!("no program named {name} is on the PATH: {hint}"))
    })
}

fn is_program(program: &Path) -> Result<(), String> {
    match std::fs::metadata(program) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err("does not exist: correct command in the agent's file, or put the program there".into())
        }
        Err(error) => Err(format!("cannot be used as a program: {error}")),
        Ok(found) if found.is_dir() => Err("is a folder: name the program in it".into()),
        Ok(found) if found.permissions().mode() & 0o111 == 0 => Err("is not executable: run chmod +x on it".into()),
        Ok(_) => Ok(()),
    }
}

/// Fills arguments.
struct Filled<'a> {
    order: &'a Order,
    task: Option<&'a str>,
    prompt: &'a str,
    context: &'a Map<String, Value>,
}

impl Filled<'_> {
    /// The arguments after the program, which itself has no placeholders: a client does not choose what is started.
    fn args(&self, command: &[String], environment: &mut Environment) -> Result<Vec<String>, Failure> {
        let assignment = &self.order.assignment;
        let (work_id, run_id) = (assignment.work_id.to_string(), assignment.orchestrator_run_id.to_string());
        let attempt = self.order.attempt.to_string();
        let values = Values {
            task: self.task,
            prompt: self.prompt,
            prompt_is_filled: matches!(self.order.definition.prompt, Prompt::Template(_)),
            work_id: &work_id,
            run_id: &run_id,
            agent: assignment.agent_name.as_str(),
            attempt: &attempt,
            context: self.context,
        };
        let script = script_at(command);
        let mut args = Vec::new();
        for (at, word) in command.iter().enumerate().skip(1) {
            args.push(match script == Some(at) {
                true => into_script(word, &values, environment)?,
                false => into_argument(word, &values)?,
            });
        }
        Ok(args)
    }
}

fn into_argument(word: &str, values: &Values<'_>) -> Result<String, Failure> {
    let mut argument = String::new();
    for piece in pieces(word) {
        match piece {
            Piece::Text(text) => argument.push_str(text),
            Piece::Filled(placeholder) => argument.push_str(&fitting(placeholder, values, argument.len())?),
        }
    }
    Ok(argument)
}

/// A client's text reaches a shell's script as a variable, never as a part of the script.
fn into_script(word: &str, values: &Values<'_>, environment: &mut Environment) -> Result<String, Failure> {
    let mut script = String::new();
    let mut quotes = Quotes::new();
    for piece in pieces(word) {
        match piece {
            Piece::Text(text) => {
                quotes.pass(text);
                script.push_str(text);
            }
            Piece::Filled(placeholder) if placeholder.is_foreign(values) => {
                let variable = format!("LATTICE_ARG_{}", environment.len());
                let value = fitting(placeholder, values, variable.len() + 1)?;
                script.push_str(&quotes.reference(&variable));
                environment.insert(variable.into(), value.into());
            }
            Piece::Filled(placeholder) => {
                let text = fitting(placeholder, values, script.len())?;
                quotes.pass(&text);
                script.push_str(&text);
            }
        }
    }
    Ok(script)
}

fn fitting(placeholder: Placeholder<'_>, values: &Values<'_>, before: usize) -> Result<String, Failure> {
    let whole = "the task arrives on standard input whole";
    let name = placeholder.0;
    let value = placeholder.value(values).filter(|value| before + value.len() <= ARGUMENT_MAX).ok_or_else(|| {
        unstartable(format!("{{{name}}} is longer than the {ARGUMENT_MAX} bytes that one argument may have: {whole}, so read it there"))
    })?;
    match value.contains('\0') {
        true => Err(unstartable(format!("{{{name}}} holds a NUL byte, which no argument can: {whole}, so read it there"))),
        false => Ok(value),
    }
}
