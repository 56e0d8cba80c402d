//! Budgets of runs, and how wide and deep works may assign works.

use serde_json::{Value, json};

use crate::lifecycle::{Place, eventually};
use crate::rpc::Client;
use crate::stage::{Stage, done};

/// An agent that assigns what its task lists, and one that uses sixty tokens each time.
fn agents(place: &Place) {
    std::fs::write(place.agents.path().join("assigner.py"), concat!(include_str!("calls.py"), include_str!("assigner.py"))).unwrap();
    place.agent("assigner", "", "cat > /dev/null; exec python3 ./assigner.py");
    place.agent("spender", "", SPEND);
    place.agent("counted", "", "echo x >> ran");
}

const SPEND: &str = r#"echo '::lattice {"usage": {"tokens": 40, "turns": 1}}'
echo '::lattice {"usage": {"tokens": 20, "cost_usd": 0.25, "turns": 1}}'"#;

/// What came of each work that an assigner assigned.
fn came(work: &Value) -> Vec<Value> {
    assert_eq!(work["status"], "COMPLETE", "{work}");
    serde_json::from_str(work["result"].as_str().unwrap_or_else(|| panic!("no result: {work}"))).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_ends_the_attempts_and_says_what_was_used() {
    for stage in Stage::both() {
        stage.place.agent("fails", "limits: { max_attempts: 9 }", &format!("{SPEND}\necho x >> tries; exit 75"));
        let (client, _leaf) = stage.open(&["fails"]).await;
        for (budget, what, tries) in [
            (json!({"tokens": 100}), "120 of 100 tokens", 2),
            (json!({"cost_usd": 0.5, "tokens": 1000}), "0.5 of 0.5 cost_usd", 2),
            (json!({"turns": 1}), "2 of 1 turns", 1),
        ] {
            let _ = std::fs::remove_file(stage.place.agents.path().join("tries"));
            let work = done(&client, json!({"agent_name": "fails", "task": "x", "budget": budget})).await;
            assert_eq!((&work["status"], &work["error"]["kind"]), (&json!("FAILED"), &json!("budget")), "{work}");
            let message = work["error"]["message"].as_str().unwrap();
            assert!(message.contains(what) && message.contains(work["run_id"].as_str().unwrap()), "{message}");
            assert!(message.contains("assign the work again with a larger budget"), "{message}");
            assert_eq!(stage.place.file("tries").lines().count(), tries, "{budget}");
            assert_eq!((&work["usage"]["tokens"], &work["budget"]), (&json!(60 * tries), &budget));
            assert_eq!(work["error"]["evidence"], format!("attempt {tries} had ended: the program asked to be tried again (exit code 75)"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn children_inherit_a_budget_and_what_they_use_counts() {
    for stage in Stage::both() {
        agents(&stage.place);
        let (client, _leaf) = stage.open(&["assigner", "spender", "upper"]).await;
        // A child's child: both levels draw on what was given at the top.
        let task = json!([["assigner", [["spender", "a"]]], ["spender", "b"], ["upper", "c"]]);
        let order = json!({"agent_name": "assigner", "task": task.to_string(), "budget": {"tokens": 110, "works": 9}});
        let work = done(&client, order).await;
        let results = came(&work);
        assert_eq!(came(&results[0])[0]["usage"]["tokens"], 60, "{work}");
        assert_eq!(results[1]["status"], "COMPLETE", "{work}");
        let refused = results[2]["refused"].as_str().unwrap_or_else(|| panic!("{work}"));
        let top = work["run_id"].as_str().unwrap();
        assert!(refused.contains(&format!("the budget of run {top} is used up: 120 of 110 tokens")), "{refused}");
        // Three works below it, and it is the fourth.
        let tree = eventually("the tree is whole", async || {
            Some(stage.said(&["runs", "--uuid", top, "--json"]).await).filter(|tree| tree["status"] == "COMPLETE")
        })
        .await;
        assert_eq!(tree["budget_used"]["tokens"], 120, "{tree}");
        assert_eq!(tree["budget_used"]["works"], 4, "{tree}");
        let text = stage.said(&["runs", "--uuid", top]).await;
        let text = text.as_str().unwrap();
        assert!(text.contains(&format!("budget of {top}: 120 of 110 tokens, 4 of 9 works")), "{text}");
        let below = stage.said(&["runs", "--uuid", &format!("{top}-1")]).await;
        assert!(below.as_str().unwrap().contains(&format!("budget of {top} above it: 120 of 110 tokens, 4 of 9 works")), "{below}");
        assert!(text.contains("used in all: 120 tokens, 0.5 USD, 4 turns"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_childs_own_budget_narrows_and_does_not_widen() {
    let place = Place::new();
    agents(&place);
    let client = place.client().await;
    let task = json!([["upper", "a"], ["upper", "b"], ["upper", "c"]]);
    let work = done(&client, json!({"agent_name": "assigner", "task": task.to_string(), "budget": {"works": 3}})).await;
    let results = came(&work);
    assert_eq!((&results[0]["result"], &results[1]["result"]), (&json!("A"), &json!("B")), "{work}");
    assert!(results[2]["refused"].as_str().unwrap().contains("3 of 3 works"), "{work}");
    let alone = done(&client, json!({"agent_name": "assigner", "task": task.to_string(), "budget": {"works": 1}})).await;
    assert!(came(&alone).iter().all(|came| came["refused"].as_str().unwrap().contains("1 of 1 works")), "{alone}");
}

/// A connection that is bound to a work, as its agent has one.
pub(crate) async fn bound(stage: &Stage, assigned: &Value) -> Client {
    let mut command = stage.beside();
    command.env("LATTICE_BOUND_WORK", assigned["work_id"].as_str().unwrap());
    command.env("LATTICE_BOUND_RUN", assigned["run_id"].as_str().unwrap()).env("LATTICE_BOUND_ATTEMPT", "1");
    Client::start(command).await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_works_that_race_for_a_budget_no_more_run_than_it_allows() {
    for stage in Stage::both() {
        agents(&stage.place);
        stage.place.agent("gated", "", "while [ ! -e gate ]; do sleep 0.02; done");
        let (client, _leaf) = stage.open(&["gated", "counted"]).await;
        let parent = client.call("assign_work", json!({"agent_name": "gated", "task": "x", "budget": {"works": 4}})).await;
        let racers = [bound(&stage, &parent).await, bound(&stage, &parent).await, bound(&stage, &parent).await];
        let calls = racers
            .iter()
            .flat_map(|racer| (0..6).map(move |_| racer.try_call("assign_work", json!({"agent_name": "counted", "task": "x"}))));
        let answers = futures_util::future::join_all(calls).await;
        let (mut works, mut refused) = (Vec::new(), 0);
        for answer in answers {
            match answer.unwrap() {
                Ok(assigned) => works.push(client.settled(assigned["work_id"].as_str().unwrap()).await),
                Err(text) => {
                    assert!(text.contains("works"), "{text}");
                    refused += 1;
                }
            }
        }
        let complete = works.iter().filter(|work| work["status"] == "COMPLETE").count();
        assert_eq!((complete, stage.place.file("ran").lines().count()), (3, 3), "{works:?}");
        assert!(refused >= 18 - 9, "one process lets no more slip through than there are others: {refused}");
        for late in works.iter().filter(|work| work["status"] != "COMPLETE") {
            assert_eq!((&late["status"], &late["error"]["kind"]), (&json!("FAILED"), &json!("budget")), "{late}");
        }
        std::fs::write(stage.place.agents.path().join("gate"), "").unwrap();
        client.settled(parent["work_id"].as_str().unwrap()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_work_assigns_more_works_than_the_limits_say() {
    for mut stage in Stage::both() {
        stage.set("LATTICE_WORK_CHILDREN_MAX", "2");
        stage.set("LATTICE_WORK_DESCENDANTS_MAX", "4");
        agents(&stage.place);
        let (client, _leaf) = stage.open(&["assigner", "upper"]).await;
        let wide = json!([["upper", "a"], ["upper", "b"], ["upper", "c"]]);
        let results = came(&done(&client, json!({"agent_name": "assigner", "task": wide.to_string()})).await);
        assert_eq!(results[1]["result"], "B");
        let refused = results[2]["refused"].as_str().unwrap();
        assert!(refused.contains("lattice.work.children_max") && refused.contains("2 works"), "{refused}");
        // Two below the first, one below the second: the fourth of all is the last.
        let many = json!([["assigner", [["upper", "a"], ["upper", "b"]]], ["assigner", [["upper", "c"], ["upper", "d"]]]]);
        let results = came(&done(&client, json!({"agent_name": "assigner", "task": many.to_string()})).await);
        assert_eq!(came(&results[0])[1]["result"], "B");
        let refused = came(&results[1]);
        assert!(refused[0]["refused"].as_str().unwrap().contains("lattice.work.descendants_max"), "{refused:?}");
        // Whoever is no agent's work is not bounded so.
        for n in 0..5 {
            assert_eq!(done(&client, json!({"agent_name": "upper", "task": format!("n{n}")})).await["status"], "COMPLETE");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_usage_lines_are_few_events_and_nothing_of_them_is_lost() {
    let place = Place::new();
    let lines = r#"i=0; while [ $i -lt 100 ]; do echo '::lattice {"usage": {"tokens": 3}}'; sleep 0.02; i=$((i + 1)); done
while [ $i -lt 5000 ]; do echo '::lattice {"usage": {"tokens": 3}}'; i=$((i + 1)); done
echo '::lattice {"usage": {"tokens": -1}}'"#;
    place.agent("chatty", "", lines);
    let client = place.client_with(&[("LATTICE_WORK_PROGRESS_PER_SECOND", "2")]).await;
    let begun = std::time::Instant::now();
    let work = done(&client, json!({"agent_name": "chatty", "task": "x"})).await;
    assert_eq!(work["usage"]["tokens"], 15_000, "{work}");
    assert!(work["result"].as_str().unwrap().contains("-1"), "what is no report stays in the output");
    let uri = format!("work://{}", work["work_id"].as_str().unwrap());
    let read = client.request("resources/read", json!({"uri": uri})).await.unwrap();
    let text: Value = serde_json::from_str(read["result"]["contents"][0]["text"].as_str().unwrap()).unwrap();
    let told = text["history"].as_array().unwrap().iter().filter(|event| event["event"] == "WORK_USAGE").count();
    let most = usize::try_from(begun.elapsed().as_secs()).unwrap() * 2 + 4;
    assert!((1..=most).contains(&told), "{told} events, and at most {most} are meant");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_budgets_are_refused_with_the_value_and_the_next_step() {
    let place = Place::new();
    let client = place.client().await;
    for (budget, word) in [
        (json!({}), "limits nothing"),
        (json!({"tokens": 0}), "budget.tokens must be a whole number of at least 1, and this is 0"),
        (json!({"works": -3}), "this is -3"),
        (json!({"cost_usd": 0}), "budget.cost_usd must be a number above 0"),
        (json!({"cost_usd": -0.5}), "-0.5"),
        (json!({"turns": 1.5}), "1.5"),
        (json!({"dollars": 5}), "dollars"),
        (json!([5]), "[5]"),
    ] {
        let refused = client.refusal("assign_work", json!({"agent_name": "upper", "task": "x", "budget": budget})).await;
        assert!(refused.contains(word) && refused.contains("gain"), "{budget}: {refused}");
    }
    assert_eq!(client.call("check_work", json!({})).await["outstanding"], 0, "nothing was assigned");
}
