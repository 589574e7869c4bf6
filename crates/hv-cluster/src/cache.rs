//! The watch cache: every record in memory, and the changes as a resumable stream.
//!
//! # Guarantees
//! - The state is that of the store at [`Cache::revision`], exactly; [`Cache::wait_for`] makes a read as fresh as needed.
//! - A subscriber gets each change once and in order, or [`Lagged`](SubscriptionError) where it was too slow.
//!
//! # Failure and recovery
//! A watch that ends is resumed; where the store no longer keeps the revision, everything is read afresh and the
//! differences are published as changes, so that subscribers do not notice. [`Cache::is_fresh`] tells whether the watch runs.
//! Only where more has changed than the history holds, as when a cache is filled for the first time, are subscribers told
//! that they lagged.

mod change;
mod differences;
mod feed;
mod fill;
mod index;
mod intern;
mod list;
mod state;
mod tally;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use hv_store::keys::Keys;
use hv_store::{Change, KeyRange, KeyValue, SharedStore, StoreError};
use hv_types::{Revision, ServiceError};
use parking_lot::RwLock;
use rand::Rng;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

pub use feed::{Batch, Delta, Subscription, SubscriptionError};
pub use list::Chunk;
pub use state::{Candidate, NodeEntry, State};
pub use tally::Counts;

use crate::error::Result;
use change::Decoded;
use feed::Feed;

/// How long a read waits for the cache before it gives up.
const WAIT_LIMIT: Duration = Duration::from_secs(5);
/// The pause before a watch that failed is tried again, at first and at most.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Every record in memory.
pub struct Cache {
    store: SharedStore,
    keys: Keys,
    inner: RwLock<Inner>,
    revision: watch::Sender<Revision>,
    fresh: AtomicBool,
}

struct Inner {
    state: State,
    feed: Feed,
}

impl Cache {
    pub(crate) fn new(store: SharedStore, keys: Keys) -> Arc<Self> {
        Arc::new(Self {
            store,
            keys,
            inner: RwLock::new(Inner { state: State::default(), feed: Feed::new() }),
            revision: watch::Sender::new(Revision(0)),
            fresh: AtomicBool::new(false),
        })
    }

    /// Reads the state. Keep it short: the store's changes wait meanwhile. It must not read the cache again: a change that
    /// waits for the first look to end would keep the second from beginning, for ever.
    ///
    /// # Panics
    /// It reads the cache again, in a build with debug assertions.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        let _look = Look::begin();
        look(&self.inner.read().state)
    }

    /// The revision that the state reflects.
    #[must_use]
    pub fn revision(&self) -> Revision {
        *self.revision.borrow()
    }

    /// Whether the cache is filled and follows the store.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.fresh.load(Ordering::Relaxed)
    }

    /// Waits until the state reflects `revision`.
    ///
    /// # Errors
    /// It does not within a few seconds: the store does not answer.
    pub async fn wait_for(&self, revision: Revision) -> Result<()> {
        let mut seen = self.revision.subscribe();
        let reached = seen.wait_for(|now| *now >= revision);
        match tokio::time::timeout(WAIT_LIMIT, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => {
                Err(ServiceError::unavailable("this server has not caught up with the store; try again")
                    .into())
            }
        }
    }

    /// Looks at the state and subscribes to everything after it, in one instant; else as [`read`](Self::read).
    ///
    /// # Panics
    /// As [`read`](Self::read) does.
    pub fn subscribe<T>(&self, look: impl FnOnce(&State) -> T) -> (T, Subscription) {
        let _look = Look::begin();
        let inner = self.inner.read();
        (look(&inner.state), inner.feed.subscribe())
    }

    /// Subscribes to everything from `from` (included) on. The cache must have caught up with whatever told of `from`.
    ///
    /// # Errors
    /// The changes since then are no longer kept, or `from` is beyond the next revision: it is of another history.
    pub fn subscribe_from(&self, from: Revision) -> std::result::Result<Subscription, SubscriptionError> {
        let _look = Look::begin();
        let inner = self.inner.read();
        if from.0 > inner.state.revision.0 + 1 {
            return Err(SubscriptionError::Expired);
        }
        inner.feed.subscribe_from(from)
    }

    /// Fills the cache and follows the store until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        let mut pause = RETRY_PAUSE.0;
        let mut from = None;
        while !stop.is_cancelled() {
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                outcome = self.follow(&mut from) => outcome,
            };
            let was_fresh = self.fresh.swap(false, Ordering::Relaxed);
            if let Err(StoreError::Compacted { .. }) = &outcome {
                from = None;
            }
            if let Err(error) = outcome {
                warn!(
                    error = hv_telemetry::error_chain(&error),
                    "the watch of the store ended; it is resumed"
                );
            }
            pause = if was_fresh { RETRY_PAUSE.0 } else { (pause * 2).min(RETRY_PAUSE.1) };
            // Servers that lost the store at once must not all come back at once.
            let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.5));
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(jittered) => {}
            }
        }
    }

    async fn follow(&self, from: &mut Option<Revision>) -> std::result::Result<(), StoreError> {
        let start = match *from {
            Some(revision) => revision,
            None => Revision(self.fill().await?.0 + 1),
        };
        *from = Some(start);
        // The whole store, not only our prefix: then every revision is seen, and waiting for one never stalls.
        let mut watch = self.store.watch(KeyRange::Prefix(bytes::Bytes::new()), Some(start)).await?;
        self.fresh.store(true, Ordering::Relaxed);
        while let Some(events) = watch.next().await {
            let events = events?;
            self.apply(events.revision, events.changes);
            *from = Some(Revision(events.revision.0 + 1));
        }
        Err(StoreError::Closed)
    }

    fn replace(&self, mut state: State, revision: Revision) {
        // Nobody else changes the state meanwhile: it is this task that follows the store.
        let (deltas, backwards) = {
            let inner = self.inner.read();
            (inner.state.differences(&state), revision < inner.state.revision)
        };
        debug!(%revision, changes = deltas.len(), "the cache was filled");
        state.revision = revision;
        let batch = (!backwards && Feed::has_room_for(&deltas)).then(|| Batch::new(&state, deltas));
        let mut inner = self.inner.write();
        let before = std::mem::replace(&mut inner.state, state);
        match batch {
            Some(batch) => {
                inner.feed.publish(batch);
                if before.revision == Revision(0) {
                    inner.feed.begin_after(revision);
                }
            }
            None => inner.feed.restart(revision),
        }
        drop(inner);
        self.revision.send_replace(revision);
        drop(before);
    }

    fn apply(&self, revision: Revision, changes: Vec<Change>) {
        enum Step {
            Put(Decoded),
            Delete(bytes::Bytes),
        }
        let steps: Vec<_> = changes
            .into_iter()
            .map(|change| match change {
                Change::Put(kv) => Step::Put(decode(&self.keys, &kv)),
                Change::Deleted { key, .. } => Step::Delete(key),
            })
            .collect();
        let mut inner = self.inner.write();
        let mut deltas = Vec::with_capacity(steps.len());
        for step in steps {
            match step {
                Step::Put(decoded) => deltas.extend(inner.state.put(decoded)),
                Step::Delete(key) => deltas.extend(inner.state.delete(&self.keys.parse(&key))),
            }
        }
        inner.state.revision = revision;
        let batch = Batch::new(&inner.state, deltas);
        inner.feed.publish(batch);
        drop(inner);
        self.revision.send_replace(revision);
    }
}

/// One thread's look at the cache: with debug assertions a second within it is told of by a panic, every time, where it
/// would otherwise hang the server now and then.
struct Look;

thread_local! {
    static LOOKS: Cell<bool> = const { Cell::new(false) };
}

impl Look {
    fn begin() -> Self {
        debug_assert!(!LOOKS.replace(true), "the cache is read while it is read");
        Self
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        LOOKS.set(false);
    }
}

/// Reads what a key holds; what cannot be read is told of and left out.
fn decode(keys: &Keys, kv: &KeyValue) -> Decoded {
    Decoded::read(keys, kv).unwrap_or_else(|error| {
        warn!(error = hv_telemetry::error_chain(&error), "a record is ignored");
        Decoded::unreadable(keys, kv)
    })
}

#[cfg(test)]
mod tests;
