//! Which scope each request needs.

use crate::model::access::Scope;

/// The scope that a request needs, by its method and, for a call, its tool. A tool that is not known needs the most that any does.
pub fn needs(method: &str, tool: Option<&str>) -> Scope {
    match (method, tool) {
        ("tools/call", Some("list_available_agents" | "get_agent_schema" | "check_work" | "await_work")) => Scope::Read,
        ("tools/call", _) | ("tasks/update", _) => Scope::Assign,
        _ => Scope::Read,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_something_needs_more_than_looking() {
        for tool in ["assign_work", "cancel_work", "answer_work", "escalate", "a_tool_of_tomorrow"] {
            assert_eq!(needs("tools/call", Some(tool)), Scope::Assign, "{tool}");
        }
        for tool in ["list_available_agents", "get_agent_schema", "check_work", "await_work"] {
            assert_eq!(needs("tools/call", Some(tool)), Scope::Read, "{tool}");
        }
        assert_eq!((needs("tools/list", None), needs("tools/call", None)), (Scope::Read, Scope::Assign));
        assert_eq!((needs("tasks/get", None), needs("tasks/update", None)), (Scope::Read, Scope::Assign));
    }
}
