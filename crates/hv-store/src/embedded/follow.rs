//! Watches: each reads at its own pace, from memory if it keeps up and from disk if not.
//!
//! The writer only publishes the newest revision; it never waits for a watch and holds nothing for it. A watch knows
//! the next revision it has to look at, takes a bounded chunk from there, and filters it.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::{StreamExt, stream};
use tokio::sync::watch;

use super::read::{Place, history, read};
use super::recent::Revised;
use super::writer::Shared;
use crate::bounds::Interval;
use crate::{Change, Result, Revision, StoreError, WatchEvents, WatchStream};

/// Most revisions that a watch takes at once.
const CHUNK_REVISIONS: usize = 256;

struct Follower {
    shared: Arc<Shared>,
    interval: Interval,
    /// The next revision to look at.
    next: u64,
    committed: watch::Receiver<u64>,
    ready: VecDeque<WatchEvents>,
    over: bool,
}

/// Follows `interval` from revision `first` on.
pub(super) fn follow(
    shared: Arc<Shared>,
    interval: Interval,
    first: u64,
    committed: watch::Receiver<u64>,
) -> WatchStream {
    let follower = Follower { shared, interval, next: first, committed, ready: VecDeque::new(), over: false };
    stream::unfold(follower, |mut follower| async move {
        let item = follower.next_item().await?;
        Some((item, follower))
    })
    .boxed()
}

impl Follower {
    async fn next_item(&mut self) -> Option<Result<WatchEvents>> {
        loop {
            if let Some(events) = self.ready.pop_front() {
                return Some(Ok(events));
            }
            if self.over {
                return None;
            }
            let committed = *self.committed.borrow_and_update();
            if self.next > committed {
                // The writer is gone once the store is closed.
                self.committed.changed().await.ok()?;
                continue;
            }
            match self.take_chunk(committed).await {
                Ok(chunk) => self.filter(&chunk, committed),
                Err(StoreError::Closed) => return None,
                Err(error) => {
                    self.over = true;
                    return Some(Err(error));
                }
            }
        }
    }

    async fn take_chunk(&self, committed: u64) -> Result<Vec<Arc<Revised>>> {
        let next = self.next;
        if let Some(chunk) = self.shared.recent.lock().from(next, CHUNK_REVISIONS) {
            return Ok(chunk);
        }
        read(&self.shared, Place::Thread, "reading history", move |txn| {
            history(txn, next, committed, CHUNK_REVISIONS)
        })
        .await
    }

    fn filter(&mut self, chunk: &[Arc<Revised>], committed: u64) {
        for revised in chunk {
            let mine = |change: &&Change| match change {
                Change::Put(kv) => self.interval.contains(&kv.key),
                Change::Deleted { key, .. } => self.interval.contains(key),
            };
            let changes: Vec<_> = revised.changes.iter().filter(mine).cloned().collect();
            if !changes.is_empty() {
                self.ready.push_back(WatchEvents { revision: Revision(revised.revision), changes });
            }
            self.next = revised.revision + 1;
        }
        // Where others' changes were skipped, say how far this watch has come, once it has caught up.
        let seen = self.next - 1;
        let told = self.ready.back().map_or(0, |events| events.revision.0);
        if seen >= committed && told < seen {
            self.ready.push_back(WatchEvents { revision: Revision(seen), changes: Vec::new() });
        }
    }
}
