//! When leases end: deadlines on the monotonic clock, kept in memory only.
//!
//! A lease ends only if its owner could have renewed it. While this process is stopped (SIGSTOP, a paused machine, a
//! debugger) nobody can, but the clock goes on. So a thread looks at the clock every [`TICK`]; where it did not for longer
//! than [`STALL`], the process stood still, and every lease starts again with its full time. A restart does the same.
//! The price: a process that is starved of CPU for longer than that notices lost owners later.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::{LeaseId, Result, StoreError};

/// How long after an expiry that could not be written it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How often the clock is looked at, and after which gap the process is taken to have stood still.
pub(super) const TICK: Duration = Duration::from_millis(250);
const STALL: Duration = Duration::from_millis(1500);

struct Lease {
    ttl: Duration,
    deadline: Instant,
    /// Its time is up and the writer is deleting its keys: it cannot be renewed any more.
    ending: bool,
}

/// All leases with their deadlines.
pub(super) struct Leases {
    by_id: HashMap<LeaseId, Lease>,
    by_deadline: BTreeSet<(Instant, LeaseId)>,
    last_tick: Instant,
}

impl Leases {
    pub(super) fn new(now: Instant) -> Self {
        Self { by_id: HashMap::new(), by_deadline: BTreeSet::new(), last_tick: now }
    }

    /// Notes that the process runs. If it did not for a while, every lease that has not ended starts again.
    pub(super) fn tick(&mut self, now: Instant) {
        let gap = now.saturating_duration_since(self.last_tick);
        self.last_tick = self.last_tick.max(now);
        if gap <= STALL {
            return;
        }
        tracing::warn!(
            gap_ms = gap.as_millis(),
            leases = self.by_id.len(),
            "this process stood still; leases start again"
        );
        self.by_deadline.clear();
        for (id, lease) in &mut self.by_id {
            if !lease.ending {
                lease.deadline = now + lease.ttl;
            }
            self.by_deadline.insert((lease.deadline, *id));
        }
    }

    /// Starts the clock of a lease.
    pub(super) fn insert(&mut self, id: LeaseId, ttl: Duration, now: Instant) {
        self.remove(id);
        let deadline = now + ttl;
        self.by_id.insert(id, Lease { ttl, deadline, ending: false });
        self.by_deadline.insert((deadline, id));
    }

    pub(super) fn contains(&self, id: LeaseId) -> bool {
        self.by_id.contains_key(&id)
    }

    /// Gives a lease its full time again. One that is overdue has ended, even if its keys are still there.
    pub(super) fn renew(&mut self, id: LeaseId, now: Instant) -> Result<()> {
        self.tick(now);
        let lease = self.by_id.get_mut(&id).ok_or(StoreError::LeaseNotFound(id))?;
        if lease.ending || lease.deadline <= now {
            return Err(StoreError::LeaseNotFound(id));
        }
        self.by_deadline.remove(&(lease.deadline, id));
        lease.deadline = now + lease.ttl;
        self.by_deadline.insert((lease.deadline, id));
        Ok(())
    }

    /// Takes up to `limit` leases whose time is up. Each is handed out again after [`RETRY`] unless it is removed.
    pub(super) fn take_due(&mut self, now: Instant, limit: usize) -> Vec<LeaseId> {
        self.tick(now);
        let due: Vec<_> =
            self.by_deadline.iter().take_while(|(at, _)| *at <= now).take(limit).copied().collect();
        for (deadline, id) in &due {
            self.by_deadline.remove(&(*deadline, *id));
            let lease = self.by_id.get_mut(id).expect("both maps hold the same leases");
            lease.ending = true;
            lease.deadline = now + RETRY;
            self.by_deadline.insert((lease.deadline, *id));
        }
        due.into_iter().map(|(_, id)| id).collect()
    }

    /// Forgets a lease.
    pub(super) fn remove(&mut self, id: LeaseId) {
        if let Some(lease) = self.by_id.remove(&id) {
            self.by_deadline.remove(&(lease.deadline, id));
        }
    }

    /// When the next one is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.by_deadline.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(10);

    /// Leases in a process that runs all the time: `until` is reached in small steps.
    struct Running(Leases, Instant);

    impl Running {
        fn start() -> (Self, Instant) {
            let start = Instant::now();
            (Self(Leases::new(start), start), start)
        }

        fn until(&mut self, until: Instant) -> &mut Leases {
            while self.1 + TICK < until {
                self.1 += TICK;
                self.0.tick(self.1);
            }
            &mut self.0
        }
    }

    #[test]
    fn a_lease_lives_for_its_ttl_after_each_renewal() {
        let ((mut leases, start), id) = (Running::start(), LeaseId(1));
        leases.0.insert(id, TTL, start);
        leases.until(start + TTL / 2).renew(id, start + TTL / 2).unwrap();
        assert!(leases.until(start + TTL).take_due(start + TTL, 8).is_empty());
        assert_eq!(leases.0.next_deadline(), Some(start + TTL / 2 + TTL));
        assert_eq!(leases.until(start + TTL * 2).take_due(start + TTL * 2, 8), [id]);
    }

    #[test]
    fn an_overdue_lease_cannot_be_renewed() {
        let ((mut leases, start), id) = (Running::start(), LeaseId(1));
        leases.0.insert(id, TTL, start);
        assert!(leases.until(start + TTL).renew(id, start + TTL).is_err());
        leases.0.take_due(start + TTL, 8);
        assert!(leases.0.renew(id, start).is_err());
    }

    #[test]
    fn an_expiry_that_failed_is_handed_out_again() {
        let ((mut leases, start), id) = (Running::start(), LeaseId(1));
        leases.0.insert(id, TTL, start);
        assert_eq!(leases.until(start + TTL).take_due(start + TTL, 8), [id]);
        assert!(leases.0.take_due(start + TTL, 8).is_empty());
        assert_eq!(leases.0.take_due(start + TTL + RETRY, 8), [id]);
        leases.0.remove(id);
        assert_eq!(leases.0.next_deadline(), None);
    }

    #[test]
    fn a_process_that_stood_still_gives_every_lease_its_full_time_again() {
        let ((mut leases, start), id) = (Running::start(), LeaseId(1));
        leases.0.insert(id, TTL, start);
        // Stopped for far longer than the lease lasts; the writer is the first to run again.
        let awake = start + TTL * 5;
        assert!(leases.0.take_due(awake, 8).is_empty());
        leases.1 = awake;
        assert!(leases.until(awake + TTL - TICK).take_due(awake + TTL - TICK, 8).is_empty());
        leases.0.renew(id, awake + TTL - TICK).unwrap();
        assert_eq!(leases.until(awake + TTL * 3).take_due(awake + TTL * 3, 8), [id]);
    }
}
