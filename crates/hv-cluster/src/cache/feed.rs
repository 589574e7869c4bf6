//! The changes of the cache as a stream that can be resumed.
//!
//! # Theory of operation
//! There is one history, bounded by number and by bytes, and every subscriber is a position in it. One that is slow
//! costs nothing; when what it would read next is no longer kept, it is told that it lagged. To resume from a revision is
//! to take up a position in the same history.

use std::collections::VecDeque;
use std::sync::Arc;

use hv_types::{Event, InstanceId, InstanceRecord, NodeId, NodeRecord, OperationRecord, Revision};
use parking_lot::RwLock;
use tokio::sync::watch;

use super::state::State;

/// How many batches with changes are kept.
const HISTORY_BOUND: usize = 16_384;
/// How many bytes of records, estimated, the history keeps from being forgotten.
const HISTORY_BYTES: usize = 128 << 20;
/// What a change of an instance, a node, and anything else is estimated to take, in bytes.
const DELTA_BYTES: (usize, usize, usize) = (1 << 10, 4 << 10, 512);

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
    /// Nothing is bound to a node for a moment, or that is over.
    Hold {
        /// Which one.
        id: NodeId,
        /// Whether it is so.
        held: bool,
    },
    /// An operation came, changed or went.
    Operation {
        /// Which one.
        id: String,
        /// As it was.
        before: Option<Arc<OperationRecord>>,
        /// As it is.
        after: Option<Arc<OperationRecord>>,
    },
    /// Something happened.
    Event(Arc<Event>),
}

impl Delta {
    fn bytes(&self) -> usize {
        match self {
            Self::Instance { .. } => DELTA_BYTES.0,
            Self::Node { .. } => DELTA_BYTES.1,
            Self::Operation { .. } | Self::Event(_) | Self::Hold { .. } => DELTA_BYTES.2,
        }
    }
}

/// All changes of one revision.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Everything up to and including this revision has now been seen.
    pub revision: Revision,
    /// The changes, in order; empty where only the revision moved on.
    pub deltas: Vec<Delta>,
    /// By the position of its change: an instance as users see it, where that is not as the record says.
    shown: Vec<(usize, Arc<InstanceRecord>)>,
}

impl Batch {
    /// The changes that led to `state`.
    pub(super) fn new(state: &State, deltas: Vec<Delta>) -> Self {
        let mut shown = Vec::new();
        for (at, delta) in deltas.iter().enumerate() {
            if let Delta::Instance { after: Some(record), .. } = delta
                && state.lost_node(record).is_some()
            {
                shown.push((at, state.view(record)));
            }
        }
        Self { revision: state.revision, deltas, shown }
    }

    /// The instance that the change at `at` led to, as users see it; `None` if that is no change of an instance, or it is
    /// gone.
    #[must_use]
    pub fn shown(&self, at: usize) -> Option<&Arc<InstanceRecord>> {
        let Some(Delta::Instance { after: Some(record), .. }) = self.deltas.get(at) else { return None };
        let found = self.shown.binary_search_by_key(&at, |(position, _)| *position);
        Some(found.map_or(record, |found| &self.shown[found].1))
    }

    fn bytes(&self) -> usize {
        self.deltas.iter().map(Delta::bytes).sum()
    }
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
    history: Arc<RwLock<History>>,
    head: watch::Receiver<Revision>,
    /// The number of the batch to read next.
    next: u64,
    /// Everything up to here was delivered.
    seen: Revision,
}

impl Subscription {
    /// The next batch; `None` when the cache is gone. Where only the revision moved on, several revisions may come as one
    /// empty batch. Nothing is lost if the call is given up.
    ///
    /// # Errors
    /// The subscriber was too slow; it must start again from a fresh list.
    pub async fn next(&mut self) -> Result<Option<Arc<Batch>>, SubscriptionError> {
        loop {
            if let Some(batch) = self.ready()? {
                return Ok(Some(batch));
            }
            if self.head.changed().await.is_err() {
                return Ok(None);
            }
        }
    }

    fn ready(&mut self) -> Result<Option<Arc<Batch>>, SubscriptionError> {
        let head = *self.head.borrow_and_update();
        let history = self.history.read();
        let Some(at) = self.next.checked_sub(history.first) else { return Err(SubscriptionError::Lagged) };
        let found = usize::try_from(at).ok().and_then(|at| history.batches.get(at));
        if let Some(batch) = found {
            self.next += 1;
            self.seen = batch.revision;
            return Ok(Some(batch.clone()));
        }
        if head <= self.seen {
            return Ok(None);
        }
        self.seen = head;
        Ok(Some(Arc::new(Batch { revision: head, ..Batch::default() })))
    }
}

struct History {
    batches: VecDeque<Arc<Batch>>,
    /// The number of the oldest batch.
    first: u64,
    bytes: usize,
    /// Everything after this revision is in `batches`.
    since: Revision,
}

impl History {
    fn drop_oldest(&mut self) {
        if let Some(dropped) = self.batches.pop_front() {
            self.first += 1;
            self.bytes -= dropped.bytes();
            self.since = dropped.revision;
        }
    }
}

/// Publishes batches and keeps the last of them.
pub(super) struct Feed {
    history: Arc<RwLock<History>>,
    head: watch::Sender<Revision>,
}

impl Feed {
    pub(super) fn new() -> Self {
        let history = History { batches: VecDeque::new(), first: 0, bytes: 0, since: Revision(0) };
        Self { history: Arc::new(RwLock::new(history)), head: watch::Sender::new(Revision(0)) }
    }

    /// Whether so many changes can be published at once.
    pub(super) fn has_room_for(deltas: &[Delta]) -> bool {
        deltas.iter().map(Delta::bytes).sum::<usize>() <= HISTORY_BYTES / 2
    }

    /// Forgets the past: nothing up to `revision` can be resumed from, and who has not read all that was published is told
    /// that it lagged.
    pub(super) fn restart(&self, revision: Revision) {
        let mut history = self.history.write();
        // One number is left out, so that also who has read everything knows that it missed something.
        history.first += history.batches.len() as u64 + 1;
        history.batches.clear();
        history.bytes = 0;
        history.since = revision;
        drop(history);
        self.head.send_replace(revision);
    }

    /// Says that nothing up to `revision` can be resumed from: how things came to be as they are then is not known.
    pub(super) fn begin_after(&self, revision: Revision) {
        self.history.write().since = revision;
    }

    pub(super) fn publish(&self, batch: Batch) {
        let revision = batch.revision;
        if !batch.deltas.is_empty() {
            let mut history = self.history.write();
            history.bytes += batch.bytes();
            history.batches.push_back(Arc::new(batch));
            while history.batches.len() > HISTORY_BOUND
                || (history.bytes > HISTORY_BYTES && history.batches.len() > 1)
            {
                history.drop_oldest();
            }
        }
        self.head.send_replace(revision);
    }

    pub(super) fn subscribe(&self) -> Subscription {
        let history = self.history.read();
        let next = history.first + history.batches.len() as u64;
        let seen = *self.head.borrow();
        Subscription { history: self.history.clone(), head: self.head.subscribe(), next, seen }
    }

    pub(super) fn subscribe_from(&self, from: Revision) -> Result<Subscription, SubscriptionError> {
        let history = self.history.read();
        if from <= history.since {
            return Err(SubscriptionError::Expired);
        }
        let before = history.batches.partition_point(|batch| batch.revision < from);
        let next = history.first + before as u64;
        let seen = Revision(from.0 - 1);
        Ok(Subscription { history: self.history.clone(), head: self.head.subscribe(), next, seen })
    }
}
