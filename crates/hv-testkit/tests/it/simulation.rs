//! Random histories of whole clusters, and that they find what is planted.

use hv_store::{SharedStore, conformance};
use hv_testkit::simulation::{Bug, SimStore, run, run_all};

/// Histories of a plain test run; `hack/simulate.sh` runs many more.
const SEEDS: u64 = 60;
/// Within how many histories a planted bug must show.
const FOUND_WITHIN: u64 = 400;

macro_rules! chapters {
    ($($chapter:ident),*) => {$(
        #[tokio::test]
        async fn $chapter() {
            let store: SharedStore = SimStore::alone();
            conformance::$chapter(&store).await;
        }
    )*};
}

mod simulated_store {
    use super::*;

    chapters!(keys, transactions, watches, history, compaction, leases, races);
}

#[test]
fn random_histories_hold_every_invariant() {
    run_all(0..SEEDS, 2, None, |outcome| {
        if let Some(violation) = &outcome.violation {
            let tail = outcome.tail.join("\n");
            panic!(
                "{tail}\nseed {} breaks invariant {}: {}",
                outcome.seed, violation.invariant, violation.what
            );
        }
        true
    })
    .unwrap();
}

#[test]
fn a_seed_is_one_history() {
    for seed in [1, 2, 3] {
        let (first, second) = (run(seed, None, false).unwrap(), run(seed, None, false).unwrap());
        assert!(first.events > 10, "seed {seed} has {} events", first.events);
        assert_eq!((first.hash, first.events), (second.hash, second.events), "seed {seed}");
    }
    assert_ne!(run(1, None, false).unwrap().hash, run(2, None, false).unwrap().hash);
}

macro_rules! planted {
    ($($name:ident = $bug:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            let mut found = None;
            run_all(0..FOUND_WITHIN, 2, Some(Bug::$bug), |outcome| {
                found = outcome.violation;
                found.is_none()
            })
            .unwrap();
            assert!(found.is_some(), "{} is not found within {FOUND_WITHIN} histories", Bug::$bug.name());
        }
    )*};
}

mod found {
    use super::*;

    planted! {
        a_leader_that_was_deposed_and_still_writes = NoLeaderGuard,
        a_write_without_comparison = NoCompare,
        a_cache_that_forgets_late = LateDelete,
        a_request_key_recorded_apart = RequestKeyApart,
        a_cache_that_is_behind = EarlyProgress,
        a_lost_commit = LostCommit,
        an_instance_gone_too_early = GoneTooEarly,
        a_release_on_doubt = ReleaseOnDoubt,
        a_drain_that_does_not_wait = DrainDropsBinding,
        a_misrouted_assignment = Misrouted,
        a_lost_message = LostMessage,
        an_unwritten_report = UnwrittenReport,
        a_lease_counted_by_a_slow_clock = SlowClock,
        a_node_taken_for_lost_too_early = HastyLease,
    }
}
