//! Append, read, follow.

use std::collections::HashSet;
use std::time::Instant;

use lattice_mcp::model::id::WorkId;
use lattice_mcp::transport::{Entry, Filter, Position, Subject};
use tokio::task::JoinSet;

use super::*;

pub(crate) async fn appends_stand_in_order(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let id = work();
    let first = t.log.append(vec![status(id, "a"), response(id, "b"), audit("station", "joined")]).await.unwrap();
    let second = t.log.append(vec![response(id, "c")]).await.unwrap();
    assert!(second.reaches(first) && !first.reaches(second));
    let all = everything(&t, Filter::AllWork).await;
    assert_eq!(bodies(&all), ["a", "b", "c"]);
    assert!(all.is_sorted_by(|a, b| !a.position.reaches(b.position)));
    assert_eq!(all[2].position, second);
    assert_eq!(all[0].subject, Subject::Status(id));
    assert_eq!(all[1].subject, Subject::Response(id));
}

pub(crate) async fn one_append_stays_together(fixture: &mut impl Fixture) {
    let (t, second) = (fixture.transport(), fixture.second().await);
    let mut writers = JoinSet::new();
    for n in 0..32 {
        let t = if n % 2 == 0 { t.clone() } else { second.clone() };
        writers.spawn(async move {
            let id = work();
            t.log.append((0..5).map(|n| response(id, n.to_string())).collect()).await.unwrap();
        });
    }
    writers.join_all().await;
    let all = everything(&t, Filter::AllWork).await;
    assert_eq!(all.len(), 160);
    for part in all.chunks(5) {
        assert!(part.iter().all(|entry| entry.subject == part[0].subject));
        assert_eq!(bodies(part), ["0", "1", "2", "3", "4"]);
    }
}

pub(crate) async fn a_read_gives_what_it_was_asked_for(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let (a, b) = (work(), work());
    t.log.append(vec![status(a, "1"), audit("lease", "taken"), status(b, "2"), response(a, "3")]).await.unwrap();
    assert_eq!(bodies(&everything(&t, Filter::AllWork).await), ["1", "2", "3"]);
    assert_eq!(bodies(&everything(&t, Filter::Work(a)).await), ["1", "3"]);
    assert_eq!(bodies(&everything(&t, Filter::AllStatus).await), ["1", "2"]);
    let audits = everything(&t, Filter::Audit).await;
    assert_eq!(audits.len(), 1);
    assert_eq!(audits[0].subject.to_string(), "events.lease.taken");
    let two = t.log.read(Filter::AllWork, Position::default(), 2).await.unwrap();
    assert_eq!(bodies(&two), ["1", "2"]);
    let rest = t.log.read(Filter::AllWork, two[1].position, 2).await.unwrap();
    assert_eq!(bodies(&rest), ["3"]);
    assert!(t.log.read(Filter::Work(work()), Position::default(), 9).await.unwrap().is_empty());
    assert!(t.log.read(Filter::AllWork, Position::default(), 0).await.unwrap().is_empty());
}

pub(crate) async fn a_follower_gets_what_is_there_and_then_what_comes(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let id = work();
    t.log.append(vec![status(id, "a"), status(id, "b")]).await.unwrap();
    let mut follow = t.log.follow(Filter::AllWork, Position::default()).await.unwrap();
    assert_eq!(bodies(&collect(&mut follow, 2).await), ["a", "b"]);
    t.log.append(vec![status(id, "c")]).await.unwrap();
    t.log.append(vec![audit("x", "y"), status(id, "d")]).await.unwrap();
    assert_eq!(bodies(&collect(&mut follow, 2).await), ["c", "d"]);
    let mut waiting = t.log.follow(Filter::Audit, t.log.head().await.unwrap()).await.unwrap();
    let (entries, appended) = tokio::join!(collect(&mut waiting, 1), t.log.append(vec![audit("mail", "sent")]));
    assert_eq!(entries[0].position, appended.unwrap());
}

pub(crate) async fn a_follower_of_one_work_gets_only_its_own(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let (a, b) = (work(), work());
    t.log.append(vec![status(a, "a1"), status(b, "b1")]).await.unwrap();
    let mut follow_a = t.log.follow(Filter::Work(a), Position::default()).await.unwrap();
    let mut again = t.log.follow(Filter::Work(a), Position::default()).await.unwrap();
    let mut follow_b = t.log.follow(Filter::Work(b), Position::default()).await.unwrap();
    t.log.append(vec![response(b, "b2"), response(a, "a2")]).await.unwrap();
    assert_eq!(bodies(&collect(&mut follow_a, 2).await), ["a1", "a2"]);
    assert_eq!(bodies(&collect(&mut follow_b, 2).await), ["b1", "b2"]);
    drop(follow_a);
    t.log.append(vec![response(a, "a3")]).await.unwrap();
    assert_eq!(bodies(&collect(&mut again, 3).await), ["a1", "a2", "a3"]);
}

pub(crate) async fn a_follower_from_a_position_gets_nothing_before_it(fixture: &mut impl Fixture) {
    let (t, second) = (fixture.transport(), fixture.second().await);
    let id = work();
    t.log.append(vec![status(id, "a")]).await.unwrap();
    let after = second.log.append(vec![status(id, "b")]).await.unwrap();
    let mut follow = t.log.follow(Filter::Work(id), after).await.unwrap();
    second.log.append(vec![status(id, "c")]).await.unwrap();
    assert_eq!(bodies(&collect(&mut follow, 1).await), ["c"]);
}

pub(crate) async fn a_follower_may_begin_at_any_place(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    for of_one in [false, true] {
        for missing in 0..4 {
            let id = work();
            let filter = if of_one { Filter::Work(id) } else { Filter::AllWork };
            let head = t.log.append((0..4).map(|n| status(id, n.to_string())).collect()).await.unwrap();
            let mut follow = t.log.follow(filter, Position::of(head.seq - missing)).await.unwrap();
            let expected = t.log.read(filter, Position::of(head.seq - missing), 9).await.unwrap();
            assert_eq!(expected.len() as u64, missing);
            let last = t.log.append(vec![response(id, "last")]).await.unwrap();
            let got = collect(&mut follow, expected.len() + 1).await;
            assert_eq!(got[..expected.len()], expected);
            assert_eq!(got[expected.len()].position, last);
        }
    }
}

pub(crate) async fn followers_skip_and_repeat_nothing_while_many_write(fixture: &mut impl Fixture) {
    const WRITERS: usize = 8;
    const EACH: usize = 200;
    let handles = [fixture.transport(), fixture.second().await];
    let works: Vec<WorkId> = (0..WRITERS).map(|_| work()).collect();
    let mut tasks = JoinSet::new();
    let mut followers: JoinSet<(Filter, Vec<Entry>)> = JoinSet::new();
    for t in &handles {
        // Half of them begin in the middle of it all.
        for (n, filter) in [Filter::AllWork, Filter::AllStatus, Filter::Work(works[0]), Filter::Work(works[1])].into_iter().enumerate() {
            let t = t.clone();
            followers.spawn(async move {
                if n % 2 == 1 {
                    let mut wait = t.log.follow(Filter::AllWork, Position::default()).await.unwrap();
                    collect(&mut wait, WRITERS * EACH / 4).await;
                }
                let mut follow = t.log.follow(filter, Position::default()).await.unwrap();
                let count = if matches!(filter, Filter::Work(_)) { EACH } else { WRITERS * EACH };
                (filter, collect(&mut follow, count).await)
            });
        }
    }
    for (n, id) in works.iter().copied().enumerate() {
        let t = handles[n % 2].clone();
        tasks.spawn(async move {
            for n in 0..EACH / 2 {
                t.log.append(vec![status(id, format!("{n}a")), status(id, format!("{n}b"))]).await.unwrap();
            }
        });
    }
    within(tasks.join_all()).await;
    for (filter, got) in within(followers.join_all()).await {
        let expected = everything(&handles[0], filter).await;
        assert_eq!(got.len(), expected.len());
        assert!(got == expected, "a follower of {filter:?} did not get what the log holds");
    }
}

pub(crate) async fn a_follower_that_falls_behind_misses_nothing(fixture: &mut impl Fixture) {
    const COUNT: usize = 20_000;
    let t = fixture.transport();
    let id = work();
    let mut all = t.log.follow(Filter::AllWork, Position::default()).await.unwrap();
    let mut one = t.log.follow(Filter::Work(id), Position::default()).await.unwrap();
    for chunk in 0..COUNT / 500 {
        t.log.append((0..500).map(|n| response(id, (chunk * 500 + n).to_string())).collect()).await.unwrap();
    }
    for follow in [&mut all, &mut one] {
        let mut got = collect(follow, COUNT / 2).await;
        t.log.append(vec![response(id, "more")]).await.unwrap();
        got.extend(collect(follow, COUNT + 1 - got.len()).await);
        let expected: Vec<String> = (0..COUNT).map(|n| n.to_string()).collect();
        assert_eq!(bodies(&got[..COUNT]), expected);
        assert_eq!(bodies(&got[COUNT..=COUNT]), ["more"]);
    }
}

pub(crate) async fn a_dropped_wait_loses_nothing(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let id = work();
    let mut follow = t.log.follow(Filter::Work(id), Position::default()).await.unwrap();
    let mut writers = JoinSet::new();
    let writer = t.clone();
    writers.spawn(async move {
        for n in 0..300 {
            writer.log.append(vec![response(id, n.to_string())]).await.unwrap();
        }
    });
    let mut got = Vec::new();
    while got.len() < 300 {
        tokio::select! {
            biased;
            entries = follow.next() => got.extend(entries.unwrap()),
            // The wait is dropped again and again, at whatever place it has come to.
            () = tokio::task::yield_now() => {}
        }
    }
    let expected: Vec<String> = (0..300).map(|n| n.to_string()).collect();
    assert_eq!(bodies(&got), expected);
}

pub(crate) async fn many_followers_of_single_works_get_theirs(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let mut followers = JoinSet::new();
    let mut works = Vec::new();
    for _ in 0..2000 {
        let id = work();
        let mut follow = t.log.follow(Filter::Work(id), Position::default()).await.unwrap();
        works.push(id);
        followers.spawn(async move { (id, collect(&mut follow, 2).await) });
    }
    for id in works.iter().rev() {
        t.log.append(vec![status(*id, id.to_string())]).await.unwrap();
    }
    for some in works.chunks(500) {
        t.log.append(some.iter().map(|id| response(*id, id.to_string())).collect()).await.unwrap();
    }
    for (id, got) in within(followers.join_all()).await {
        assert_eq!(bodies(&got), [id.to_string(), id.to_string()]);
    }
}

pub(crate) async fn another_process_sees_an_append_within_50_ms(fixture: &mut impl Fixture) {
    let (t, second) = (fixture.transport(), fixture.second().await);
    let id = work();
    let mut follow = second.log.follow(Filter::Work(id), Position::default()).await.unwrap();
    let mut best = Duration::MAX;
    for n in 0..20 {
        t.log.append(vec![response(id, n.to_string())]).await.unwrap();
        let start = Instant::now();
        assert_eq!(bodies(&collect(&mut follow, 1).await), [n.to_string()]);
        best = best.min(start.elapsed());
    }
    // The machine may be busy, but not all the time.
    assert!(best <= Duration::from_millis(50), "the quickest of twenty took {best:?}");
}

pub(crate) async fn the_head_counts_every_process(fixture: &mut impl Fixture) {
    let (t, second) = (fixture.transport(), fixture.second().await);
    assert_eq!(t.log.head().await.unwrap(), Position::default());
    for n in 0..10 {
        let writer = if n % 2 == 0 { &t } else { &second };
        let position = writer.log.append(vec![audit("a", "b")]).await.unwrap();
        assert_eq!(t.log.head().await.unwrap(), position);
        assert_eq!(second.log.head().await.unwrap(), position);
    }
}

pub(crate) async fn the_log_survives_a_restart(fixture: &mut impl Fixture) {
    let t = fixture.transport();
    let id = work();
    let before = t.log.append(vec![status(id, "a"), response(id, "b")]).await.unwrap();
    let old = everything(&t, Filter::AllWork).await;
    let t = fixture.restart().await;
    assert_eq!(everything(&t, Filter::AllWork).await, old);
    let mut follow = t.log.follow(Filter::AllWork, Position::default()).await.unwrap();
    let after = t.log.append(vec![response(id, "c")]).await.unwrap();
    assert!(!before.reaches(after));
    let got = collect(&mut follow, 3).await;
    assert_eq!(bodies(&got), ["a", "b", "c"]);
    assert_eq!(got.iter().map(|entry| entry.position).collect::<HashSet<_>>().len(), 3);
}

pub(crate) async fn who_begins_with_what_was_heard_lately_gets_everything_once(fixture: &mut impl Fixture) {
    let (t, second) = (fixture.transport(), fixture.second().await);
    let id = work();
    // Whoever has never listened has heard of nothing yet; whoever has, of something.
    for round in 0..3 {
        let (a, b) = (format!("{round}a"), format!("{round}b"));
        t.log.append(vec![status(id, a.clone())]).await.unwrap();
        second.log.append(vec![response(id, b.clone())]).await.unwrap();
        let known: Vec<String> = bodies(&everything(&t, Filter::Work(id)).await);
        for reader in [&t, &second] {
            // A transport whose look costs nothing has no need of this.
            let Some((mut entries, mut follow)) = reader.log.lately(Filter::Work(id)).await.unwrap() else { return };
            while entries.len() < known.len() {
                entries.extend(within(follow.next()).await.unwrap());
            }
            entries.sort_by_key(|entry| entry.position.seq);
            assert_eq!(bodies(&entries), known, "round {round}");
        }
    }
}
