//! What happens to the lattice itself, apart from works: stations and agents that come and go.
//!
//! Each fact is told once, by whoever did it: a station says that it joined or left, whoever wins a compare-and-set on a name
//! says so, and that a station is lost is said by the one observer who was the first to write it down.

use serde::{Deserialize, Serialize};

use super::access::Principal;
use super::id::{AgentName, InstanceId, LatticeId, StationId};
use super::time::Timestamp;

/// One fact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// When, by the clock of who says so.
    pub at: Timestamp,
    /// The lattice.
    pub lattice: LatticeId,
    /// The station that it is about.
    pub station: StationId,
    /// The process of that station.
    pub instance: InstanceId,
    /// What happened.
    pub kind: Kind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A process of the station began to take part.
    Joined,
    /// It said goodbye.
    Left,
    /// Its sign of life expired.
    Lost {
        /// The station that noticed.
        observer: StationId,
    },
    /// Its sign of life had expired, and it goes on all the same.
    Back,
    /// The station holds an agent's name that nobody held.
    Registered(AgentName),
    /// The agent that it holds is described anew.
    Changed(AgentName),
    /// It gave the name back.
    Withdrawn(AgentName),
    /// It holds the name of a station that was gone.
    TakenOver {
        /// The agent.
        agent: AgentName,
        /// Who held it.
        from: StationId,
    },
    /// It runs the agent for its own callers only: somebody else holds the name.
    Refused {
        /// The agent.
        agent: AgentName,
        /// Who holds it.
        holder: StationId,
    },
    /// The station's HTTP door refused a request.
    Turned(Turned),
    /// A type of another version, and the agent that it names.
    Other(String, Option<AgentName>),
}

/// A request that a door refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turned {
    /// The address that it came from.
    pub peer: String,
    /// What was wrong, in a word: `host`, `origin`, `credentials`, `issuer`, `scope`, `session`, `gone`, `rate`, `connections`,
    /// `streams`, `sessions`, `head`, `size`, `body`, `message`, `method`, `path`, `stopping` or `internal`.
    pub cause: String,
    /// Who came, where that was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub principal: Option<Principal>,
    /// How many others were refused before it, and not told of one by one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub untold: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Why bytes are not a fact.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not the JSON of a fact.
    #[error("not an audit record: {0}")]
    Json(#[from] serde_json::Error),
    /// A field that this type of fact needs is absent.
    #[error("a {kind} has no {field}")]
    Missing {
        /// The fact's type.
        kind: String,
        /// The field.
        field: &'static str,
    },
}

impl Kind {
    /// The type's name on the wire: a noun and a verb.
    pub fn wire_type(&self) -> &str {
        match self {
            Self::Joined => "station.joined",
            Self::Left => "station.left",
            Self::Lost { .. } => "station.lost",
            Self::Back => "station.back",
            Self::Registered(_) => "agent.registered",
            Self::Changed(_) => "agent.changed",
            Self::Withdrawn(_) => "agent.withdrawn",
            Self::TakenOver { .. } => "agent.taken_over",
            Self::Refused { .. } => "agent.refused",
            Self::Turned(_) => "request.refused",
            Self::Other(kind, _) => kind,
        }
    }

    /// The type's noun and verb.
    pub fn noun_and_verb(&self) -> (&str, &str) {
        self.wire_type().split_once('.').unwrap_or((self.wire_type(), ""))
    }

    /// The agent that it is about.
    pub fn agent(&self) -> Option<&AgentName> {
        match self {
            Self::Registered(agent) | Self::Changed(agent) | Self::Withdrawn(agent) => Some(agent),
            Self::TakenOver { agent, .. } | Self::Refused { agent, .. } => Some(agent),
            Self::Other(_, agent) => agent.as_ref(),
            Self::Joined | Self::Left | Self::Lost { .. } | Self::Back | Self::Turned(_) => None,
        }
    }
}

/// The flat shape that every fact has on the wire.
#[derive(Serialize, Deserialize)]
struct Wire {
    #[serde(rename = "type")]
    kind: String,
    at: Timestamp,
    lattice: LatticeId,
    station: StationId,
    instance_id: InstanceId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    agent: Option<AgentName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    observer: Option<StationId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    from: Option<StationId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    holder: Option<StationId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request: Option<Turned>,
}

impl Fact {
    /// The fact as JSON bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut wire = Wire {
            kind: self.kind.wire_type().to_owned(),
            at: self.at,
            lattice: self.lattice.clone(),
            station: self.station.clone(),
            instance_id: self.instance,
            agent: self.kind.agent().cloned(),
            observer: None,
            from: None,
            holder: None,
            request: None,
        };
        match &self.kind {
            Kind::Lost { observer } => wire.observer = Some(observer.clone()),
            Kind::TakenOver { from, .. } => wire.from = Some(from.clone()),
            Kind::Refused { holder, .. } => wire.holder = Some(holder.clone()),
            Kind::Turned(turned) => wire.request = Some(turned.clone()),
            _ => {}
        }
        // A `Wire` has string keys only, so writing it into memory does not fail.
        serde_json::to_vec(&wire).unwrap_or_default()
    }

    /// Reads a fact; unknown fields are ignored, unknown types kept as `Other`.
    ///
    /// # Errors
    /// What is missing or malformed.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let Wire { kind, at, lattice, station, instance_id, agent, observer, from, holder, request } = serde_json::from_slice(bytes)?;
        let missing = |field| Error::Missing { kind: kind.clone(), field };
        let named = |agent: Option<AgentName>| agent.ok_or_else(|| missing("agent"));
        let kind = match kind.as_str() {
            "station.joined" => Kind::Joined,
            "station.left" => Kind::Left,
            "station.lost" => Kind::Lost { observer: observer.ok_or_else(|| missing("observer"))? },
            "station.back" => Kind::Back,
            "agent.registered" => Kind::Registered(named(agent)?),
            "agent.changed" => Kind::Changed(named(agent)?),
            "agent.withdrawn" => Kind::Withdrawn(named(agent)?),
            "agent.taken_over" => Kind::TakenOver { agent: named(agent)?, from: from.ok_or_else(|| missing("from"))? },
            "agent.refused" => Kind::Refused { agent: named(agent)?, holder: holder.ok_or_else(|| missing("holder"))? },
            "request.refused" => Kind::Turned(request.ok_or_else(|| missing("request"))?),
            _ => Kind::Other(kind, agent),
        };
        Ok(Self { at, lattice, station, instance: instance_id, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(kind: Kind) -> Fact {
        let instance = "0198f2c4-7d3e-7000-8000-1b2c3d4e5f60".parse().unwrap();
        Fact { at: Timestamp::from_millis(1), lattice: "default".parse().unwrap(), station: "north".parse().unwrap(), instance, kind }
    }

    #[test]
    fn facts_survive_the_wire() {
        let agent = || "scanner".parse::<AgentName>().unwrap();
        let west = || "west".parse::<StationId>().unwrap();
        let kinds = [
            Kind::Joined,
            Kind::Left,
            Kind::Lost { observer: west() },
            Kind::Back,
            Kind::Registered(agent()),
            Kind::Changed(agent()),
            Kind::Withdrawn(agent()),
            Kind::TakenOver { agent: agent(), from: west() },
            Kind::Refused { agent: agent(), holder: west() },
            Kind::Turned(Turned { peer: "10.0.0.9".into(), cause: "scope".into(), principal: Principal::of_token("ci"), untold: 3 }),
            Kind::Other("lease.taken".into(), None),
        ];
        for kind in kinds {
            let fact = fact(kind);
            assert_eq!(Fact::from_bytes(&fact.to_bytes()).unwrap(), fact);
        }
    }

    #[test]
    fn fields_and_types_of_other_versions_are_tolerated() {
        let joined = r#"{"type":"station.joined","at":"1970-01-01T00:00:00.001Z","lattice":"default","station":"north",
            "instance_id":"0198f2c4-7d3e-7000-8000-1b2c3d4e5f60","mood":{"good":true}}"#;
        assert_eq!(Fact::from_bytes(joined.as_bytes()).unwrap(), fact(Kind::Joined));
        let dreamt = joined.replace("station.joined", "agent.dreamt");
        assert_eq!(Fact::from_bytes(dreamt.as_bytes()).unwrap().kind, Kind::Other("agent.dreamt".into(), None));
        assert!(Fact::from_bytes(joined.replace("station.joined", "agent.registered").as_bytes()).is_err());
        assert!(Fact::from_bytes(b"nonsense").is_err());
    }
}
