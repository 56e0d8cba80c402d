//! The hooks: push, take, settle.

use std::collections::HashSet;
use std::time::Instant;

use lattice_mcp::transport::{Delivery, Error, LaneLoad, Pushed, Signal, Waits};
use tokio::task::JoinSet;

use super::*;

const LIMIT: u32 = 1000;

async fn push(t: &Transport, at: &StationId, item: Item) -> Pushed {
    t.queue.push(at, item, LIMIT, None).await.unwrap()
}

/// Puts a new item on a lane.
async fn pushed(fixture: &impl Fixture, t: &Transport, at: &StationId, lane: &str, priority: i32) -> WorkId {
    let id = work();
    assert_eq!(push(t, at, item(id, lane, priority, fixture.now())).await, Pushed::New);
    id
}

async fn take(t: &Transport, at: &StationId, lanes: &[(&str, u32)], room: u32) -> Vec<WorkId> {
    ids(&t.queue.take(at, &want(lanes, room)).await.unwrap().taken)
}

/// What is taken because its time is up, whoever had it.
async fn expired(t: &Transport, limit: usize) -> Vec<Taken> {
    t.queue.take_expired(holder(), LEASE, limit, None).await.unwrap().taken
}

async fn recorded(t: &Transport) -> Vec<String> {
    bodies(&everything(t, Filter::AllWork).await)
}

async fn load(t: &Transport, at: &StationId) -> Vec<(String, u32, u32)> {
    let load = t.queue.load(at).await.unwrap();
    load.into_iter().map(|LaneLoad { lane, waiting, held, .. }| (lane, waiting, held)).collect()
}

pub(crate) async fn the_most_urgent_goes_first_and_among_equals_the_older(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let low = pushed(fixture, &t, &at, "a", -5).await;
    let old = pushed(fixture, &t, &at, "b", 0).await;
    let young = pushed(fixture, &t, &at, "a", 0).await;
    let urgent = pushed(fixture, &t, &at, "b", 9).await;
    assert_eq!(take(&t, &at, &[("a", 9), ("b", 9)], 9).await, [urgent, old, young, low]);
}

pub(crate) async fn what_has_waited_long_goes_before_what_is_more_urgent(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let old = pushed(fixture, &t, &at, "a", 0).await;
    fixture.pass(AGEING * 3).await;
    let urgent = pushed(fixture, &t, &at, "a", 4).await;
    let young = pushed(fixture, &t, &at, "a", 2).await;
    assert_eq!(take(&t, &at, &[("a", 9)], 9).await, [urgent, old, young]);
}

pub(crate) async fn orchestrators_of_equal_urgency_take_turns(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let (mut greedy, mut modest) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        greedy.push(work());
        push(&t, &at, item_of("greedy", *greedy.last().unwrap(), "a", 0, fixture.now())).await;
    }
    fixture.pass(Duration::from_secs(60)).await;
    // One of its own was served just now, by whichever process.
    assert_eq!(take(&t, &at, &[("a", 1)], 1).await, greedy[..1]);
    for lane in ["a", "b"] {
        modest.push(work());
        push(&second, &at, item_of("modest", *modest.last().unwrap(), lane, 0, fixture.now())).await;
    }
    let urgent = work();
    push(&t, &at, item_of("greedy", urgent, "b", 1, fixture.now())).await;
    fixture.pass(Duration::from_secs(1)).await;
    // Each has heard of what the other one pushed.
    assert!(load(&t, &at).await == load(&second, &at).await);
    let mut order = Vec::new();
    for process in [&second, &t, &second, &t, &second] {
        order.extend(take(process, &at, &[("a", 1), ("b", 1)], 1).await);
        fixture.pass(Duration::from_secs(1)).await;
    }
    assert_eq!(order[0], urgent, "priority stands above turns");
    assert_eq!(order[1..4].iter().filter(|id| modest.contains(id)).count(), 2, "{order:?}");
    let t = fixture.restart().await;
    assert_eq!(take(&t, &at, &[("a", 99), ("b", 9)], 99).await.len(), 20 + 3 - 6);
}

pub(crate) async fn a_paused_lane_gives_nothing_to_anybody(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let a = pushed(fixture, &t, &at, "a", 9).await;
    let b = pushed(fixture, &second, &at, "b", 0).await;
    // Both have seen the hook before.
    assert!(load(&t, &at).await == load(&second, &at).await);
    let until = fixture.now().after(Duration::from_secs(60));
    t.queue.pause(&at, "a", until).await.unwrap();
    let rest = second.queue.take(&at, &want(&[("a", 9), ("b", 9)], 9)).await.unwrap();
    assert_eq!(ids(&rest.taken), [b]);
    let nothing = t.queue.take(&at, &want(&[("a", 9)], 9)).await.unwrap();
    assert_eq!((nothing.taken.len(), nothing.next_at), (0, Some(until)));
    // A shorter one changes nothing.
    second.queue.pause(&at, "a", fixture.now().after(Duration::from_secs(1))).await.unwrap();
    fixture.pass(Duration::from_secs(59)).await;
    assert!(take(&second, &at, &[("a", 9)], 9).await.is_empty());
    fixture.pass(Duration::from_secs(1)).await;
    let taken = second.queue.take(&at, &want(&[("a", 9)], 9)).await.unwrap().taken;
    assert_eq!((taken[0].delivery.id, taken[0].delivery.attempt), (a, 1), "waiting burnt no attempt");
}

pub(crate) async fn a_pause_is_seen_survives_and_is_taken_back(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    let until = fixture.now().after(HOUR / 2);
    let mut signal = t.queue.signal(&at);
    for lane in ["a", "empty"] {
        t.queue.pause(&at, lane, until).await.unwrap();
    }
    is_raised(&mut signal).await;
    let t = fixture.restart().await;
    let seen = t.queue.load(&at).await.unwrap();
    let seen: Vec<_> = seen.iter().map(|load| (load.lane.as_str(), load.waiting, load.paused_until)).collect();
    assert_eq!(seen, [("a", 1, Some(until)), ("empty", 0, Some(until))]);
    assert!(take(&t, &at, &[("a", 1)], 1).await.is_empty());
    t.queue.pause(&at, "a", fixture.now()).await.unwrap();
    assert_eq!(take(&t, &at, &[("a", 1)], 1).await, [id]);
    fixture.pass(HOUR / 2).await;
    assert!(t.queue.load(&at).await.unwrap().iter().all(|load| load.paused_until.is_none()));
}

pub(crate) async fn no_minute_has_more_takings_than_the_lane_may(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    for _ in 0..10 {
        pushed(fixture, &t, &at, "a", 0).await;
    }
    let free = pushed(fixture, &t, &at, "b", -9).await;
    let want = || Want { per_minute: vec![("a".to_owned(), 3)], ..want(&[("a", 9), ("b", 9)], 9) };
    assert_eq!(ids(&t.queue.take(&at, &Want { room: 2, ..want() }).await.unwrap().taken).len(), 2);
    fixture.pass(Duration::from_secs(30)).await;
    let rest = second.queue.take(&at, &want()).await.unwrap();
    assert_eq!((rest.taken.len(), rest.taken.last().unwrap().delivery.id), (2, free), "the pace is that of all processes together");
    let next_at = rest.next_at.unwrap();
    assert!(next_at > fixture.now() && next_at <= fixture.now().after(Duration::from_secs(31)), "{next_at}");
    let t = fixture.restart().await;
    assert!(t.queue.take(&at, &want()).await.unwrap().taken.is_empty());
    fixture.pass(Duration::from_secs(31)).await;
    let later = t.queue.take(&at, &want()).await.unwrap().taken;
    assert_eq!(later.iter().filter(|taken| taken.lane == "a").count(), 2);
}

/// What choosing the next of ten thousand costs, against choosing the next of a hundred.
#[expect(clippy::print_stderr, reason = "the figures are asked for")]
pub(crate) async fn ten_thousand_items_are_taken_in_the_right_order_and_soon(fixture: &mut impl Fixture) {
    const MANY: u32 = 10_000;
    let t = fixture.transport();
    let mut medians = Vec::new();
    for count in [100, MANY] {
        let at = station(&format!("s{count}"));
        let mut expected = Vec::new();
        for some in (0..count).collect::<Vec<_>>().chunks(500) {
            let pushes = some.iter().map(|n| {
                let priority = i32::try_from(n.wrapping_mul(2_654_435_761) % 2001).unwrap() - 1000;
                let one = item(work(), "a", priority, fixture.now());
                expected.push((std::cmp::Reverse(priority), one.id));
                t.queue.push(&at, one, MANY * 2, None)
            });
            futures_util::future::join_all(pushes).await.into_iter().for_each(|pushed| assert_eq!(pushed.unwrap(), Pushed::New));
        }
        expected.sort_by_key(|(priority, _)| *priority);
        let mut took = Vec::new();
        for (priority, _) in &expected[..60] {
            let start = Instant::now();
            let taken = t.queue.take(&at, &want(&[("a", 1)], 1)).await.unwrap().taken;
            took.push(start.elapsed());
            let is = expected.iter().find(|(_, id)| *id == taken[0].delivery.id).unwrap().0;
            assert_eq!(is, *priority);
        }
        took.sort_unstable();
        eprintln!("taking the next of {count}: median {:?}, slowest of 60 {:?}", took[30], took[59]);
        medians.push(took[30]);
    }
    assert!(medians[1] < medians[0] * 6 + Duration::from_millis(1), "{medians:?}: it grows with the number that waits");
}

pub(crate) async fn a_take_keeps_to_its_lanes_and_their_room(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let a1 = pushed(fixture, &t, &at, "a", 9).await;
    let a2 = pushed(fixture, &t, &at, "a", 8).await;
    let b1 = pushed(fixture, &t, &at, "b", 1).await;
    let b2 = pushed(fixture, &t, &at, "b", 0).await;
    pushed(fixture, &t, &at, "c", 99).await;
    assert!(take(&t, &at, &[], 9).await.is_empty());
    assert!(take(&t, &at, &[("a", 0), ("unknown", 3)], 9).await.is_empty());
    assert!(take(&t, &at, &[("a", 3)], 0).await.is_empty());
    assert_eq!(take(&t, &at, &[("a", 1), ("b", 9)], 2).await, [a1, b1]);
    assert_eq!(take(&t, &at, &[("b", 9), ("a", 9)], 1).await, [a2]);
    assert_eq!(take(&t, &at, &[("a", 9), ("b", 9)], 9).await, [b2]);
}

pub(crate) async fn a_taken_item_is_whole(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let mut whole = item(work(), "a lane of any name", 3, fixture.now());
    whole.body = vec![7; 3 << 20].into();
    push(&t, &at, whole.clone()).await;
    let taken = take_one(&t, &at, "a lane of any name").await;
    assert_eq!((taken.delivery.station, taken.delivery.id, taken.delivery.attempt), (at, whole.id, 1));
    assert_eq!((taken.lane, taken.deadline), (whole.lane, whole.deadline));
    assert!(taken.body == whole.body);
}

pub(crate) async fn pushing_again_changes_nothing(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let first = item(work(), "a", 0, fixture.now());
    assert_eq!(t.queue.push(&at, first.clone(), 10, Some(status(first.id, "assigned"))).await.unwrap(), Pushed::New);
    let again = Item { lane: "b".into(), body: "other".into(), ..item(first.id, "b", 9, fixture.now()) };
    assert_eq!(push(&second, &at, again.clone()).await, Pushed::Known);
    assert_eq!(second.queue.push(&at, again.clone(), 0, Some(status(first.id, "no"))).await.unwrap(), Pushed::Known);
    assert_eq!(load(&t, &at).await, [("a".to_owned(), 1, 0)]);
    let taken = take_one(&t, &at, "a").await;
    assert_eq!(taken.body, first.body);
    assert_eq!(push(&t, &at, again).await, Pushed::Known);
    assert_eq!(load(&t, &at).await, [("a".to_owned(), 0, 1)]);
    assert_eq!(recorded(&t).await, ["assigned"]);
}

pub(crate) async fn what_belongs_beside_another_is_pushed_only_where_that_is(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let order = work();
    let beside = |id| Item { beside: Some(order), ..item(id, "a", 0, fixture.now()) };
    let early = beside(work());
    assert_eq!(t.queue.push(&at, early.clone(), 10, Some(status(early.id, "early"))).await.unwrap(), Pushed::Elsewhere);
    push(&t, &at, Item { held_back: true, ..item(order, "orders", 0, fixture.now()) }).await;
    assert_eq!(push(&second, &station("other"), early.clone()).await, Pushed::Elsewhere);
    assert_eq!(push(&second, &at, early.clone()).await, Pushed::New);
    assert_eq!(push(&t, &at, early.clone()).await, Pushed::Known);
    assert!(second.queue.remove(&at, order, vec![]).await.unwrap());
    assert_eq!(push(&t, &at, early.clone()).await, Pushed::Known);
    // Whoever looks has heard of the removal.
    t.queue.load(&at).await.unwrap();
    assert_eq!(push(&t, &at, beside(work())).await, Pushed::Elsewhere);
    assert_eq!(take(&t, &at, &[("a", 9)], 9).await, [early.id]);
    assert!(recorded(&t).await.is_empty());
}

pub(crate) async fn a_full_hook_refuses_and_nothing_has_happened(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let mut tasks = JoinSet::new();
    for n in 0..20 {
        let (t, at, now) = (t.clone(), at.clone(), fixture.now());
        tasks.spawn(async move {
            let id = work();
            let lane = if n % 2 == 0 { "a" } else { "b" };
            t.queue.push(&at, item(id, lane, 0, now), 7, Some(status(id, "assigned"))).await
        });
    }
    let (mut new, mut full) = (0, 0);
    for result in within(tasks.join_all()).await {
        match result {
            Ok(Pushed::New) => new += 1,
            Err(Error::Full { station, limit: 7, waits: Waits::ToStart }) if station == at => full += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((new, full), (7, 13));
    assert_eq!(recorded(&t).await.len(), 7);
    assert_eq!(take(&t, &at, &[("a", 99), ("b", 99)], 99).await.len(), 7);
    pushed(fixture, &t, &station("other"), "a", 0).await;
}

pub(crate) async fn held_items_do_not_fill_a_hook(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let push = |id| t.queue.push(&at, item(id, "a", 0, fixture.now()), 1, None);
    push(work()).await.unwrap();
    assert!(matches!(push(work()).await, Err(Error::Full { .. })));
    let held = take_one(&t, &at, "a").await;
    push(work()).await.unwrap();
    assert!(matches!(push(work()).await, Err(Error::Full { .. })));
    // A delayed item waits.
    take_one(&t, &at, "a").await;
    assert!(t.queue.release(&held.delivery, fixture.now().after(HOUR), None, vec![]).await.unwrap());
    assert!(matches!(push(work()).await, Err(Error::Full { .. })));
    assert!(t.queue.remove(&at, held.delivery.id, vec![]).await.unwrap());
    push(work()).await.unwrap();
}

pub(crate) async fn what_is_held_back_takes_no_room_from_what_may_start(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let push = |held_back| t.queue.push(&at, Item { held_back, ..item(work(), "a", 0, fixture.now()) }, 2, None);
    let full = |pushed, kind| matches!(pushed, Err(Error::Full { limit: 2, waits, .. }) if waits == kind);
    let first = work();
    let held = Item { held_back: true, ..item(first, "a", 0, fixture.now()) };
    assert_eq!(t.queue.push(&at, held, 2, None).await.unwrap(), Pushed::New);
    push(true).await.unwrap();
    assert!(full(push(true).await, Waits::HeldBack));
    push(false).await.unwrap();
    push(false).await.unwrap();
    assert!(full(push(false).await, Waits::ToStart));
    // Others see it so.
    let late = Item { held_back: true, ..item(work(), "a", 0, fixture.now()) };
    assert!(full(second.queue.push(&at, late, 2, None).await, Waits::HeldBack));
    // What is woken makes room for others that wait, and needs none itself.
    assert!(t.queue.wake(&at, first, None, vec![]).await.unwrap());
    push(true).await.unwrap();
    assert!(full(push(true).await, Waits::HeldBack));
    assert_eq!(take(&t, &at, &[("a", 9)], 9).await.len(), 3);
    push(false).await.unwrap();
    push(false).await.unwrap();
    assert!(full(push(false).await, Waits::ToStart));
}

pub(crate) async fn a_push_announces_once(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let one = item(work(), "a", 0, fixture.now());
    for _ in 0..2 {
        t.queue.push(&at, one.clone(), LIMIT, Some(status(one.id, "assigned"))).await.unwrap();
    }
    assert_eq!(recorded(&t).await, ["assigned"]);
}

pub(crate) async fn each_item_is_taken_once(fixture: &mut impl Fixture) {
    let handles = [fixture.transport(), fixture.second().await];
    let at = station("s");
    let mut expected = HashSet::new();
    for n in 0..200 {
        expected.insert(pushed(fixture, &handles[n % 2], &at, ["a", "b"][n % 2], 0).await);
    }
    let mut tasks = JoinSet::new();
    for n in 0..16 {
        let (t, at) = (handles[n % 2].clone(), at.clone());
        tasks.spawn(async move {
            let mut all = Vec::new();
            loop {
                let got = take(&t, &at, &[("a", 2), ("b", 2)], 3).await;
                if got.is_empty() {
                    return all;
                }
                all.extend(got);
            }
        });
    }
    let taken: Vec<WorkId> = within(tasks.join_all()).await.into_iter().flatten().collect();
    assert_eq!(taken.len(), 200);
    assert_eq!(taken.into_iter().collect::<HashSet<_>>(), expected);
}

pub(crate) async fn a_held_item_is_not_given_to_others(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    pushed(fixture, &t, &at, "a", 0).await;
    let now = fixture.now();
    take_one(&t, &at, "a").await;
    fixture.pass(LEASE - Duration::from_millis(1)).await;
    let nothing = second.queue.take(&at, &want(&[("a", 1)], 1)).await.unwrap();
    assert!(nothing.taken.is_empty());
    assert_eq!(nothing.next_at, Some(now.after(LEASE)));
    assert_eq!(second.queue.take(&at, &want(&[("b", 1)], 1)).await.unwrap().next_at, None);
}

pub(crate) async fn a_lapsed_lease_frees_the_item_as_a_new_attempt(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    for attempt in 1..4 {
        let taken = take_one(if attempt % 2 == 0 { &t } else { &second }, &at, "a").await;
        assert_eq!((taken.delivery.id, taken.delivery.attempt), (id, attempt));
        fixture.pass(LEASE).await;
    }
    assert_eq!(load(&t, &at).await, [("a".to_owned(), 1, 0)]);
}

pub(crate) async fn an_old_delivery_is_void(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    let old = take_one(&t, &at, "a").await.delivery;
    fixture.pass(LEASE).await;
    let new = take_one(&t, &at, "a").await.delivery;
    assert!(!t.queue.settle(&old, vec![response(id, "late")]).await.unwrap());
    assert!(!t.queue.release(&old, fixture.now(), None, vec![response(id, "never")]).await.unwrap());
    assert_eq!(t.queue.extend(std::slice::from_ref(&old), HOUR, None).await.unwrap(), [old]);
    assert_eq!(recorded(&t).await, ["late"]);
    assert_eq!(load(&t, &at).await, [("a".to_owned(), 0, 1)]);
    assert!(t.queue.settle(&new, vec![]).await.unwrap());
    assert!(load(&t, &at).await.is_empty());
}

pub(crate) async fn a_lapsed_delivery_is_good_until_somebody_else_takes(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    pushed(fixture, &t, &at, "a", 0).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    fixture.pass(LEASE * 2).await;
    // Somebody looks, but has no room.
    assert!(take(&t, &at, &[("a", 0)], 1).await.is_empty());
    assert!(t.queue.extend(std::slice::from_ref(&delivery), LEASE, None).await.unwrap().is_empty());
    assert_eq!(load(&t, &at).await, [("a".to_owned(), 0, 1)]);
    assert!(take(&t, &at, &[("a", 1)], 1).await.is_empty());
    fixture.pass(LEASE * 2).await;
    assert!(take(&t, &at, &[("a", 0)], 1).await.is_empty());
    assert!(t.queue.settle(&delivery, vec![]).await.unwrap());
    assert!(take(&t, &at, &[("a", 1)], 1).await.is_empty());
    assert!(load(&t, &at).await.is_empty());
}

pub(crate) async fn extending_holds_on_and_tells_what_was_lost(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    for _ in 0..3 {
        pushed(fixture, &t, &at, "a", 0).await;
    }
    let taken = t.queue.take(&at, &want(&[("a", 3)], 3)).await.unwrap().taken;
    let held: Vec<_> = taken.into_iter().map(|taken| taken.delivery).collect();
    t.queue.settle(&held[1], vec![]).await.unwrap();
    fixture.pass(LEASE / 2).await;
    assert_eq!(t.queue.extend(&held, LEASE, None).await.unwrap(), [held[1].clone()]);
    fixture.pass(LEASE - Duration::from_millis(1)).await;
    assert!(take(&t, &at, &[("a", 3)], 3).await.is_empty());
    fixture.pass(Duration::from_millis(1)).await;
    assert_eq!(take(&t, &at, &[("a", 3)], 3).await, [held[0].id, held[2].id]);
    assert_eq!(t.queue.extend(&held, LEASE, None).await.unwrap(), held);
    assert!(t.queue.extend(&[], LEASE, None).await.unwrap().is_empty());
}

pub(crate) async fn extending_moves_the_deadline(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    pushed(fixture, &t, &at, "a", 0).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    let later = fixture.now().after(HOUR * 3);
    t.queue.extend(&[delivery], LEASE, Some(later)).await.unwrap();
    fixture.pass(HOUR * 2).await;
    assert!(expired(&t, 9).await.is_empty());
    assert_eq!(take_one(&t, &at, "a").await.deadline, later);
}

pub(crate) async fn settling_removes_and_records(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    let mut follow = t.log.follow(Filter::Work(id), Position::default()).await.unwrap();
    let delivery = take_one(&t, &at, "a").await.delivery;
    assert!(t.queue.settle(&delivery, vec![response(id, "1"), response(id, "2")]).await.unwrap());
    assert_eq!(bodies(&collect(&mut follow, 2).await), ["1", "2"]);
    fixture.pass(LEASE * 2).await;
    assert!(take(&t, &at, &[("a", 1)], 1).await.is_empty());
    assert!(load(&t, &at).await.is_empty());
}

pub(crate) async fn settling_twice_keeps_the_records(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    assert!(t.queue.settle(&delivery, vec![response(id, "1")]).await.unwrap());
    assert!(!t.queue.settle(&delivery, vec![response(id, "2")]).await.unwrap());
    assert_eq!(recorded(&t).await, ["1", "2"]);
}

pub(crate) async fn a_released_item_waits_until_it_is_due(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    let due = fixture.now().after(Duration::from_secs(60));
    assert!(t.queue.release(&delivery, due, None, vec![response(id, "retrying")]).await.unwrap());
    assert_eq!(recorded(&t).await, ["retrying"]);
    assert_eq!(load(&t, &at).await, [("a".to_owned(), 1, 0)]);
    // Whoever released has given up its right.
    assert!(!t.queue.settle(&delivery, vec![]).await.unwrap());
    fixture.pass(Duration::from_secs(59)).await;
    let nothing = t.queue.take(&at, &want(&[("a", 1)], 1)).await.unwrap();
    assert_eq!((nothing.taken.len(), nothing.next_at), (0, Some(due)));
    fixture.pass(Duration::from_secs(1)).await;
    let again = take_one(&t, &at, "a").await.delivery;
    assert_eq!((again.id, again.attempt), (id, 2));
    assert!(t.queue.release(&again, fixture.now(), None, vec![]).await.unwrap());
    assert_eq!(take_one(&t, &at, "a").await.delivery.attempt, 3);
}

pub(crate) async fn a_released_item_has_its_new_deadline(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    pushed(fixture, &t, &at, "a", 0).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    let deadline = fixture.now().after(HOUR * 5);
    t.queue.release(&delivery, fixture.now().after(HOUR * 2), Some(deadline), vec![]).await.unwrap();
    fixture.pass(HOUR * 3).await;
    assert_eq!(take_one(&t, &at, "a").await.deadline, deadline);
}

pub(crate) async fn waking_frees_at_once(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    t.queue.release(&delivery, fixture.now().after(HOUR), None, vec![]).await.unwrap();
    let deadline = fixture.now().after(HOUR * 9);
    assert!(second.queue.wake(&at, id, Some(deadline), vec![status(id, "answered")]).await.unwrap());
    assert_eq!(recorded(&t).await, ["answered"]);
    let taken = take_one(&t, &at, "a").await;
    assert_eq!((taken.delivery.attempt, taken.deadline), (2, deadline));
}

pub(crate) async fn waking_what_is_held_or_gone_only_records(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    assert!(!t.queue.wake(&at, id, None, vec![status(id, "held")]).await.unwrap());
    assert!(take(&t, &at, &[("a", 1)], 1).await.is_empty());
    t.queue.settle(&delivery, vec![]).await.unwrap();
    assert!(!t.queue.wake(&at, id, None, vec![status(id, "gone")]).await.unwrap());
    assert!(!t.queue.wake(&station("nowhere"), id, None, vec![]).await.unwrap());
    assert_eq!(recorded(&t).await, ["held", "gone"]);
}

pub(crate) async fn waking_what_has_lapsed_leaves_its_delivery_good(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    fixture.pass(LEASE * 2).await;
    let deadline = fixture.now().after(HOUR * 9);
    assert!(second.queue.wake(&at, id, Some(deadline), vec![status(id, "answered")]).await.unwrap());
    assert!(t.queue.extend(std::slice::from_ref(&delivery), LEASE, None).await.unwrap().is_empty());
    assert!(take(&second, &at, &[("a", 1)], 1).await.is_empty());
    fixture.pass(LEASE * 2).await;
    assert!(second.queue.wake(&at, id, None, vec![]).await.unwrap());
    let taken = take_one(&second, &at, "a").await;
    assert_eq!((taken.delivery.attempt, taken.deadline), (2, deadline));
    assert_eq!(recorded(&t).await, ["answered"]);
}

pub(crate) async fn what_has_lapsed_is_taken_over_only_by_whoever_may(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let mut held = Vec::new();
    for _ in 0..3 {
        pushed(fixture, &t, &at, "a", 0).await;
        held.push(take_one(&t, &at, "a").await.delivery);
    }
    let over = |over: &[Delivery], room: u32| Want { over: Some(over.to_vec()), ..want(&[("a", room), ("b", 9)], 9) };
    assert!(second.queue.take(&at, &over(&[], 9)).await.unwrap().lapsed.is_empty(), "they are held");
    fixture.pass(LEASE).await;
    let ready = pushed(fixture, &t, &at, "a", -9).await;
    let left = second.queue.take(&at, &over(&[], 1)).await.unwrap();
    assert_eq!(ids(&left.taken), [ready], "what may not be taken over is in nobody's way");
    let lapsed = |left: &Take| left.lapsed.iter().map(|lapsed| (lapsed.lane.clone(), lapsed.delivery.clone())).collect::<Vec<_>>();
    let mut named: Vec<_> = held.iter().map(|delivery| ("a".to_owned(), delivery.clone())).collect();
    named.sort_by_key(|(_, delivery)| delivery.id);
    let mut found = lapsed(&left);
    found.sort_by_key(|(_, delivery)| delivery.id);
    assert_eq!(found, named);
    // Nobody is told to come again at once for what he leaves.
    assert!(left.next_at.is_none_or(|at| at > fixture.now()), "{:?}", left.next_at);

    // Of two that it may take over there is room for one: the other one stays as it is, also for others.
    let one = second.queue.take(&at, &over(&held[..2], 1)).await.unwrap();
    assert_eq!(ids(&one.taken), [held[0].id]);
    let wrong = [Delivery { attempt: 2, ..held[1].clone() }];
    let none = t.queue.take(&at, &over(&wrong, 9)).await.unwrap();
    assert!(none.taken.is_empty() && none.lapsed.len() == 2, "{none:?}");
    assert!(t.queue.extend(&held[1..], LEASE, None).await.unwrap().is_empty(), "whoever comes back in time has lost nothing");
    assert_eq!(t.queue.extend(&held[..1], LEASE, None).await.unwrap(), held[..1]);
    assert!(t.queue.take(&at, &over(&held, 9)).await.unwrap().taken.is_empty());
    assert!(t.queue.settle(&held[1], vec![]).await.unwrap());
    fixture.pass(LEASE).await;
    let t = fixture.restart().await;
    let rest = t.queue.take(&at, &over(&held, 9)).await.unwrap();
    assert_eq!((ids(&rest.taken), rest.lapsed.len()), (vec![held[2].id], 2), "{rest:?}");
}

pub(crate) async fn what_is_held_back_waits_until_somebody_wakes_it(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let held = Item { held_back: true, ..item(work(), "a", 9, fixture.now()) };
    let forgotten = Item { held_back: true, ..item(work(), "a", 9, fixture.now()) };
    push(&t, &at, held.clone()).await;
    push(&t, &at, forgotten.clone()).await;
    assert!(take(&t, &at, &[("a", 9)], 9).await.is_empty());
    assert_eq!(load(&t, &at).await, [("a".to_owned(), 2, 0)]);
    let t = fixture.restart().await;
    assert!(take(&t, &at, &[("a", 9)], 9).await.is_empty());
    let later = held.deadline.after(HOUR);
    assert!(t.queue.wake(&at, held.id, Some(later), vec![]).await.unwrap());
    assert!(t.queue.wake(&at, held.id, Some(later), vec![]).await.unwrap(), "what is free is woken in vain");
    fixture.pass(HOUR + HOUR / 2).await;
    assert_eq!(take(&t, &at, &[("a", 9)], 9).await, [held.id]);
    let expired = expired(&t, 9).await;
    assert_eq!(ids(&expired), [forgotten.id]);
}

pub(crate) async fn waking_moves_the_deadline_of_what_is_held(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    take_one(&t, &at, "a").await;
    assert!(!t.queue.wake(&at, id, Some(fixture.now()), vec![]).await.unwrap());
    assert!(expired(&t, 9).await.is_empty(), "it is held");
    fixture.pass(LEASE * 2).await;
    assert!(take(&t, &at, &[("a", 1)], 1).await.is_empty(), "its time is up");
    assert_eq!(expired(&t, 9).await[0].delivery.attempt, 2);
}

pub(crate) async fn removing_spares_what_is_held(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    assert!(!t.queue.remove(&at, id, vec![status(id, "held")]).await.unwrap());
    assert!(t.queue.release(&delivery, fixture.now().after(HOUR), None, vec![]).await.unwrap());
    assert!(t.queue.remove(&at, id, vec![status(id, "delayed")]).await.unwrap());
    assert!(!t.queue.remove(&at, id, vec![status(id, "gone")]).await.unwrap());
    let id = pushed(fixture, &t, &at, "a", 0).await;
    assert!(t.queue.remove(&at, id, vec![status(id, "waiting")]).await.unwrap());
    let lapsed = pushed(fixture, &t, &at, "a", 0).await;
    take_one(&t, &at, "a").await;
    fixture.pass(LEASE).await;
    assert!(t.queue.remove(&at, lapsed, vec![status(id, "lapsed")]).await.unwrap());
    assert_eq!(recorded(&t).await, ["held", "delayed", "gone", "waiting", "lapsed"]);
    assert!(take(&t, &at, &[("a", 1)], 1).await.is_empty());
    assert!(load(&t, &at).await.is_empty());
}

pub(crate) async fn past_its_deadline_only_take_expired_gives_an_item(fixture: &mut impl Fixture) {
    let (t, at, other) = (fixture.transport(), station("s"), station("away"));
    let ready = pushed(fixture, &t, &at, "a", 9).await;
    let away = pushed(fixture, &t, &other, "b", 0).await;
    let delayed = pushed(fixture, &t, &at, "c", 0).await;
    let delivery = take_one(&t, &at, "c").await.delivery;
    t.queue.release(&delivery, fixture.now().after(HOUR * 9), None, vec![]).await.unwrap();
    assert!(expired(&t, 9).await.is_empty());
    fixture.pass(HOUR).await;
    let fresh = pushed(fixture, &t, &at, "a", 0).await;
    assert_eq!(take(&t, &at, &[("a", 9), ("c", 9)], 9).await, [fresh]);
    let two = expired(&t, 2).await;
    assert_eq!(two.len(), 2);
    let rest = expired(&t, 9).await;
    let all: Vec<Taken> = two.into_iter().chain(rest).collect();
    assert_eq!(ids(&all).into_iter().collect::<HashSet<_>>(), HashSet::from([ready, away, delayed]));
    let of_away = all.iter().find(|taken| taken.delivery.id == away).unwrap();
    assert_eq!((of_away.delivery.station.as_str(), of_away.lane.as_str()), ("away", "b"));
    assert_eq!(of_away.body, format!("order {away}"));
    for taken in &all {
        assert!(t.queue.settle(&taken.delivery, vec![response(taken.delivery.id, "timed out")]).await.unwrap());
    }
    assert!(load(&t, &other).await.is_empty());
}

pub(crate) async fn take_expired_holds_what_it_gives(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    pushed(fixture, &t, &at, "a", 0).await;
    fixture.pass(HOUR).await;
    let first = expired(&t, 9).await;
    assert_eq!((first.len(), first[0].delivery.attempt), (1, 1));
    assert!(expired(&t, 9).await.is_empty());
    fixture.pass(LEASE).await;
    let again = expired(&t, 9).await;
    assert_eq!(again[0].delivery.attempt, 2);
    assert!(!t.queue.settle(&first[0].delivery, vec![]).await.unwrap());
    assert!(t.queue.settle(&again[0].delivery, vec![]).await.unwrap());
}

pub(crate) async fn take_expired_leaves_live_leases_alone(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let mut one = item(work(), "a", 0, fixture.now());
    one.deadline = fixture.now().after(LEASE / 2);
    push(&t, &at, one.clone()).await;
    take_one(&t, &at, "a").await;
    fixture.pass(LEASE - Duration::from_millis(1)).await;
    assert!(expired(&t, 9).await.is_empty());
    fixture.pass(Duration::from_millis(1)).await;
    assert!(take(&t, &at, &[("a", 1)], 1).await.is_empty());
    assert_eq!(ids(&expired(&t, 9).await), [one.id]);
}

pub(crate) async fn of_what_is_past_its_deadline_the_lapsed_is_taken_only_by_whoever_may(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let [one, free] = ["a", "b"].map(|lane| Item { deadline: fixture.now().after(LEASE / 2), ..item(work(), lane, 0, fixture.now()) });
    push(&t, &at, one.clone()).await;
    push(&t, &at, free.clone()).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    let mine = [delivery.clone()];
    fixture.pass(LEASE).await;
    // Whoever may take it over from its lane meets it in vain, and leaves it as it is.
    let want = Want { over: Some(mine.to_vec()), ..want(&[("a", 9), ("b", 9)], 9) };
    assert!(second.queue.take(&at, &want).await.unwrap().taken.is_empty());
    let left = second.queue.take_expired(holder(), LEASE, 9, Some(Vec::new())).await.unwrap();
    assert_eq!((ids(&left.taken), left.lapsed.len()), (vec![free.id], 1));
    assert_eq!((&left.lapsed[0].delivery, left.lapsed[0].lane.as_str()), (&delivery, "a"));
    // It goes on: it has more time, and is still whose it was.
    assert!(second.queue.wake(&at, one.id, Some(fixture.now().after(HOUR)), vec![]).await.unwrap());
    let none = second.queue.take_expired(holder(), LEASE, 9, Some(mine.to_vec())).await.unwrap();
    assert!(none.taken.is_empty() && none.lapsed.is_empty());
    assert!(t.queue.extend(&mine, LEASE, None).await.unwrap().is_empty());
    assert!(!second.queue.wake(&at, one.id, Some(fixture.now()), vec![]).await.unwrap());
    fixture.pass(LEASE).await;
    let over = second.queue.take_expired(holder(), LEASE, 9, Some(mine.to_vec())).await.unwrap().taken;
    let again = over.iter().find(|taken| taken.delivery.id == one.id).unwrap();
    assert_eq!(again.delivery.attempt, 2);
    assert_eq!(t.queue.extend(&mine, LEASE, None).await.unwrap(), mine);
}

pub(crate) async fn the_load_counts_waiting_and_held(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    assert!(load(&t, &at).await.is_empty());
    for n in 0..5 {
        pushed(fixture, if n % 2 == 0 { &t } else { &second }, &at, if n < 3 { "a" } else { "b" }, 0).await;
    }
    let first = take_one(&second, &at, "a").await;
    take_one(&t, &at, "b").await;
    for t in [&t, &second] {
        assert_eq!(load(t, &at).await, [("a".to_owned(), 2, 1), ("b".to_owned(), 1, 1)]);
    }
    t.queue.release(&first.delivery, fixture.now().after(HOUR), None, vec![]).await.unwrap();
    fixture.pass(LEASE).await;
    assert_eq!(load(&t, &at).await, [("a".to_owned(), 3, 0), ("b".to_owned(), 2, 0)]);
}

async fn is_raised(signal: &mut Signal) {
    within(signal.changed()).await;
}

pub(crate) async fn a_signal_tells_of_every_way_to_become_free(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let mut signal = t.queue.signal(&at);
    let id = pushed(fixture, &t, &at, "a", 0).await;
    is_raised(&mut signal).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    t.queue.release(&delivery, fixture.now().after(HOUR / 2), None, vec![]).await.unwrap();
    is_raised(&mut signal).await;
    t.queue.wake(&at, id, None, vec![]).await.unwrap();
    is_raised(&mut signal).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    t.queue.release(&delivery, fixture.now(), None, vec![]).await.unwrap();
    is_raised(&mut signal).await;
}

pub(crate) async fn a_signal_is_not_missed_between_two_waits(fixture: &mut impl Fixture) {
    let handles = [fixture.transport(), fixture.second().await];
    let at = station("s");
    let mut pushers = JoinSet::new();
    for t in handles.clone() {
        let (at, now) = (at.clone(), fixture.now());
        pushers.spawn(async move {
            for _ in 0..150 {
                push(&t, &at, item(work(), "a", 0, now)).await;
            }
        });
    }
    // Take until there is nothing, then wait for the signal: were one missed, the last items would stay.
    let mut signal = handles[0].queue.signal(&at);
    let mut count = 0;
    while count < 300 {
        let got = take(&handles[0], &at, &[("a", 50)], 50).await.len();
        count += got;
        if got == 0 {
            is_raised(&mut signal).await;
        }
    }
    pushers.join_all().await;
}

pub(crate) async fn a_signal_comes_from_another_process(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let mut signal = second.queue.signal(&at);
    let mut best = Duration::MAX;
    for _ in 0..20 {
        pushed(fixture, &t, &at, "a", 0).await;
        let start = Instant::now();
        is_raised(&mut signal).await;
        best = best.min(start.elapsed());
        take_one(&second, &at, "a").await;
    }
    assert!(best <= Duration::from_millis(50), "the quickest of twenty took {best:?}");
}

pub(crate) async fn a_signal_tells_of_a_lapsed_lease(fixture: &mut impl Fixture) {
    let (t, second, at) = (fixture.transport(), fixture.second().await, station("s"));
    let id = pushed(fixture, &t, &at, "a", 0).await;
    take_one(&second, &at, "a").await;
    // This taker has looked before the other one took, and would never learn of the lease but for the signal.
    let mut signal = t.queue.signal(&at);
    while tokio::time::timeout(Duration::from_millis(300), signal.changed()).await.is_ok() {}
    fixture.pass(LEASE).await;
    loop {
        is_raised(&mut signal).await;
        if take(&t, &at, &[("a", 1)], 1).await == [id] {
            break;
        }
    }
}

pub(crate) async fn stations_do_not_mix(fixture: &mut impl Fixture) {
    let (t, here, there) = (fixture.transport(), station("here"), station("there"));
    let id = work();
    for at in [&here, &there] {
        assert_eq!(push(&t, at, item(id, "a", 0, fixture.now())).await, Pushed::New);
    }
    let delivery = take_one(&t, &here, "a").await.delivery;
    assert!(t.queue.settle(&delivery, vec![]).await.unwrap());
    assert_eq!(take(&t, &there, &[("a", 9)], 9).await, [id]);
}

pub(crate) async fn hooks_survive_a_restart(fixture: &mut impl Fixture) {
    let (t, at) = (fixture.transport(), station("s"));
    let held = pushed(fixture, &t, &at, "a", 9).await;
    let waiting = pushed(fixture, &t, &at, "a", 0).await;
    let delivery = take_one(&t, &at, "a").await.delivery;
    let t = fixture.restart().await;
    assert_eq!(load(&t, &at).await, [("a".to_owned(), 1, 1)]);
    assert_eq!(take(&t, &at, &[("a", 9)], 9).await, [waiting]);
    assert_eq!(delivery.id, held);
    assert!(t.queue.settle(&delivery, vec![]).await.unwrap());
}
