//! What this server knows of nodes beyond the store: their last heartbeats, and since when the lost ones are lost.
//!
//! # Theory of operation
//! Every server, leading or not, follows the cache and notes on its own monotonic clock when it sees a node's lease
//! vanish. Nothing of it is stored and nothing of it comes from another machine's clock, so that a server that was
//! stopped for a while, or has just begun, can only count too little, never too much.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use hv_proto::v1;
use hv_types::NodeId;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::Cluster;
use crate::cache::{Delta, SubscriptionError};

/// Into how many parts the table of heartbeats is cut, so that they do not wait for each other.
const SHARDS: usize = 16;

/// Since when a node is lost, as this server saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// When it was seen, on this server's monotonic clock.
    pub since: Instant,
    /// The same by the wall clock, for people.
    pub at: SystemTime,
    /// Whether this server saw the lease vanish. Otherwise it only found it gone, and does not know but that the lease
    /// was lost in another way than by running out (with a store that was restored, say).
    pub witnessed: bool,
}

impl Lost {
    /// How long it must stay so before it is certain that a node that fences has stopped what may run elsewhere. A lease
    /// that was seen to vanish had run its time: the grace is all that is left to wait for. One that was found gone says
    /// nothing of when the node's last heartbeat was answered: it is given its whole time afresh.
    #[must_use]
    pub fn certain_after(&self, lease_ttl: Duration, grace: Duration) -> Duration {
        if self.witnessed { grace } else { lease_ttl + grace }
    }
}

/// When a node's last heartbeat came, and what it said was in use.
pub(super) type Seen = (SystemTime, Option<v1::NodeUsage>);

/// What this server knows of nodes, in memory only.
#[derive(Default)]
pub struct Liveness {
    seen: [Mutex<HashMap<NodeId, Seen>>; SHARDS],
    lost: Mutex<HashMap<NodeId, Lost>>,
}

impl Liveness {
    fn shard(&self, id: &NodeId) -> &Mutex<HashMap<NodeId, Seen>> {
        &self.seen[usize::from(spread(id)) % SHARDS]
    }

    pub(super) fn seen(&self, id: &NodeId, usage: Option<v1::NodeUsage>) {
        let now = SystemTime::now();
        let mut nodes = self.shard(id).lock();
        match nodes.get_mut(id) {
            Some(entry) => *entry = (now, usage.or(entry.1)),
            None => {
                nodes.insert(id.clone(), (now, usage));
            }
        }
    }

    pub(super) fn of(&self, id: &NodeId) -> Option<Seen> {
        self.shard(id).lock().get(id).copied()
    }

    /// Since when a node is lost; `None` while it lives, and for a moment after it was lost.
    #[must_use]
    pub fn lost(&self, id: &NodeId) -> Option<Lost> {
        self.lost.lock().get(id).copied()
    }

    fn note(&self, delta: &Delta) {
        let Delta::Node { id, before, after } = delta else { return };
        match after {
            Some((_, true)) => {
                self.lost.lock().remove(id);
            }
            Some((_, false)) => {
                let witnessed = before.as_ref().is_some_and(|(_, live)| *live);
                let (since, at) = (Instant::now(), SystemTime::now());
                self.lost.lock().entry(id.clone()).or_insert(Lost { since, at, witnessed });
            }
            None => {
                self.lost.lock().remove(id);
                self.shard(id).lock().remove(id);
            }
        }
    }

    /// Begins afresh: what is lost now was found so.
    fn restart(&self, lost: Vec<NodeId>) {
        let (since, at) = (Instant::now(), SystemTime::now());
        *self.lost.lock() = lost.into_iter().map(|id| (id, Lost { since, at, witnessed: false })).collect();
    }
}

/// A number of the node's own, to spread what many nodes do at once; the same on every server and in every run.
pub(super) fn spread(id: &NodeId) -> u8 {
    // FNV-1a (draft-eastlake-fnv, 64 bits), folded.
    let hash = id.as_str().bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash ^ (hash >> 32) ^ (hash >> 16) ^ (hash >> 8)) as u8
}

impl Cluster {
    /// What this server knows of nodes beyond the store.
    #[must_use]
    pub fn liveness(&self) -> &Liveness {
        &self.liveness
    }

    /// Notes which nodes are lost, and since when, until `stop`. Every server does, so that one that takes the lead
    /// knows what it has seen itself.
    pub(crate) async fn watch_liveness(&self, stop: CancellationToken) {
        let follow = async {
            loop {
                let (lost, mut changes) = self.cache.subscribe(|state| {
                    let lost = state.nodes().filter(|(_, entry)| !entry.is_live());
                    lost.map(|(record, _)| record.id.clone()).collect()
                });
                self.liveness.restart(lost);
                loop {
                    match changes.next().await {
                        Ok(Some(batch)) => batch.deltas.iter().for_each(|delta| self.liveness.note(delta)),
                        Ok(None) => std::future::pending().await,
                        Err(SubscriptionError::Lagged | SubscriptionError::Expired) => break,
                    }
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = follow => {}
        }
    }
}
