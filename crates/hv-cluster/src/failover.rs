//! Failover: what may run elsewhere is started there once it is certain that it does not run on its lost node any more.
//!
//! # Theory of operation
//! A node keeps its lease alive; its fencer stops what may run elsewhere before the lease can have ended
//! ([`Assignment.fence`](hv_proto::v1::Assignment)). Every server notes on its own monotonic clock when it sees a lease
//! vanish ([`crate::nodes::Lost`]). The leader looks at the nodes that are lost: [`decide`](fn@decide), a pure function, says for
//! each instance whether it is started elsewhere, when it will be, or why not. What is to be started loses its binding
//! in a transaction; the placer, which knows only instances without one, binds it with the next epoch, and from then on
//! whatever the old node says of it is of an old epoch.
//!
//! Why an instance is not started elsewhere is written once into its record, and recorded as an event, some moments after
//! the loss, so that a node that was away for a moment costs nothing; it is taken away once the node is back. Instances
//! that may be started come before such notes.
//!
//! # Invariants
//! An instance is unbound from a lost node only by a transaction that compares, in one instant of the store,
//! 1. the leader key: another leader refuses it;
//! 2. `Absent` of the node's lease: a node that is back refuses it;
//! 3. the revision of the node's record, which each registration raises: a node that was back in between, and is lost
//!    again, refuses it, as does an operator who holds failover or a node that withdrew its word to fence;
//! 4. the revision of the instance's record: a stop, a deletion, a report refuse it.
//!
//! So what was decided stays true, however late the transaction arrives: that the node has been lost without a break for
//! the time that was counted follows from 2 and 3, and more time does no harm.
//!
//! # Failure and recovery: the interleavings
//! - *The leader is stopped for a minute (SIGSTOP) and goes on.* Its monotonic clock went on, so its timers fire at once,
//!   over a cache that is a minute old. If another server leads by now, 1 refuses. If it still leads (a long leader TTL)
//!   and the node came back, 2 refuses; if it came back and was lost again, 3 does. Only if nothing happened meanwhile is
//!   it done, and then rightly.
//! - *It is stopped between the decision and the transaction.* The same compares hold or do not.
//! - *The whole machine sleeps.* Its monotonic clock stands still: it counts too little.
//! - *The leader dies while it counts.* The next one counts from the begin of its own term, never earlier; a loss that it saw
//!   itself before counts as seen, so only the grace is left to wait for.
//! - *The leader and the node die together; or all servers were down.* A lease that nobody saw vanish says nothing of when
//!   the node's last heartbeat was answered (the store may have been restored from a backup, and leases are not in it): the
//!   node has the lease's whole time and the grace from the begin of the term, in which a living one registers again.
//! - *The node returns while it is counted.* Its lease is back: nothing is decided, and 2 and 3 refuse what is under way.
//! - *The node flaps.* Each return ends the counting; the next loss begins it anew.
//! - *The node returns after the instance was unbound.* Its agent is told to release what it has, as its epoch is old.
//! - *The leader dies after the transaction.* The record is unbound; the next leader's placer finds it.
//! - *An instance on a lost node is deleted.* It goes once it is certain that it does not run, by fencing or by an operator's
//!   word; otherwise it waits for the node (or `delete --force`).
//! - *A stop is asked for while its node is lost.* There is nothing to start: it stays bound, and says so.
//! - *It is started again while its node is lost.* It is decided on afresh, as every change of it is looked at.

pub mod decide;
mod work;

use std::time::SystemTime;

use hv_types::{InstanceRecord, InstanceState, NodeRecord, Resources};

pub use decide::{Decision, Situation, decide};

/// The record of an instance that is to be started afresh elsewhere, as its node was lost (`at`, if that is known).
#[must_use]
pub fn started_afresh(record: &InstanceRecord, node: &NodeRecord, at: Option<SystemTime>) -> InstanceRecord {
    let when = at.map(|at| format!(" at {}", utc(at))).unwrap_or_default();
    InstanceRecord {
        binding: None,
        generation: record.generation + 1,
        state: InstanceState::Pending,
        state_reason: format!("node {} was lost{when}; started afresh elsewhere", node.hostname),
        ip_address: String::new(),
        started_at: None,
        restart_count: 0,
        update_note: String::new(),
        holds: Resources::default(),
        recovery_note: String::new(),
        // What another node may hold of it is not taken up: it starts afresh.
        migration: None,
        ..record.clone()
    }
}

/// A moment as people read it: `2026-11-22 20:31:05 UTC`.
fn utc(at: SystemTime) -> String {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (mut days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year}-{:02}-{:02} {hour:02}:{minute:02}:{second:02} UTC", month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_moment_is_told_by_the_calendar() {
        let cases = [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (4_107_542_399, "2100-02-28 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
            (1_795_379_465, "2026-11-22 20:31:05 UTC"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(utc(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }
}
