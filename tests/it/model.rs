//! The laws of the model, over arbitrary event sequences: duplicated, reordered across attempts, and late.

use lattice_mcp::model::accept::{Check, Claim, What};
use lattice_mcp::model::after::{After, IfFailed};
use lattice_mcp::model::assignment::Assignment;
use lattice_mcp::model::budget::Usage;
use lattice_mcp::model::event::{Answerer, Ask, Event, Failure, FailureKind, Kind, Needs, Side};
use lattice_mcp::model::id::{InstanceId, RunId, WorkId};
use lattice_mcp::model::map;
use lattice_mcp::model::output::{BlobRef, Media, Output};
use lattice_mcp::model::status::Status;
use lattice_mcp::model::time::Timestamp;
use lattice_mcp::model::work::{Outcome, Work};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use uuid::Uuid;

fn work_id() -> WorkId {
    WorkId::new(Uuid::from_u128(0x0198_0000_0000_7000_8000_0000_0000_0001))
}

fn run_id() -> RunId {
    RunId::root_of(Uuid::from_u128(0x0198_0000_0000_7000_8000_0000_0000_0002)).child(1)
}

fn event(attempt: u32, at: i64, kind: Kind) -> Event {
    Event {
        work_id: work_id(),
        run_id: run_id(),
        at: Timestamp::from_millis(at),
        station: "north".parse().unwrap(),
        instance: InstanceId::new(Uuid::from_u128(u128::from(attempt))),
        side: if attempt == 0 { Side::Assigner } else { Side::Leaf },
        attempt,
        kind,
    }
}

fn assignment() -> Assignment {
    Assignment {
        work_id: work_id(),
        orchestrator_run_id: run_id(),
        parent_work_id: None,
        originating_station: "south".parse().unwrap(),
        target_station: "north".parse().unwrap(),
        agent_name: "scanner".parse().unwrap(),
        task: "scan".into(),
        context: Map::new(),
        input_ref: None,
        assigned_at: Timestamp::from_millis(1),
        timeout: lattice_mcp::model::time::Span::secs(300),
        queue_timeout: None,
        silence_timeout: None,
        priority: 0,
        trace_id: "0".repeat(32),
        span_id: "0".repeat(16),
        owner: None,
        principal: None,
        accept: None,
        budgets: vec![],
        redrives: None,
        after: None,
        map: None,
    }
}

fn failure() -> impl Strategy<Value = Failure> {
    let kinds = prop_oneof![
        Just(FailureKind::Agent),
        Just(FailureKind::Transient),
        Just(FailureKind::HandedBack),
        Just(FailureKind::Crashed),
        Just(FailureKind::TotalTimeout),
        Just(FailureKind::Refuted),
        Just(FailureKind::Budget)
    ];
    (kinds, "[a-z ]{0,12}", any::<Option<i32>>(), any::<bool>(), checks(false)).prop_map(
        |(kind, message, exit_code, dead_letter, checks)| Failure {
            exit_code,
            dead_letter,
            checks: if kind == FailureKind::Refuted { checks } else { vec![] },
            ..Failure::new(kind, message)
        },
    )
}

/// What was looked at; at least one thing that does not hold, or none such.
fn checks(hold: bool) -> impl Strategy<Value = Vec<Check>> {
    let check = (any::<Option<i32>>(), ".{0,8}", any::<bool>(), any::<bool>()).prop_map(move |(exit_code, output, ok, digest)| Check {
        exit_code,
        output,
        sha256: digest.then(|| "b".repeat(64)),
        ..Check::new(What::Command, ok || hold, "found")
    });
    proptest::collection::vec(check, 1..3).prop_map(move |mut checks| {
        checks[0].ok = hold;
        checks
    })
}

fn output() -> impl Strategy<Value = Output> {
    prop_oneof![
        any::<i32>().prop_map(|n| Output::Inline(json!(n))),
        ".{0,8}".prop_map(|text| Output::Inline(Value::String(text))),
        Just(Output::Inline(Value::Null)),
        Just(Output::Blob(BlobRef { sha256: "a".repeat(64), size: 9, media: Media::Json })),
    ]
}

fn kind() -> impl Strategy<Value = (bool, Kind)> {
    let ask = (1u32..4, any::<bool>(), ".{0,6}")
        .prop_map(|(ask, parked, reason)| Kind::Escalate(Ask { ask, reason, context: json!({"n": ask}), needs: Needs::Human, parked }));
    prop_oneof![
        1 => Just((true, Kind::Assigned(Box::new(assignment())))),
        4 => Just((false, Kind::Accepted)),
        4 => (proptest::option::of(0.0..100.0f64), proptest::option::of(".{0,6}")).prop_map(|(pct, message)| (false, Kind::Progress { pct, message })),
        1 => (output(), 0u64..99, proptest::option::of(checks(true)))
            .prop_map(|(result, duration_ms, checks)| (false, Kind::Complete { result, duration_ms, checks: checks.unwrap_or_default() })),
        2 => (0u64..9, 0u8..9, 0u64..9)
            .prop_map(|(tokens, cents, turns)| (false, Kind::Used(Usage { tokens, cost_usd: f64::from(cents) / 100.0, turns }))),
        1 => (failure(), 0u64..99).prop_map(|(failure, duration_ms)| (false, Kind::Failed { failure, duration_ms })),
        3 => ask.prop_map(|kind| (false, kind)),
        3 => (1u32..4, any::<i8>(), any::<u128>()).prop_map(|(ask, n, id)| {
            let by = Some(Answerer { who: Needs::Human, id: uuid::Uuid::from_u128(id) });
            (true, Kind::Answered { ask, answer: json!(n), by })
        }),
        3 => (failure(), 0i64..99).prop_map(|(failure, at)| (false, Kind::Retrying { failure, next_at: Timestamp::from_millis(at) })),
        1 => (any::<bool>(), proptest::option::of(".{0,6}")).prop_map(|(assigner, reason)| (assigner, Kind::Cancelled { reason })),
        1 => Just((true, Kind::Released)),
        1 => output().prop_map(|output| (false, Kind::Printed(output))),
        1 => Just((false, Kind::Other("WORK_DREAMT".into()))),
    ]
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let one = (1u32..4, 0i64..1000, kind()).prop_map(|(attempt, at, (assigner, kind))| event(if assigner { 0 } else { attempt }, at, kind));
    // Duplicates: each event may come again later, at an arbitrary place.
    (proptest::collection::vec(one, 0..24), proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..8))
        .prop_map(|(mut events, again)| {
            for (which, place) in again {
                if !events.is_empty() {
                    let twin = events[which.index(events.len())].clone();
                    events.insert(place.index(events.len() + 1), twin);
                }
            }
            events
        })
}

/// The order, and what happens to the work after it.
fn ordered() -> impl Strategy<Value = Vec<Event>> {
    events().prop_map(|events| [event(0, 0, Kind::Assigned(Box::new(assignment())))].into_iter().chain(events).collect())
}

/// What a station that was not given the work says of it, as a leaf.
fn strange() -> impl Strategy<Value = Event> {
    (0u32..9, 0i64..9999, kind()).prop_map(|(attempt, at, (_, kind))| Event {
        station: "stranger".parse().unwrap(),
        side: Side::Leaf,
        ..event(attempt, at, kind)
    })
}

fn attempt_of(status: Status) -> u32 {
    status.mark().map_or(u32::MAX, |mark| mark.attempt)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn only_an_answer_answers_a_question_and_the_first_one_stands(events in ordered()) {
        let mut work = Work::begin(&events[0]);
        for event in &events {
            let before = work.exchanges.clone();
            work.apply(event);
            for (number, now) in work.exchanges.iter().enumerate() {
                match before.get(number) {
                    Some(before) if before.answer.is_some() => {
                        prop_assert_eq!((&before.answer, &before.answered_by), (&now.answer, &now.answered_by));
                    }
                    _ if now.answer.is_some() => match &event.kind {
                        Kind::Answered { ask, answer, by } => {
                            prop_assert_eq!((*ask, Some(answer), by), (now.ask.ask, now.answer.as_ref(), &now.answered_by));
                        }
                        other => prop_assert!(false, "{other:?} answered a question"),
                    },
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn settled_work_never_changes(events in events()) {
        let mut work: Option<Work> = None;
        for event in &events {
            let before = work.clone();
            work.get_or_insert_with(|| Work::begin(event)).apply(event);
            let now = work.as_ref().unwrap();
            if let Some(before) = before.filter(|before| before.status.is_settled()) {
                prop_assert_eq!(before.status, now.status);
                prop_assert_eq!(&before.outcome, &now.outcome);
                prop_assert_eq!(before.settled_at, now.settled_at);
                prop_assert_eq!(&before.event, &now.event);
            }
            prop_assert_eq!(now.status.is_settled(), now.outcome.is_some());
            prop_assert_eq!(now.status.is_settled(), now.settled_at.is_some());
        }
    }

    #[test]
    fn the_first_settling_event_wins(events in events()) {
        let mut status = Status::default();
        for event in &events {
            let next = status.after(event, Some(1));
            if !status.is_settled() && next.is_settled() {
                let stands =
                    matches!((&event.kind, next), (Kind::Complete { .. }, Status::Complete) | (Kind::Failed { .. }, Status::Failed) | (_, Status::Cancelled));
                prop_assert!(stands, "{:?} made {:?}", event.kind, next);
            }
            status = next;
        }
        let delivered = events.iter().position(|event| matches!(event.kind, Kind::Complete { .. }));
        prop_assert!(delivered.is_none() || status.is_settled(), "a result came and the work is {:?}", status);
    }

    #[test]
    fn the_fold_does_not_depend_on_batching(events in events(), cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6)) {
        let whole = Work::fold(&events);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(events.len() + 1)).collect();
        cuts.extend([0, events.len()]);
        cuts.sort_unstable();
        let mut pieces: Option<Work> = None;
        for pair in cuts.windows(2) {
            for event in &events[pair[0]..pair[1]] {
                // Each event crosses the wire, and the status a store.
                let event = Event::from_bytes(&event.to_bytes(), event.side).unwrap();
                pieces.get_or_insert_with(|| Work::begin(&event)).apply(&event);
            }
            if let Some(work) = &mut pieces {
                work.status = serde_json::from_str(&serde_json::to_string(&work.status).unwrap()).unwrap();
            }
        }
        prop_assert_eq!(whole, pieces);
    }

    #[test]
    fn a_repeated_event_changes_no_status(events in events()) {
        let mut twice = Vec::new();
        for event in &events {
            twice.push(event.clone());
            let status = Work::fold(&twice).map(|work| work.status);
            twice.push(event.clone());
            prop_assert_eq!(status, Work::fold(&twice).map(|work| work.status), "{:?} came twice", event.kind);
        }
    }

    #[test]
    fn attempts_never_go_back(events in events()) {
        let mut status = Status::default();
        for event in &events {
            let next = status.after(event, None);
            prop_assert!(attempt_of(next) >= attempt_of(status));
            let older = event.attempt != 0 && event.attempt < attempt_of(status) && !status.is_settled();
            if older && !matches!(event.kind, Kind::Complete { .. }) {
                prop_assert_eq!(next, status, "attempt {} is over, and its {:?} counted", event.attempt, event.kind);
            }
            status = next;
        }
    }

    #[test]
    fn a_strangers_events_never_change_a_work(
        events in ordered(),
        strange in proptest::collection::vec((strange(), any::<prop::sample::Index>()), 1..8),
    ) {
        let mut disturbed = events.clone();
        for (event, place) in strange {
            disturbed.insert(1 + place.index(disturbed.len()), event);
        }
        prop_assert_eq!(Work::fold(&events), Work::fold(&disturbed));
    }

    #[test]
    fn a_leaf_cannot_take_the_assigners_part_nor_an_assigner_the_leafs(events in ordered(), at in 0i64..9999) {
        let as_leaf = |kind| Event { side: Side::Leaf, ..event(0, at, kind) };
        let as_assigner = |kind| Event { side: Side::Assigner, ..event(9, at, kind) };
        let elsewhere = Assignment { target_station: "stranger".parse().unwrap(), ..assignment() };
        let usurped = [
            as_leaf(Kind::Answered { ask: 1, answer: json!(1), by: None }),
            as_leaf(Kind::Cancelled { reason: None }),
            as_leaf(Kind::Assigned(Box::new(elsewhere))),
            as_assigner(Kind::Accepted),
            as_assigner(Kind::Printed(Output::Inline(json!("x")))),
            as_assigner(Kind::Progress { pct: None, message: None }),
            as_assigner(Kind::Complete { result: Output::Inline(json!(1)), duration_ms: 1, checks: vec![] }),
            as_assigner(Kind::Used(Usage { tokens: 1, ..Usage::default() })),
            as_assigner(Kind::Retrying { failure: Failure::new(FailureKind::Agent, "no"), next_at: Timestamp::from_millis(at) }),
        ];
        let work = Work::fold(&events).unwrap();
        for event in usurped {
            let mut after = work.clone();
            after.apply(&event);
            prop_assert_eq!(&work, &after, "{:?}", event);
        }
    }

    #[test]
    fn what_was_used_only_grows_and_comes_twice_without_counting_twice(events in ordered()) {
        let mut work = Work::fold(&events[..1]).unwrap();
        for event in &events[1..] {
            let before = work.usage();
            work.apply(event);
            let now = work.usage();
            prop_assert!(now.tokens >= before.tokens && now.turns >= before.turns && now.cost_usd >= before.cost_usd);
            let mut twice = work.clone();
            twice.apply(event);
            prop_assert_eq!(twice.usage(), now);
            if !matches!(event.kind, Kind::Used(_)) {
                prop_assert_eq!(now, before, "{:?} used something", event.kind);
            }
        }
        let told = |attempt: u32| events.iter().filter(move |event| event.attempt == attempt).filter_map(|event| match &event.kind {
            Kind::Used(used) => Some(used.tokens),
            _ => None,
        });
        prop_assert_eq!(work.usage().tokens, (1..4).map(|attempt| told(attempt).max().unwrap_or(0)).sum::<u64>());
    }

    #[test]
    fn a_claim_is_worth_what_its_checks_say(events in ordered()) {
        let work = Work::fold(&events).unwrap();
        match (&work.outcome, work.claim()) {
            (Some(Outcome::Complete(_)), Some(Claim::Claimed)) => prop_assert!(work.checks.is_empty()),
            (Some(Outcome::Complete(_)), Some(Claim::Verified)) => prop_assert!(work.checks.iter().all(|check| check.ok)),
            (Some(Outcome::Failed(failure)), Some(Claim::Refuted)) => prop_assert_eq!(failure.kind, FailureKind::Refuted),
            (Some(Outcome::Failed(failure)), None) => prop_assert!(failure.kind != FailureKind::Refuted),
            (outcome, Some(claim)) => prop_assert!(claim == Claim::Refuted && !matches!(outcome, Some(Outcome::Complete(_)))),
            (outcome, None) => prop_assert!(!matches!(outcome, Some(Outcome::Complete(_)))),
        }
    }

    #[test]
    fn events_survive_the_wire(events in events()) {
        for event in &events {
            prop_assert_eq!(&Event::from_bytes(&event.to_bytes(), event.side).unwrap(), event);
        }
    }

    #[test]
    fn no_bytes_panic_the_wire(bytes in proptest::collection::vec(any::<u8>(), 0..64), text in ".{0,64}") {
        let _ = Event::from_bytes(&bytes, Side::Leaf);
        let _ = Event::from_bytes(text.as_bytes(), Side::Leaf);
    }
}

#[test]
fn a_late_result_of_an_older_attempt_is_adopted_unless_something_settled() {
    let done = |attempt| event(attempt, 9, Kind::Complete { result: Output::Inline(json!(attempt)), duration_ms: 1, checks: vec![] });
    let adopted = Work::fold(&[event(1, 1, Kind::Accepted), event(2, 2, Kind::Accepted), done(1)]).unwrap();
    assert_eq!(adopted.outcome, Some(Outcome::Complete(Output::Inline(json!(1)))));
    let evidence = Work::fold(&[event(1, 1, Kind::Accepted), event(2, 2, Kind::Accepted), done(2), done(1)]).unwrap();
    assert_eq!(evidence.outcome, Some(Outcome::Complete(Output::Inline(json!(2)))));
    assert_eq!(evidence.late_events, 1);
}

#[test]
fn an_older_attempts_failure_settles_nothing() {
    let failed = event(1, 3, Kind::Failed { failure: Failure::new(FailureKind::Agent, "no"), duration_ms: 1 });
    let work = Work::fold(&[event(1, 1, Kind::Accepted), event(2, 2, Kind::Accepted), failed]).unwrap();
    assert_eq!(work.status.label(), "ACCEPTED");
    assert_eq!(work.late_events, 1);
}

#[test]
fn queued_work_is_cancelled_at_once_and_running_work_when_its_leaf_confirms() {
    let ask = || event(0, 2, Kind::Cancelled { reason: Some("changed my mind".into()) });
    let queued = Work::fold(&[event(0, 1, Kind::Assigned(Box::new(assignment()))), ask(), event(1, 3, Kind::Accepted)]).unwrap();
    assert_eq!(queued.status, Status::Cancelled);
    let mut running = Work::fold(&[event(1, 1, Kind::Accepted), ask()]).unwrap();
    assert_eq!(running.status.label(), "ACCEPTED");
    assert!(running.status.mark().unwrap().cancelling);
    running.apply(&event(1, 4, Kind::Cancelled { reason: None }));
    assert_eq!(running.outcome, Some(Outcome::Cancelled(Some("changed my mind".into()))));
}

#[test]
fn a_question_is_answered_once_and_work_goes_on() {
    let ask = |parked| {
        event(1, 2, Kind::Escalate(Ask { ask: 1, reason: "which?".into(), context: json!({}), needs: Needs::Orchestrator, parked }))
    };
    let answer = |n| event(0, 3, Kind::Answered { ask: 1, answer: json!(n), by: None });
    let mut work = Work::fold(&[event(1, 1, Kind::Accepted), ask(false)]).unwrap();
    assert_eq!(work.status.label(), "ESCALATED");
    assert_eq!(work.open_question().unwrap().reason, "which?");
    work.apply(&answer(1));
    work.apply(&answer(2));
    assert_eq!(work.status.label(), "ACCEPTED");
    assert_eq!(work.exchanges[0].answer, Some(json!(1)));
    let parked = Work::fold(&[event(1, 1, Kind::Accepted), ask(false), ask(true), answer(1)]).unwrap();
    assert_eq!(parked.status.label(), "PENDING");
    let crossed = Work::fold(&[event(1, 1, Kind::Accepted), ask(false), answer(1), ask(true)]).unwrap();
    assert_eq!(crossed.status.label(), "PENDING", "the answer and the agent's end crossed");
}

#[test]
fn each_of_several_questions_waits_for_its_own_answer() {
    let ask = |attempt, ask: u32, parked| {
        let reason = format!("question {ask}");
        event(attempt, 10 * i64::from(ask), Kind::Escalate(Ask { ask, reason, context: json!({}), needs: Needs::Orchestrator, parked }))
    };
    let answer = |ask| event(0, 50 + i64::from(ask), Kind::Answered { ask, answer: json!(ask), by: None });
    let shown = |work: &Work| (work.status.label(), work.open_question().map(|open| open.ask), work.open_questions().count());
    let asked = [event(1, 1, Kind::Accepted), ask(1, 1, false), ask(1, 2, false), ask(1, 3, false)];
    let mut work = Work::fold(&asked).unwrap();
    assert_eq!(shown(&work), ("ESCALATED", Some(1), 3), "what is shown stays until it is answered");
    for (answered, then) in [(2, ("ESCALATED", Some(1), 2)), (1, ("ESCALATED", Some(3), 1)), (3, ("ACCEPTED", None, 0))] {
        work.apply(&answer(answered));
        assert_eq!(shown(&work), then, "after the answer to {answered}");
        assert_eq!(work.attempts[0].waits, then.0 == "ESCALATED");
    }
    assert_eq!(work.waited(Timestamp::from_millis(500)).as_millis(), 43, "from the first question to the last answer, once");

    let mut parked = Work::fold(&asked).unwrap();
    [ask(1, 3, true), answer(3), answer(1)].iter().for_each(|event| parked.apply(event));
    assert_eq!((shown(&parked), parked.is_answered()), (("ESCALATED", Some(2), 1), false));
    parked.apply(&answer(2));
    assert_eq!((shown(&parked), parked.is_answered()), (("PENDING", None, 0), true));
    // What waits for its next try waits until that may begin.
    let retrying = Kind::Retrying { failure: Failure::new(FailureKind::Transient, "busy"), next_at: Timestamp::from_millis(99) };
    for kind in [Kind::Accepted, retrying] {
        parked.apply(&event(2, 90, kind));
        assert!(!parked.is_answered());
    }

    // What an attempt died with is not the next one's question until that asks it again.
    let mut again = Work::fold(&asked).unwrap();
    let back = Failure::new(FailureKind::Crashed, "");
    [answer(1), event(1, 90, Kind::Retrying { failure: back, next_at: Timestamp::default() })].iter().for_each(|event| again.apply(event));
    assert_eq!(again.interrupted_questions().map(|asked| asked.ask).collect::<Vec<_>>(), [2, 3]);
    again.apply(&event(2, 95, Kind::Accepted));
    again.apply(&ask(2, 3, false));
    assert_eq!((shown(&again), again.interrupted_questions().count()), (("ESCALATED", Some(3), 1), 0));
    again.apply(&answer(3));
    assert_eq!(shown(&again), ("ACCEPTED", None, 0));
}

#[test]
fn attempts_that_a_station_gave_back_do_not_count() {
    let back = event(1, 2, Kind::Retrying { failure: Failure::new(FailureKind::HandedBack, ""), next_at: Timestamp::from_millis(2) });
    let work = Work::fold(&[event(1, 1, Kind::Accepted), back, event(2, 3, Kind::Accepted), event(3, 4, Kind::Accepted)]).unwrap();
    assert_eq!(work.attempts_burnt(3), 1, "attempt 2 vanished without a word, attempt 1 was given back");
}

#[test]
fn whoever_sees_to_a_work_whose_time_is_up_settles_it_from_any_station() {
    let elsewhere = |kind| Event { station: "west".parse().unwrap(), side: Side::Assigner, ..event(2, 9, kind) };
    let held = [event(0, 1, Kind::Assigned(Box::new(assignment()))), event(1, 2, Kind::Accepted)];
    let failed = || elsewhere(Kind::Failed { failure: Failure::new(FailureKind::TotalTimeout, "too late"), duration_ms: 0 });
    let timed_out = Work::fold(held.iter().chain([&failed()])).unwrap();
    assert_eq!(timed_out.status, Status::Failed);
    // Its attempt fences it: whoever took the work after it goes on.
    let late = Work::fold(held.iter().chain([&event(3, 8, Kind::Accepted), &failed()])).unwrap();
    assert_eq!(late.status.label(), "ACCEPTED");
    let asked = event(0, 3, Kind::Cancelled { reason: Some("enough".into()) });
    let confirmed = Work::fold(held.iter().chain([&asked, &elsewhere(Kind::Cancelled { reason: None })])).unwrap();
    assert_eq!(confirmed.outcome, Some(Outcome::Cancelled(Some("enough".into()))));
}

#[test]
fn on_a_copy_of_its_log_a_work_is_what_its_home_has_heard() {
    let heard = |attempt, at, kind| Event { side: Side::Heard, ..event(attempt, at, kind) };
    let (assigned, cancelled) = (Kind::Assigned(Box::new(assignment())), Kind::Cancelled { reason: None });
    let mut work = Work::fold(&[heard(0, 1, assigned.clone()), event(0, 2, cancelled.clone())]).unwrap();
    assert_eq!((work.status.label(), work.is_called_off()), ("PENDING", true), "asked for, and no more");
    let done = || event(1, 3, Kind::Complete { result: Output::Inline(json!("x")), duration_ms: 1, checks: vec![] });
    let mut too_late = work.clone();
    [event(1, 2, Kind::Accepted), done(), heard(0, 4, cancelled.clone())].iter().for_each(|event| too_late.apply(event));
    assert_eq!((too_late.status.label(), too_late.is_called_off()), ("COMPLETE", false));
    work.apply(&heard(0, 4, cancelled.clone()));
    assert_eq!(work.status, Status::Cancelled);
    // Where it lives it is cancelled at once.
    assert_eq!(Work::fold(&[event(0, 1, assigned.clone()), event(0, 2, cancelled)]).unwrap().status, Status::Cancelled);

    let ask = Ask { ask: 1, reason: "?".into(), context: Value::Null, needs: Needs::Orchestrator, parked: false };
    let answer = |text: &str| Kind::Answered { ask: 1, answer: json!(text), by: None };
    let asked = [heard(0, 1, assigned), event(1, 2, Kind::Accepted), event(1, 3, Kind::Escalate(ask))];
    let work = Work::fold(asked.iter().chain([&event(0, 4, answer("elsewhere")), &heard(0, 5, answer("at home"))])).unwrap();
    assert_eq!(work.exchanges[0].answer, Some(json!("at home")));
}

#[test]
fn a_leaf_may_repeat_the_order_that_its_hook_had_and_no_other() {
    let repeated = |station: &str| Event {
        station: station.parse().unwrap(),
        side: Side::Leaf,
        ..event(1, 1, Kind::Assigned(Box::new(assignment())))
    };
    assert!(Work::fold(&[event(1, 1, Kind::Accepted), repeated("north")]).unwrap().assignment.is_some());
    assert!(Work::fold(&[event(1, 1, Kind::Accepted), repeated("stranger")]).unwrap().assignment.is_none());
}

/// An order that waits for another work.
fn waiting() -> Assignment {
    let after = After { work_ids: vec![WorkId::new(Uuid::from_u128(9))], if_failed: IfFailed::Follow };
    Assignment { after: Some(after), ..assignment() }
}

#[test]
fn the_time_spent_waiting_for_others_is_not_the_works_own() {
    let assigned = event(0, 1, Kind::Assigned(Box::new(waiting())));
    let mut work = Work::fold(std::iter::once(&assigned)).unwrap();
    let at = Timestamp::from_millis;
    assert!(work.waits_for().is_some());
    assert_eq!(work.waited(at(501)).as_millis(), 500);
    work.apply(&event(0, 101, Kind::Released));
    work.apply(&event(0, 201, Kind::Released));
    assert!(work.waits_for().is_none());
    assert_eq!((work.waited(at(501)).as_millis(), work.late_events), (100, 0), "the first release counts");
    // Its release was never heard of: it began all the same.
    let begun = Work::fold(&[assigned, event(1, 301, Kind::Accepted)]).unwrap();
    assert_eq!(begun.waited(at(501)).as_millis(), 300);
}

#[test]
fn anybody_says_how_far_an_order_over_many_items_is_and_nobody_but_its_leaf_of_any_other() {
    let spec = map::Spec { items: vec![json!(1)], count: 1, parallel: 1, lane: "scanner".into() };
    let order = Assignment { map: Some(spec), ..assignment() };
    let elsewhere = |attempt, kind| Event { station: "west".parse().unwrap(), side: Side::Assigner, ..event(attempt, 5, kind) };
    let done = || elsewhere(1, Kind::Complete { result: Output::Inline(json!([])), duration_ms: 1, checks: vec![] });
    let many = Work::fold(&[event(0, 1, Kind::Assigned(Box::new(order))), elsewhere(1, Kind::Accepted), done()]).unwrap();
    assert_eq!(many.status, Status::Complete);
    let one = Work::fold(&[event(0, 1, Kind::Assigned(Box::new(assignment()))), elsewhere(1, Kind::Accepted), done()]).unwrap();
    assert_eq!(one.status.label(), "PENDING");
}

#[test]
fn what_a_stopped_attempt_had_printed_stays_with_its_end() {
    let ask = event(0, 2, Kind::Cancelled { reason: None });
    let printed = event(1, 3, Kind::Printed(Output::Inline(json!("half"))));
    let end = event(1, 3, Kind::Cancelled { reason: None });
    let work = Work::fold(&[event(1, 1, Kind::Accepted), ask, printed, end]).unwrap();
    assert_eq!(
        (work.status, work.printed, work.event.as_str()),
        (Status::Cancelled, Some(Output::Inline(json!("half"))), "WORK_CANCELLED")
    );
}
