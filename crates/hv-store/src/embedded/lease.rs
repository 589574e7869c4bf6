//! When leases end: deadlines on the monotonic clock, kept in memory only.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::{LeaseId, Result, StoreError};

/// How long after an expiry that could not be written it is tried again.
const RETRY: Duration = Duration::from_secs(1);

struct Lease {
    ttl: Duration,
    deadline: Instant,
    /// Its time is up and the writer is deleting its keys: it cannot be renewed any more.
    ending: bool,
}

/// All leases with their deadlines.
#[derive(Default)]
pub(super) struct Leases {
    by_id: HashMap<LeaseId, Lease>,
    by_deadline: BTreeSet<(Instant, LeaseId)>,
}

impl Leases {
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

    #[test]
    fn a_lease_lives_for_its_ttl_after_each_renewal() {
        let (mut leases, start, id) = (Leases::default(), Instant::now(), LeaseId(1));
        leases.insert(id, TTL, start);
        leases.renew(id, start + TTL / 2).unwrap();
        assert!(leases.take_due(start + TTL, 8).is_empty());
        assert_eq!(leases.next_deadline(), Some(start + TTL / 2 + TTL));
        assert_eq!(leases.take_due(start + TTL * 2, 8), [id]);
    }

    #[test]
    fn an_overdue_lease_cannot_be_renewed() {
        let (mut leases, start, id) = (Leases::default(), Instant::now(), LeaseId(1));
        leases.insert(id, TTL, start);
        assert!(leases.renew(id, start + TTL).is_err());
        leases.take_due(start + TTL, 8);
        assert!(leases.renew(id, start).is_err());
    }

    #[test]
    fn an_expiry_that_failed_is_handed_out_again() {
        let (mut leases, start, id) = (Leases::default(), Instant::now(), LeaseId(1));
        leases.insert(id, TTL, start);
        assert_eq!(leases.take_due(start + TTL, 8), [id]);
        assert!(leases.take_due(start + TTL, 8).is_empty());
        assert_eq!(leases.take_due(start + TTL + RETRY, 8), [id]);
        leases.remove(id);
        assert_eq!(leases.next_deadline(), None);
    }
}
