//! Questions that only a person may answer, put to them in their client's own form.
//!
//! An older client is asked while its call goes on (elicitation); a newer one gets the form as the result of its call, and calls
//! again with what the person said and with a sealed state that it can neither read into another request nor change. A form that is
//! closed, declined or filled in with nothing is no answer, and nothing else that a client sends is taken for one.

use std::sync::{MutexGuard, PoisonError};

use bytes::Bytes;
use rmcp::ErrorData;
use rmcp::model::{
    ClientResult, ElicitRequest, ElicitRequestParams, ElicitationAction, InputRequest, InputRequests, InputRequiredResult,
    RequestStateCodec, SealOptions, ServerRequest,
};
use rmcp::service::PeerRequestOptions;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::answer::Response;
use super::call::Call;
use super::problem::Problem;
use super::server::Server;
use crate::dispatcher::{Caller, Error, Reply};
use crate::model::access::Scope;
use crate::model::event::{Ask, Needs};
use crate::model::id::WorkId;
use crate::model::work::Work;
use crate::telemetry::new_secret;
use crate::transport::{self, Bucket, Expect, Reach, SEAL};

/// How much of an agent's question a form shows.
const QUESTION_MAX: usize = 4000;
/// How much of a question's context a form shows.
const CONTEXT_MAX: usize = 4000;
/// How many choices a form offers; with more it takes any text.
const CHOICES_MAX: usize = 50;
/// How many secrets that sealed something are remembered.
const SECRETS_MAX: usize = 8;
/// How many questions one wait remembers that a person did not answer.
const DECLINED_MAX: usize = 64;

/// A question of a work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Asked {
    pub(super) work_id: WorkId,
    pub(super) ask: u32,
}

/// What a newer client brings back.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// The question that its form was for.
    asked: Asked,
    /// Questions that a person has declined to answer since the first try.
    declined: Vec<Asked>,
}

/// How a client can ask a person.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// While the call goes on.
    Elicit,
    /// As the result of the call, which is then tried again.
    Retry,
}

/// What came of a form.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Said {
    /// A person's answer.
    Answer(Value),
    /// They did not want to answer, or closed the form.
    Nothing,
}

/// What came of asking a person.
pub(super) enum Came {
    /// The question is answered, by them or by somebody who was quicker.
    Answered,
    /// They did not answer.
    Declined,
    /// The form could not be shown, or stood there for too long.
    Failed(String),
}

impl Asked {
    /// The key of its form among several.
    pub(super) fn key(self) -> String {
        format!("{}/{}", self.work_id, self.ask)
    }

    /// The questions that a work is waiting with for a person.
    pub(super) fn of_person(work: &Work) -> impl Iterator<Item = (Self, &Ask)> {
        Self::open(work).filter(|(_, ask)| ask.needs == Needs::Human)
    }

    /// The questions that a work is waiting with.
    pub(super) fn open(work: &Work) -> impl Iterator<Item = (Self, &Ask)> {
        work.open_questions().map(|ask| (Self { work_id: work.work_id, ask: ask.ask }, ask))
    }
}

impl Server {
    /// How this call's client can ask a person; an agent is none, whatever its client can show.
    pub(super) fn way(&self, call: &Call) -> Option<Way> {
        let is_agent = call.caller(&self.connection().caller).work().is_some();
        let way = if call.is_modern() { Way::Retry } else { Way::Elicit };
        (call.takes_forms() && !is_agent && self.may_answer(call)).then_some(way)
    }

    /// Whoever may only look is shown no forms.
    fn may_answer(&self, call: &Call) -> bool {
        call.caller(&self.connection().caller).may(Scope::Assign)
    }

    /// What a second try brings back: its answer is given, and the questions that were declined are remembered.
    pub(super) async fn resume(&self, call: &mut Call) -> Result<Vec<Asked>, Response> {
        let refuse = |text: &str| Response::Refused(ErrorData::invalid_params(text.to_owned(), None));
        let responses = call.input_responses.take().unwrap_or_default();
        if !responses.is_empty() && !self.may_answer(call) {
            return Err(refuse("inputResponses answer an agent's question, which needs the scope assign"));
        }
        let Some(sealed) = call.request_state.take() else {
            return if responses.is_empty() {
                Ok(Vec::new())
            } else {
                Err(refuse("inputResponses came without the requestState of the form that they answer: call again without either"))
            };
        };
        let opened = match self.open_sealed(&sealed, &self.binding(call)).await {
            Ok(opened) => opened,
            Err(Unopened::Unread(error)) => return Err(Response::Problem(error.into())),
            Err(Unopened::Refused(error)) => {
                tracing::warn!(%error, "a client brought back a request state that is not ours");
                let text =
                    format!("requestState is not what this server gave for this very request and caller ({error}); call again without it");
                return Err(refuse(&text));
            }
        };
        let State { asked, mut declined } = opened;
        let Some(response) = responses.get(&asked.key()) else {
            return Err(refuse(&format!("inputResponses lacks {:?}, which the form was for", asked.key())));
        };
        match read(response).map_err(|text| refuse(&format!("inputResponses {:?}: {text}", asked.key())))? {
            Said::Answer(value) => match self.take_word(&call.caller(&self.connection().caller), asked, value).await {
                Ok(()) => {}
                Err(problem) => return Err(Response::Problem(problem)),
            },
            Said::Nothing => declined.push(asked),
        }
        Ok(declined)
    }

    /// A form as the result of a newer client's call.
    pub(super) async fn form_result(&self, call: &Call, work: &Work, ask: &Ask, mut declined: Vec<Asked>) -> Result<Response, Problem> {
        let asked = Asked { work_id: work.work_id, ask: ask.ask };
        declined.truncate(DECLINED_MAX);
        let state = State { asked, declined };
        let binding = self.binding(call);
        let ttl = self.dispatcher().config().lattice.work.answer_timeout.get();
        let options = SealOptions::new().associated_data(&binding).ttl(ttl);
        let sealed = codec(&self.secret().await?)?.seal_json_with(&state, &options);
        let sealed = sealed.map_err(|error| Problem::new(format_args!("the form could not be made: {error}"), ""))?;
        let requests = InputRequests::from([(asked.key(), InputRequest::Elicitation(ElicitRequest::new(form(work, ask)?)))]);
        Ok(Response::Form(InputRequiredResult::new(Some(requests), Some(sealed))))
    }

    /// Asks a person through an older client, while its call goes on; a question that somebody else answers meanwhile is taken back.
    pub(super) async fn elicit(&self, call: &Call, work: &Work, ask: &Ask) -> Result<Came, Problem> {
        let asked = Asked { work_id: work.work_id, ask: ask.ask };
        let request = ServerRequest::ElicitRequest(ElicitRequest::new(form(work, ask)?));
        let caller = call.caller(&self.connection().caller);
        let patience = self.dispatcher().config().mcp.form_timeout.get();
        let (_tell, heard) = mpsc::channel(1);
        let asking = async {
            let mut handle = match call.peer.send_cancellable_request(request, PeerRequestOptions::no_options()).await {
                Ok(handle) => handle,
                Err(error) => return Ok(Came::Failed(error.to_string())),
            };
            let taken_back = |why: &str| Some(why.to_owned());
            tokio::select! {
                response = &mut handle.rx => match response {
                    Ok(Ok(ClientResult::ElicitResult(result))) => self.heed(&caller, asked, &json!(result)).await,
                    Ok(Ok(other)) => self.heed(&caller, asked, &serde_json::to_value(&other).unwrap_or_default()).await,
                    Ok(Err(error)) => Ok(Came::Failed(error.to_string())),
                    Err(_) => Ok(Came::Failed("the client is gone".into())),
                },
                closed = self.dispatcher().while_open(asked.work_id, asked.ask, patience) => {
                    let is_open = closed.as_deref().is_ok_and(|work| Asked::open(work).any(|(open, _)| open == asked));
                    let why = if is_open { "nobody filled in the form in time" } else { "the question is not open any more" };
                    let _ = handle.cancel(taken_back(why)).await;
                    closed?;
                    Ok(if is_open { Came::Failed(why.into()) } else { Came::Answered })
                }
                () = call.ct.cancelled() => {
                    let _ = handle.cancel(taken_back("the call was cancelled")).await;
                    Ok(Came::Failed("the call was cancelled".into()))
                }
            }
        };
        self.heard(call, heard, asking).await.unwrap_or_else(|| Ok(Came::Failed("the call ended".into())))
    }

    async fn heed(&self, caller: &Caller, asked: Asked, response: &Value) -> Result<Came, Problem> {
        match read(response) {
            Ok(Said::Answer(value)) => self.take_word(caller, asked, value).await.map(|()| Came::Answered),
            Ok(Said::Nothing) => Ok(Came::Declined),
            Err(text) => Ok(Came::Failed(text)),
        }
    }

    /// Gives a person's answer to the very question that they were shown.
    pub(super) async fn take_word(&self, caller: &Caller, asked: Asked, value: Value) -> Result<(), Problem> {
        let reply = Reply { value, ask: Some(asked.ask), who: Needs::Human };
        match self.dispatcher().answer(caller, asked.work_id, reply).await {
            Ok(_) => Ok(()),
            Err(error @ (Error::AnsweredAlready { .. } | Error::NotEscalated { .. } | Error::OtherQuestion { .. })) => {
                let wrong = format!("what the user said in the form was not taken: {error}");
                Err(Problem::new(wrong, &format!("Tell the user, and go on with await_work {}.", asked.work_id)))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The secret that seals what a client brings back: the one that all processes of the lattice share.
    async fn secret(&self) -> Result<Bytes, transport::Error> {
        // As long as the server is away, it stays what it was.
        if self.dispatcher().away().is_some()
            && let Some(last) = self.secrets().last()
        {
            return Ok(last.clone());
        }
        let table = &self.dispatcher().transport().table;
        let secret = loop {
            if let Some(row) = table.get(Bucket::Keys, SEAL).await? {
                break row.value;
            }
            match table.put(Bucket::Keys, SEAL, Bytes::from(new_secret()), Expect::Absent, None).await {
                Ok(_) | Err(transport::Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        };
        let mut secrets = self.secrets();
        if secrets.last() != Some(&secret) {
            secrets.push(secret.clone());
            let surplus = secrets.len().saturating_sub(SECRETS_MAX);
            secrets.drain(..surplus);
        }
        Ok(secret)
    }

    fn secrets(&self) -> MutexGuard<'_, Vec<Bytes>> {
        self.connection().shared.secrets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens what was sealed, under the secret that is in use or one that was while the server was away, here or elsewhere.
    async fn open_sealed(&self, sealed: &str, binding: &[u8]) -> Result<State, Unopened> {
        let open = |secret: &Bytes| codec(secret).map(|codec| codec.open_json_with::<State>(sealed, binding));
        let refused = match open(&self.secret().await?)? {
            Ok(state) => return Ok(state),
            Err(refused) => refused,
        };
        let mut others = self.secrets().clone();
        let transport = self.dispatcher().transport();
        if *transport.reach.borrow() == Reach::Connected {
            others.extend(transport.table.list_of(Bucket::Keys, SEAL).await?.into_iter().map(|row| row.value));
        }
        for secret in &others {
            if let Ok(Ok(state)) = open(secret) {
                return Ok(state);
            }
        }
        Err(Unopened::Refused(refused.to_string()))
    }

    /// What a sealed state is bound to: who calls, and what for.
    fn binding(&self, call: &Call) -> Vec<u8> {
        let mut binding = who(&call.caller(&self.connection().caller)).into_bytes();
        binding.push(0);
        binding.extend(call.digest);
        binding
    }
}

/// Why a sealed state was not opened.
enum Unopened {
    /// It is not ours.
    Refused(String),
    /// The secrets could not be read.
    Unread(transport::Error),
}

impl From<transport::Error> for Unopened {
    fn from(error: transport::Error) -> Self {
        Self::Unread(error)
    }
}

fn codec(secret: &Bytes) -> Result<RequestStateCodec, transport::Error> {
    RequestStateCodec::try_new(secret.to_vec()).map_err(|error| transport::Error::Store(format!("the row {SEAL}: {error}").into()))
}

/// Tells a caller from any other: whoever has a name of their own is the same at every door, everybody else is told by where they work.
pub(super) fn who(caller: &Caller) -> String {
    let principal = caller.access().and_then(|access| access.principal.as_ref()).filter(|_| caller.work().is_none());
    principal.map_or_else(|| who_there(caller), |principal| format!("principal {principal}"))
}

/// The same for a caller at one door, where they work: how earlier versions told all of them apart.
pub(super) fn who_there(caller: &Caller) -> String {
    match (caller.work(), caller.owner()) {
        (Some(bound), _) => format!("run {}", bound.run_id),
        (None, Some(owner)) => format!("owner {}", owner.as_str()),
        (None, None) => "nobody".into(),
    }
}

/// The form for a question: whose it is, what they ask, and one field.
pub(super) fn form(work: &Work, ask: &Ask) -> Result<ElicitRequestParams, Problem> {
    let agent = work.assignment.as_ref().map_or_else(|| "An agent".to_owned(), |order| format!("Agent {}", order.agent_name));
    let mut message = format!("{agent} asks (work {}, question {}):\n\n{}", work.work_id, ask.ask, visible(&ask.reason, QUESTION_MAX));
    if !ask.context.is_null() {
        let context = serde_json::to_string_pretty(&ask.context).unwrap_or_default();
        message.push_str("\n\n");
        message.push_str(&visible(&context, CONTEXT_MAX));
    }
    let mut field = json!({"type": "string", "title": "Answer", "description": "What the agent is told"});
    match choices(ask) {
        Some(choices) => field["enum"] = choices,
        None => field["minLength"] = 1.into(),
    }
    let params = json!({
        "mode": "form",
        "message": message,
        "requestedSchema": {"type": "object", "properties": {"answer": field}, "required": ["answer"]},
    });
    serde_json::from_value(params).map_err(|error| {
        tracing::error!(%error, "a form could not be made");
        Problem::new("the form for this question could not be made", "Ask the user yourself, and pass on what they say with answer_work.")
    })
}

/// What an agent lets choose from, in the context of its question.
fn choices(ask: &Ask) -> Option<Value> {
    let choices = ask.context.get("choices")?.as_array()?;
    let fits =
        (1..=CHOICES_MAX).contains(&choices.len()) && choices.iter().all(|choice| choice.as_str().is_some_and(|text| !text.is_empty()));
    fits.then(|| choices.clone().into())
}

/// An agent's text as a person may be shown it: no control characters but line ends, and not too long.
fn visible(text: &str, max: usize) -> String {
    let hidden = |c: &char| {
        (c.is_control() && *c != '\n')
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
    };
    let mut shown: String = text.chars().filter(|c| !hidden(c)).take(max).collect();
    if text.chars().count() > max {
        shown.push('…');
    }
    shown
}

/// What a person said in a form: only an accepted form with a text in it is an answer.
pub(super) fn read(response: &Value) -> Result<Said, String> {
    let action = serde_json::from_value::<ElicitationAction>(response["action"].clone())
        .map_err(|_| "action must be \"accept\", \"decline\" or \"cancel\"".to_owned())?;
    if action != ElicitationAction::Accept {
        return Ok(Said::Nothing);
    }
    match &response["content"]["answer"] {
        Value::String(text) if text.trim().is_empty() => Ok(Said::Nothing),
        Value::String(text) => Ok(Said::Answer(text.as_str().into())),
        _ => Err("an accepted form has content with the text `answer`".into()),
    }
}

/// What is said when a form came to nothing.
pub(super) fn no_answer(came: &Came) -> Option<String> {
    match came {
        Came::Answered => None,
        Came::Declined => Some("the client was given the question for its user and brought back no answer; it stays open".into()),
        Came::Failed(why) => Some(format!("the user could not be shown the question ({why}); it stays open")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_accepted_form_with_a_text_is_an_answer() {
        assert_eq!(read(&json!({"action": "accept", "content": {"answer": "go"}})), Ok(Said::Answer(json!("go"))));
        for nothing in [
            json!({"action": "decline"}),
            json!({"action": "cancel", "content": {"answer": "yes"}}),
            json!({"action": "accept", "content": {"answer": "  "}}),
        ] {
            assert_eq!(read(&nothing), Ok(Said::Nothing), "{nothing}");
        }
        for bad in [
            json!(null),
            json!("yes"),
            json!(true),
            json!({}),
            json!({"action": "ACCEPT"}),
            json!({"action": "accept"}),
            json!({"action": "accept", "content": "yes"}),
            json!({"action": "accept", "content": {"answer": true}}),
            json!({"answer": "yes"}),
        ] {
            assert!(read(&bad).is_err(), "{bad} was taken for something");
        }
    }

    #[test]
    fn a_form_shows_the_question_without_tricks_and_offers_its_choices() {
        let ask = |context: Value| Ask {
            ask: 2,
            reason: format!("\u{1b}[2Jmay\u{202e} I?\n{}", "x".repeat(9000)),
            context,
            needs: Needs::Human,
            parked: false,
        };
        let run = crate::model::id::RunId::root_of(uuid::Uuid::from_u128(1));
        let event = crate::model::event::Event {
            work_id: WorkId::new(uuid::Uuid::from_u128(1)),
            run_id: run,
            at: crate::model::time::Timestamp::from_millis(0),
            station: "here".parse().unwrap(),
            instance: crate::telemetry::new_instance(),
            side: crate::model::event::Side::Leaf,
            attempt: 1,
            kind: crate::model::event::Kind::Accepted,
        };
        let work = Work::begin(&event);
        let shown = serde_json::to_value(form(&work, &ask(json!({"choices": ["yes", "no"]}))).unwrap()).unwrap();
        assert_eq!(shown["requestedSchema"]["properties"]["answer"]["enum"], json!(["yes", "no"]), "{shown}");
        let message = shown["message"].as_str().unwrap();
        assert!(message.contains("[2Jmay I?\nx") && message.contains('…') && !message.contains(['\u{1b}', '\u{202e}']), "{message}");
        assert!(message.len() < 9000);
        for context in [json!({"choices": []}), json!({"choices": [1]}), json!({"choices": "yes"}), json!(5), Value::Null] {
            let shown = serde_json::to_value(form(&work, &ask(context)).unwrap()).unwrap();
            assert_eq!(shown["requestedSchema"]["properties"]["answer"]["enum"], Value::Null, "{shown}");
        }
    }
}
