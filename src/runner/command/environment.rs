//! What a program sees of the environment: an allow-list of ours, what its agent's file adds, and who it is.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};

use crate::model::agent;
use crate::model::event::{Failure, FailureKind};
use crate::runner::Order;

const PASSED: [&str; 11] = ["PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TERM", "TMPDIR", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR"];

/// The longest `LATTICE_TASK` and `LATTICE_CONTEXT`.
pub(super) const INPUT_MAX: usize = 32 * 1024;

/// A program's variables.
pub(super) type Environment = BTreeMap<OsString, OsString>;

/// What we pass on, and what the agent's file sets.
pub(super) fn base(env_pass: &[String], spec: &agent::Command) -> Result<Environment, Failure> {
    let passed = |name: &OsStr| {
        name.to_str().is_some_and(|name| {
            PASSED.contains(&name) || name.starts_with("LC_") || env_pass.iter().chain(&spec.env_pass).any(|passed| passed == name)
        })
    };
    let mut environment: Environment = std::env::vars_os().filter(|(name, _)| passed(name)).collect();
    for (name, value) in &spec.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let text = format!("env {name:?} cannot be set: a name has no '=', and neither name nor value a NUL");
            return Err(Failure::new(FailureKind::Unstartable, text));
        }
        environment.insert(name.into(), value.into());
    }
    Ok(environment)
}

/// Who the program is, and its input where that is small.
pub(super) fn identity(environment: &mut Environment, order: &Order, task: Option<&str>, context: Option<&str>) {
    let assignment = &order.assignment;
    let mut set = |name: &str, value: String| environment.insert(name.into(), value.into());
    set("LATTICE_WORK_ID", assignment.work_id.to_string());
    set("LATTICE_RUN_ID", assignment.orchestrator_run_id.to_string());
    set("LATTICE_AGENT", assignment.agent_name.to_string());
    set("LATTICE_ATTEMPT", order.attempt.to_string());
    set("TRACEPARENT", format!("00-{}-{}-01", assignment.trace_id, assignment.span_id));
    for (name, value) in [("LATTICE_TASK", task), ("LATTICE_CONTEXT", context)] {
        match value.filter(|value| value.len() <= INPUT_MAX && !value.contains('\0')) {
            Some(value) => drop(environment.insert(name.into(), value.into())),
            None => drop(environment.remove(OsStr::new(name))),
        }
    }
}
