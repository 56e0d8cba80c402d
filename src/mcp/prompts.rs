//! Prompts that ship inside the binary.

use rmcp::ErrorData;
use rmcp::model::{GetPromptRequestParams, GetPromptResult, ListPromptsResult, Prompt, PromptArgument, PromptMessage, Role};
use serde_json::Value;

use super::agents;
use super::problem::Problem;
use crate::dispatcher::Dispatcher;
use crate::model::id::AgentName;

const ORCHESTRATE: &str = "orchestrate";
/// The prompt that hands a goal to agents.
pub(super) const DELEGATE: &str = "delegate";

const ORCHESTRATE_TEXT: &str = include_str!("../../prompts/orchestrate.md");
const DELEGATE_TEXT: &str = include_str!("../../prompts/delegate.md");

/// What there is.
pub(super) fn list() -> ListPromptsResult {
    ListPromptsResult::with_all_items(vec![
        Prompt::new(ORCHESTRATE, Some("How to get work done by the agents of the lattice"), None).with_title("Orchestrate agents"),
        Prompt::new(
            DELEGATE,
            Some("Has a goal done by agents, in parallel where that helps"),
            Some(vec![
                PromptArgument::new("goal").with_description("What is to be achieved").with_required(true),
                PromptArgument::new("agents")
                    .with_description("The agents to use, separated by commas; any if left out")
                    .with_required(false),
            ]),
        )
        .with_title("Delegate a goal"),
    ])
}

/// One prompt, filled in.
pub(super) fn get(dispatcher: &Dispatcher, request: &GetPromptRequestParams) -> Result<GetPromptResult, ErrorData> {
    let argument = |name: &str| match request.arguments.as_ref().and_then(|arguments| arguments.get(name)) {
        Some(Value::String(text)) if !text.trim().is_empty() => Some(text.trim().to_owned()),
        _ => None,
    };
    let text = match request.name.as_str() {
        ORCHESTRATE => ORCHESTRATE_TEXT.to_owned(),
        DELEGATE => {
            let Some(goal) = argument("goal") else {
                return Err(Problem::new("the prompt delegate needs a goal", "Say what is to be achieved.").into_invalid_params());
            };
            let max = dispatcher.config().mcp.agents_described_max;
            let (which, agents) = match argument("agents") {
                Some(names) => ("Use these agents and no others", chosen(dispatcher, &names)?),
                None => ("Choose from the agents there are", agents::described(&dispatcher.registry().snapshot(), max)),
            };
            // The goal last: it is the user's own text, and nothing is filled into it.
            DELEGATE_TEXT.replacen("{which}", which, 1).replacen("{agents}", &agents, 1).replacen("{goal}", &goal, 1)
        }
        other => {
            let wrong = format!("no prompt is named {:?}", other.chars().take(80).collect::<String>());
            return Err(Problem::new(wrong, "There are orchestrate and delegate.").into_invalid_params());
        }
    };
    Ok(GetPromptResult::new(vec![PromptMessage::new_text(Role::User, text.trim_end())]))
}

fn chosen(dispatcher: &Dispatcher, names: &str) -> Result<String, ErrorData> {
    let mut snapshot = crate::registry::Snapshot::default();
    for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let agent = agents::find(dispatcher, name).map_err(Problem::into_invalid_params)?;
        let name: AgentName = agent.manifest.name.clone();
        snapshot.agents.insert(name, agent);
    }
    Ok(agents::described(&snapshot, dispatcher.config().mcp.agents_described_max))
}
