//! Tools that show agents, and how agents are described to a model.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};
use rmcp::{tool, tool_router};
use serde_json::{Map, Value, json};

use super::answer::{Answer, fields, object};
use super::call::Call;
use super::problem::Problem;
use super::server::Server;
use crate::config::Config;
use crate::dispatcher::Dispatcher;
use crate::model::agent::Manifest;
use crate::model::id::{AgentName, StationId};
use crate::model::size::Size;
use crate::model::time::Timestamp;
use crate::registry::{Agent, Snapshot};
use crate::transport::{LaneLoad, Queue};

/// How many agents one answer lists.
const LISTED_MAX: usize = 500;
/// How many stations are asked at once how busy they are.
const ASKED_AT_ONCE: usize = 32;
/// How much of an agent's description stands in a list.
const SHOWN_MAX: usize = 1000;
/// How much of an agent's description stands in the description of `assign_work`.
const DESCRIBED_MAX: usize = 200;

#[tool_router(router = agent_tools, vis = "pub(super)")]
impl Server {
    #[tool(
        name = "list_available_agents",
        title = "List agents",
        description = "Lists the agents that can be given work: what each does, where it runs, whether it is online, and its load. \
                       Use it to choose an agent.",
        input_schema = object(json!({
            "capability": {"type": "string", "description": "Only agents with this capability"},
            "query": {"type": "string", "description": "Only agents whose name, description or capabilities contain these words"},
        }), &[]),
        output_schema = object(json!({
            "agents": {"type": "array", "items": {"type": "object", "properties": {
                "name": {"type": "string"}, "description": {"type": "string"},
                "location": {"type": "string", "description": "local, or the station's name"},
                "capabilities": {"type": "array", "items": {"type": "string"}},
                "input_schema": {"type": "object"}, "output_schema": {"type": "object"},
                "status": {"enum": ["online", "offline", "unavailable"]},
                "paused_until": {"type": "string", "description": "Out of quota until then"},
                "load": {"type": "object", "properties": {"running": {"type": "integer"}, "waiting": {"type": "integer"}}},
            }}},
            "note": {"type": "string"},
        }), &["agents"]),
        annotations(read_only_hint = true, open_world_hint = false)
    )]
    async fn list_available_agents(&self, mut call: Call) -> Result<Answer, Problem> {
        let capability = call.arguments.optional("capability")?.map(|text| text.trim().to_lowercase());
        let words: Vec<String> = call
            .arguments
            .optional("query")?
            .map(|text| text.to_lowercase().split_whitespace().map(str::to_owned).collect())
            .unwrap_or_default();
        let snapshot = self.dispatcher().registry().snapshot();
        let wanted: Vec<&Agent> =
            snapshot.agents.values().filter(|agent| matches(&agent.manifest, capability.as_deref(), &words)).collect();
        let loads = Loads::of(self.dispatcher(), wanted.iter().take(LISTED_MAX).copied()).await?;
        let room = self.dispatcher().config().results.selection_max.as_usize();
        let (agents, left_out) = list(&wanted, &loads, room);
        let shown = agents.len();
        let mut answer = fields(json!({ "agents": agents }));
        if let Some(note) = note(snapshot.agents.len(), wanted.len(), shown, left_out) {
            answer.insert("note".into(), note.into());
        }
        if let Some((since, reason)) = self.dispatcher().away() {
            answer.insert("unreachable".into(), super::report::unreachable(since, &reason).into());
        }
        Ok(Answer::new(answer))
    }

    #[tool(
        name = "get_agent_schema",
        title = "Show an agent",
        description = "Shows one agent in full: input and output schema, examples, limits. Use it before giving work with a context.",
        input_schema = object(json!({"agent_name": {"type": "string"}}), &["agent_name"]),
        output_schema = object(json!({
            "name": {"type": "string"}, "description": {"type": "string"},
            "input_schema": {"type": "object"}, "output_schema": {"type": "object"},
            "examples": {"type": "array", "items": {"type": "string"}}, "limits": {"type": "object"},
        }), &["name", "description", "input_schema", "limits"]),
        annotations(read_only_hint = true, open_world_hint = false)
    )]
    async fn get_agent_schema(&self, mut call: Call) -> Result<Answer, Problem> {
        let text = call.arguments.required("agent_name", "the name of an agent, as list_available_agents shows it")?;
        let agent = find(self.dispatcher(), &text)?;
        Ok(Answer::new(detailed(&agent, self.dispatcher().config())))
    }
}

/// The agent of a name that a client gave.
pub(super) fn find(dispatcher: &Dispatcher, text: &str) -> Result<Agent, Problem> {
    let name: AgentName = text.trim().parse()?;
    let snapshot = dispatcher.registry().snapshot();
    snapshot.agents.get(&name).cloned().ok_or_else(|| dispatcher.unknown_agent(name.as_str()).into())
}

/// An agent with everything that is known of it.
pub(super) fn detailed(agent: &Agent, config: &Config) -> Map<String, Value> {
    let manifest = &agent.manifest;
    let mut shown = listed(agent);
    shown.extend(schemas(manifest));
    if !manifest.examples.is_empty() {
        shown.insert("examples".into(), json!(manifest.examples));
    }
    let (work, limits) = (&config.lattice.work, &manifest.limits);
    let timeout = limits.timeout.unwrap_or(work.default_timeout);
    let mut known = fields(json!({
        "timeout": timeout,
        "queue_timeout": limits.queue.or(work.queue_timeout).unwrap_or(timeout),
        "silence_timeout": limits.silence.or(work.silence).unwrap_or(timeout),
        "max_parallel": limits.max_parallel.unwrap_or(work.max_parallel),
        "max_attempts": config.lattice.retry.policy().with(&manifest.retry, limits).max_attempts,
    }));
    if let Some(count) = limits.per_minute {
        known.insert("per_minute".into(), count.into());
    }
    shown.insert("limits".into(), known.into());
    shown
}

/// The lines that describe agents in `assign_work`, in the order of their names, in at most `max` characters.
pub(super) fn described(snapshot: &Snapshot, max: Size) -> String {
    const POINTER_MAX: usize = 80;
    if snapshot.agents.is_empty() {
        return "No agent is registered yet.".to_owned();
    }
    let mut text = String::from("Agents:");
    let mut shown = 0;
    let room = max.as_usize().saturating_sub(POINTER_MAX);
    let mut used = text.len();
    for (name, agent) in &snapshot.agents {
        let at = if agent.here { "local".to_owned() } else { format!("@{}", agent.station) };
        let line = format!("\n- **{name}** ({at}): {}", one_line(&agent.manifest.description, DESCRIBED_MAX));
        let len = line.chars().count();
        if used + len > room {
            break;
        }
        used += len;
        shown += 1;
        text.push_str(&line);
    }
    let more = snapshot.agents.len() - shown;
    if more > 0 {
        let _ = write!(text, "\n{more} more: call list_available_agents.");
    }
    text
}

/// A text from a file as one line: no control characters, and cut when it is long.
pub(super) fn one_line(text: &str, max: usize) -> String {
    let invisible =
        |c: char| c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
    let visible: String = text.chars().map(|c| if invisible(c) { ' ' } else { c }).collect();
    let line = visible.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= max { line } else { line.chars().take(max.saturating_sub(1)).chain("…".chars()).collect() }
}

fn listed(agent: &Agent) -> Map<String, Value> {
    let manifest = &agent.manifest;
    let location = if agent.here { "local" } else { agent.station.as_str() };
    let mut shown = fields(json!({
        "name": manifest.name.as_str(),
        "description": manifest.description,
        "location": location,
        "capabilities": manifest.capabilities,
        "status": match (&manifest.unavailable, agent.online) {
            (Some(_), _) => "unavailable",
            (None, true) => "online",
            (None, false) => "offline",
        },
    }));
    if let Some(reason) = &manifest.unavailable {
        shown.insert("reason".into(), reason.as_str().into());
    }
    shown
}

fn schemas(manifest: &Manifest) -> Map<String, Value> {
    let mut schemas = Map::new();
    schemas.insert("input_schema".into(), schema_object(manifest.input_schema.as_ref()).unwrap_or_else(|| json!({"type": "object"})));
    if let Some(schema) = schema_object(manifest.output_schema.as_ref()) {
        schemas.insert("output_schema".into(), schema);
    }
    schemas
}

/// A schema as an object: `true` and `false` are schemas as well.
fn schema_object(schema: Option<&Value>) -> Option<Value> {
    Some(match schema? {
        Value::Bool(false) => json!({"not": {}}),
        Value::Object(schema) => Value::Object(schema.clone()),
        _ => json!({}),
    })
}

fn matches(manifest: &Manifest, capability: Option<&str>, words: &[String]) -> bool {
    let capable = capability.is_none_or(|wanted| manifest.capabilities.iter().any(|known| known.to_lowercase() == wanted));
    if !capable || words.is_empty() {
        return capable;
    }
    let text = format!("{} {} {}", manifest.name, manifest.description, manifest.capabilities.join(" ")).to_lowercase();
    words.iter().all(|word| text.contains(word.as_str()))
}

/// As many agents as there is room for, with as many of their schemas as there is room for then, and whether schemas are missing.
fn list(wanted: &[&Agent], loads: &Loads, mut room: usize) -> (Vec<Value>, bool) {
    let mut agents = Vec::with_capacity(wanted.len().min(LISTED_MAX));
    for agent in wanted.iter().take(LISTED_MAX) {
        let mut shown = listed(agent);
        let description = &agent.manifest.description;
        if description.chars().count() > SHOWN_MAX {
            let cut: String = description.chars().take(SHOWN_MAX).chain("…".chars()).collect();
            shown.insert("description".into(), cut.into());
        }
        let (running, waiting) = loads.get(agent);
        shown.insert("load".into(), json!({ "running": running, "waiting": waiting }));
        if let Some(until) = loads.paused_until(agent) {
            shown.insert("paused_until".into(), until.to_string().into());
        }
        let size = json!(shown).to_string().len();
        // An answer that shows no agent would help nobody.
        if size > room && !agents.is_empty() {
            break;
        }
        room = room.saturating_sub(size);
        agents.push(shown);
    }
    let mut left_out = false;
    for (shown, agent) in agents.iter_mut().zip(wanted) {
        let schemas = schemas(&agent.manifest);
        let size = json!(schemas).to_string().len();
        if size <= room {
            room -= size;
            shown.extend(schemas);
        } else {
            left_out = true;
        }
    }
    (agents.into_iter().map(Value::Object).collect(), left_out)
}

fn note(known: usize, wanted: usize, shown: usize, schemas_left_out: bool) -> Option<String> {
    if known == 0 {
        return Some("no agent is registered yet: the user adds agent files to ./agents, or runs `lattice-mcp init`".into());
    }
    if wanted == 0 {
        return Some(format!("no agent fits; call again without capability and query to see all {known}"));
    }
    if wanted > shown {
        return Some(format!("{} more are not shown: narrow the list with capability or query", wanted - shown));
    }
    schemas_left_out.then(|| "some schemas are left out: get_agent_schema shows them".into())
}

async fn ask(queue: Arc<dyn Queue>, station: StationId) -> Result<(StationId, Vec<LaneLoad>), Problem> {
    let lanes = queue.load(&station).await?;
    Ok((station, lanes))
}

/// How full the stations' lanes are.
pub(super) struct Loads(HashMap<StationId, HashMap<String, LaneLoad>>);

impl Loads {
    /// Asks once for each station, of many at a time.
    pub(super) async fn of(dispatcher: &Dispatcher, agents: impl Iterator<Item = &Agent>) -> Result<Self, Problem> {
        let stations: BTreeSet<StationId> = agents.map(|agent| agent.station.clone()).collect();
        let queue = &dispatcher.transport().queue;
        let asked = stations.into_iter().map(|station| ask(Arc::clone(queue), station)).collect::<Vec<_>>();
        let loads: Vec<_> = stream::iter(asked).buffer_unordered(ASKED_AT_ONCE).try_collect().await?;
        let by_lane = |lanes: Vec<LaneLoad>| lanes.into_iter().map(|load| (load.lane.clone(), load)).collect();
        Ok(Self(loads.into_iter().map(|(station, lanes)| (station, by_lane(lanes))).collect()))
    }

    fn lane(&self, agent: &Agent) -> Option<&LaneLoad> {
        self.0.get(&agent.station).and_then(|lanes| lanes.get(&agent.lane))
    }

    /// Until when an agent pauses.
    pub(super) fn paused_until(&self, agent: &Agent) -> Option<Timestamp> {
        self.lane(agent).and_then(|load| load.paused_until)
    }

    fn get(&self, agent: &Agent) -> (u32, u32) {
        self.lane(agent).map_or((0, 0), |load| (load.held, load.waiting))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(count: usize, description: &str) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for n in 0..count {
            let name: AgentName = format!("agent-{n:04}").parse().unwrap();
            let manifest = crate::mcp::tests::manifest(name.as_str(), description);
            let agent = Agent { manifest, station: "far".parse().unwrap(), lane: name.to_string(), here: n % 2 == 0, online: true };
            snapshot.agents.insert(name, agent);
        }
        snapshot
    }

    #[test]
    fn agents_are_described_in_a_stable_order_with_their_place() {
        assert_eq!(
            described(&snapshot(2, "Finds\n  known CVEs"), Size::kib(4)),
            "Agents:\n- **agent-0000** (local): Finds known CVEs\n- **agent-0001** (@far): Finds known CVEs"
        );
        assert_eq!(described(&Snapshot::default(), Size::kib(4)), "No agent is registered yet.");
    }

    #[test]
    fn the_description_has_a_cap_and_points_beyond_it() {
        for count in [30, 1000] {
            let text = described(&snapshot(count, &"wörd ".repeat(100)), Size::kib(4));
            assert!(text.chars().count() <= 4096, "{count}: {}", text.chars().count());
            assert!(text.ends_with("more: call list_available_agents."), "{text}");
        }
    }

    #[test]
    fn a_list_stays_within_its_room_and_says_what_it_leaves_out() {
        let loads = Loads(HashMap::new());
        for (count, description, most) in
            [(1, "x".repeat(90_000), 1), (1000, "does what it is told".to_owned(), 200), (30, "x".repeat(900), 30)]
        {
            let mut snapshot = snapshot(count, &description);
            for agent in snapshot.agents.values_mut() {
                agent.manifest.input_schema = Some(json!({"type": "object", "description": "y".repeat(400)}));
            }
            let wanted: Vec<&Agent> = snapshot.agents.values().collect();
            let (agents, left_out) = list(&wanted, &loads, 24 << 10);
            let size = json!(agents).to_string().len();
            assert!(size <= (24 << 10) + agents.len() + 2, "{count}: {size}");
            assert!((1..=most).contains(&agents.len()) && (count == 1 || left_out), "{count}: {} agents", agents.len());
            assert_eq!(note(count, count, agents.len(), left_out).is_some(), count > 1, "{count}");
        }
    }

    #[test]
    fn a_description_is_data_on_a_single_line() {
        assert_eq!(one_line("a\n\n- **fake** (local): x\u{202e}y\u{7}", 200), "a - **fake** (local): x y");
        assert_eq!(one_line(&"é".repeat(300), 200).chars().count(), 200);
    }

    #[test]
    fn agents_are_found_by_capability_and_words() {
        let mut manifest = crate::mcp::tests::manifest("sec-scan", "Finds known CVEs");
        manifest.capabilities = vec!["Security".into()];
        assert!(matches(&manifest, Some("security"), &[]));
        assert!(matches(&manifest, None, &["cves".into(), "sec".into()]));
        assert!(!matches(&manifest, Some("sec"), &[]));
        assert!(!matches(&manifest, None, &["cves".into(), "cooking".into()]));
    }
}
