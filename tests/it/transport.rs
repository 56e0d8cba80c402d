//! What every transport promises. Each behaviour is written once and runs over each transport named at the end.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a behaviour that fails should say where")]

mod blobs;
mod local;
mod log;
mod nats;
mod queue;
mod table;

use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use lattice_mcp::model::id::{InstanceId, StationId, WorkId};
use lattice_mcp::model::time::Timestamp;
use lattice_mcp::model::turn::Turn;
use lattice_mcp::transport::{Accept, Entry, Filter, Follow, Item, Position, Record, Subject, Take, Taken, Transport, Want};
use uuid::Uuid;

/// One store that a behaviour has to itself.
#[async_trait]
pub(crate) trait Fixture: Send + Sync + Sized {
    /// An empty store.
    async fn start() -> Self;
    /// A handle on it; always the same.
    fn transport(&self) -> Transport;
    /// One more handle that shares nothing with the first but the store, as another process would.
    async fn second(&mut self) -> Transport;
    /// The time, as the store tells it.
    fn now(&self) -> Timestamp;
    /// Lets time pass for leases, delays, deadlines and expiry.
    async fn pass(&self, span: Duration);
    /// Ends every handle, and opens the store again.
    async fn restart(&mut self) -> Transport;
}

/// Waits, but not for ever.
pub(crate) async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it did not happen within a minute")
}

pub(crate) const LEASE: Duration = Duration::from_secs(10);
pub(crate) const AGEING: Duration = Duration::from_secs(10);
pub(crate) const HOUR: Duration = Duration::from_secs(3600);

pub(crate) fn work() -> WorkId {
    WorkId::new(Uuid::now_v7())
}

pub(crate) fn holder() -> InstanceId {
    InstanceId::new(Uuid::new_v4())
}

pub(crate) fn station(name: &str) -> StationId {
    name.parse().unwrap()
}

pub(crate) fn response(id: WorkId, body: impl Into<Bytes>) -> Record {
    Record { subject: Subject::Response(id), body: body.into() }
}

pub(crate) fn status(id: WorkId, body: impl Into<Bytes>) -> Record {
    Record { subject: Subject::Status(id), body: body.into() }
}

pub(crate) fn audit(noun: &'static str, verb: &'static str) -> Record {
    Record { subject: Subject::Audit { noun: noun.into(), verb: verb.into() }, body: Bytes::from_static(b"{}") }
}

pub(crate) fn item(id: WorkId, lane: &str, priority: i32, now: Timestamp) -> Item {
    item_of("one", id, lane, priority, now)
}

/// An item that this orchestrator pushes.
pub(crate) fn item_of(origin: &str, id: WorkId, lane: &str, priority: i32, now: Timestamp) -> Item {
    let turn = Turn::new(origin, priority, now, AGEING);
    Item {
        id,
        lane: lane.into(),
        turn,
        deadline: now.after(HOUR),
        held_back: false,
        beside: None,
        body: Bytes::from(format!("order {id}")),
    }
}

pub(crate) fn want(lanes: &[(&str, u32)], room: u32) -> Want {
    Want {
        holder: holder(),
        lanes: lanes.iter().map(|(lane, room)| ((*lane).to_owned(), *room)).collect(),
        room,
        per_minute: Vec::new(),
        ageing: AGEING,
        lease: LEASE,
        accept: Accept::default(),
        only: None,
        over: None,
        look: true,
    }
}

pub(crate) fn ids(taken: &[Taken]) -> Vec<WorkId> {
    taken.iter().map(|taken| taken.delivery.id).collect()
}

pub(crate) fn bodies(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|entry| String::from_utf8(entry.body.to_vec()).unwrap()).collect()
}

/// Follows until so many entries have come.
pub(crate) async fn collect(follow: &mut Box<dyn Follow>, count: usize) -> Vec<Entry> {
    let mut all = Vec::new();
    while all.len() < count {
        let next = within(follow.next()).await.unwrap();
        assert!(!next.is_empty(), "a follower was given nothing");
        all.extend(next);
    }
    all
}

pub(crate) async fn everything(t: &Transport, filter: Filter) -> Vec<Entry> {
    t.log.read(filter, Position::default(), usize::MAX).await.unwrap()
}

/// Takes one item of a lane.
pub(crate) async fn take_one(t: &Transport, station: &StationId, lane: &str) -> Taken {
    let mut take: Take = t.queue.take(station, &want(&[(lane, 1)], 1)).await.unwrap();
    assert_eq!(take.taken.len(), 1, "nothing to take");
    take.taken.remove(0)
}

macro_rules! behaviours {
    ($fixture:ty: $($file:ident { $($name:ident)* })*) => {
        $(mod $file { $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let mut fixture = <$fixture as crate::transport::Fixture>::start().await;
                crate::transport::$file::$name(&mut fixture).await;
            }
        )* })*
    };
}

macro_rules! contract {
    ($transport:ident: $fixture:ty) => {
        mod $transport {
            behaviours! { $fixture:
                log {
                    appends_stand_in_order
                    one_append_stays_together
                    a_read_gives_what_it_was_asked_for
                    a_follower_gets_what_is_there_and_then_what_comes
                    a_follower_of_one_work_gets_only_its_own
                    a_follower_from_a_position_gets_nothing_before_it
                    a_follower_may_begin_at_any_place
                    followers_skip_and_repeat_nothing_while_many_write
                    a_follower_that_falls_behind_misses_nothing
                    a_dropped_wait_loses_nothing
                    many_followers_of_single_works_get_theirs
                    another_process_sees_an_append_within_50_ms
                    the_head_counts_every_process
                    the_log_survives_a_restart
                    who_begins_with_what_was_heard_lately_gets_everything_once
                }
                queue {
                    the_most_urgent_goes_first_and_among_equals_the_older
                    what_has_waited_long_goes_before_what_is_more_urgent
                    orchestrators_of_equal_urgency_take_turns
                    a_paused_lane_gives_nothing_to_anybody
                    a_pause_is_seen_survives_and_is_taken_back
                    no_minute_has_more_takings_than_the_lane_may
                    ten_thousand_items_are_taken_in_the_right_order_and_soon
                    a_take_keeps_to_its_lanes_and_their_room
                    a_taken_item_is_whole
                    pushing_again_changes_nothing
                    what_belongs_beside_another_is_pushed_only_where_that_is
                    a_full_hook_refuses_and_nothing_has_happened
                    held_items_do_not_fill_a_hook
                    what_is_held_back_takes_no_room_from_what_may_start
                    a_push_announces_once
                    each_item_is_taken_once
                    a_held_item_is_not_given_to_others
                    a_lapsed_lease_frees_the_item_as_a_new_attempt
                    an_old_delivery_is_void
                    a_lapsed_delivery_is_good_until_somebody_else_takes
                    extending_holds_on_and_tells_what_was_lost
                    extending_moves_the_deadline
                    settling_removes_and_records
                    settling_twice_keeps_the_records
                    a_released_item_waits_until_it_is_due
                    a_released_item_has_its_new_deadline
                    waking_frees_at_once
                    waking_what_has_lapsed_leaves_its_delivery_good
                    what_has_lapsed_is_taken_over_only_by_whoever_may
                    what_is_held_back_waits_until_somebody_wakes_it
                    waking_moves_the_deadline_of_what_is_held
                    waking_what_is_held_or_gone_only_records
                    removing_spares_what_is_held
                    past_its_deadline_only_take_expired_gives_an_item
                    take_expired_holds_what_it_gives
                    take_expired_leaves_live_leases_alone
                    of_what_is_past_its_deadline_the_lapsed_is_taken_only_by_whoever_may
                    the_load_counts_waiting_and_held
                    a_signal_tells_of_every_way_to_become_free
                    a_signal_is_not_missed_between_two_waits
                    a_signal_comes_from_another_process
                    a_signal_tells_of_a_lapsed_lease
                    stations_do_not_mix
                    hooks_survive_a_restart
                }
                table {
                    what_is_put_is_there
                    rows_are_listed_by_the_first_part_of_their_keys
                    expectations_are_kept
                    one_of_many_creates_a_key
                    one_of_many_changes_a_row
                    removing_keeps_to_what_is_expected
                    buckets_do_not_mix
                    numbers_are_given_once
                    numbers_begin_above_their_floor
                    a_row_expires
                    putting_again_keeps_a_row_alive
                    a_watcher_gets_rows_then_loaded_then_changes
                    a_watcher_of_an_empty_bucket_is_told_so
                    a_watcher_is_told_of_expiry
                    a_watcher_sees_another_process_within_50_ms
                    a_watcher_that_falls_behind_ends_up_right
                    tables_survive_a_restart
                }
                blobs {
                    a_blob_is_named_by_its_digest
                    ranges_are_cut_at_the_end
                    an_unknown_digest_is_an_error
                    a_digest_can_not_leave_the_store
                    the_same_bytes_are_one_blob
                    a_hundred_megabytes_pass_through_little_memory
                    a_source_that_fails_leaves_nothing
                    another_process_reads_a_blob
                }
            }
        }
    };
}

contract! { over_local: crate::transport::local::Store }
contract! { over_nats: crate::transport::nats::Server }
