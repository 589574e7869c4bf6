//! The changes of the cache as a stream that can be resumed.

use std::collections::VecDeque;
use std::sync::Arc;

use hv_types::{Event, InstanceId, InstanceRecord, NodeId, NodeRecord, Revision};
use tokio::sync::broadcast;

/// How many batches a slow subscriber may be behind.
const SUBSCRIBER_BOUND: usize = 4096;
/// How many batches are kept for those who resume.
const HISTORY_BOUND: usize = 16_384;

/// One change of the state.
#[derive(Clone, Debug)]
pub enum Delta {
    /// An instance came, changed or went.
    Instance {
        /// Which one.
        id: InstanceId,
        /// As it was.
        before: Option<Arc<InstanceRecord>>,
        /// As it is.
        after: Option<Arc<InstanceRecord>>,
    },
    /// A node came, changed, went, or its lease did.
    Node {
        /// Which one.
        id: NodeId,
        /// As it was, and whether it was alive.
        before: Option<(Arc<NodeRecord>, bool)>,
        /// As it is, and whether it is alive.
        after: Option<(Arc<NodeRecord>, bool)>,
    },
    /// Something happened.
    Event(Arc<Event>),
}

/// All changes of one revision.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Everything up to and including this revision has now been seen.
    pub revision: Revision,
    /// The changes, in order; empty where only the revision moved on.
    pub deltas: Vec<Delta>,
}

/// Why a subscription ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubscriptionError {
    /// The changes asked for are no longer kept.
    Expired,
    /// The subscriber was too slow.
    Lagged,
}

/// Changes, from some revision on.
pub struct Subscription {
    past: VecDeque<Arc<Batch>>,
    live: broadcast::Receiver<Arc<Batch>>,
}

impl Subscription {
    /// The next batch; `None` when the cache is gone.
    ///
    /// # Errors
    /// The subscriber was too slow; it must start again from a fresh list.
    pub async fn next(&mut self) -> Result<Option<Arc<Batch>>, SubscriptionError> {
        if let Some(batch) = self.past.pop_front() {
            return Ok(Some(batch));
        }
        match self.live.recv().await {
            Ok(batch) => Ok(Some(batch)),
            Err(broadcast::error::RecvError::Closed) => Ok(None),
            Err(broadcast::error::RecvError::Lagged(_)) => Err(SubscriptionError::Lagged),
        }
    }
}

/// Publishes batches and keeps the last of them.
pub(super) struct Feed {
    live: broadcast::Sender<Arc<Batch>>,
    history: VecDeque<Arc<Batch>>,
    /// Everything after this revision is in `history`.
    since: Revision,
}

impl Feed {
    pub(super) fn new() -> Self {
        Self { live: broadcast::Sender::new(SUBSCRIBER_BOUND), history: VecDeque::new(), since: Revision(0) }
    }

    /// Forgets the past: nothing before `revision` can be resumed from.
    pub(super) fn restart(&mut self, revision: Revision) {
        self.history.clear();
        self.since = revision;
    }

    pub(super) fn publish(&mut self, revision: Revision, deltas: Vec<Delta>) {
        let batch = Arc::new(Batch { revision, deltas });
        if !batch.deltas.is_empty() {
            self.history.push_back(batch.clone());
        }
        while self.history.len() > HISTORY_BOUND {
            if let Some(dropped) = self.history.pop_front() {
                self.since = dropped.revision;
            }
        }
        // Nobody listening is no error.
        let _ = self.live.send(batch);
    }

    pub(super) fn subscribe(&self) -> Subscription {
        Subscription { past: VecDeque::new(), live: self.live.subscribe() }
    }

    pub(super) fn subscribe_from(&self, from: Revision) -> Result<Subscription, SubscriptionError> {
        if from <= self.since {
            return Err(SubscriptionError::Expired);
        }
        let past = self.history.iter().filter(|batch| batch.revision >= from).cloned().collect();
        Ok(Subscription { past, live: self.live.subscribe() })
    }
}
