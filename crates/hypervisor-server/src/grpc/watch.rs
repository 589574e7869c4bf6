//! Watches: the state as it is, a bookmark, then each change; resumable from a revision.
//!
//! # Invariants
//! A watcher that resumes after the revision of the last event it has got misses nothing. So the events of the initial
//! list have none (the bookmark that ends it has), and of several events of one revision only the last has that one.

use std::collections::VecDeque;
use std::sync::Arc;

use hv_cluster::cache::{Batch, State, Subscription, SubscriptionError};
use hv_cluster::{Cluster, Error};
use hv_types::Revision;
use tonic::Status;

use super::ReplyStream;
use super::request::failed;

/// How changes become a watch's events.
pub(crate) trait View: Send + Sync + 'static {
    /// An event as it is sent.
    type Event: Send + 'static;

    /// What there is, as events; without a revision unless the first is also the last.
    fn initial(&self, cluster: &Cluster, state: &State) -> Vec<Self::Event>;

    /// What a batch of changes means.
    fn changes(&self, cluster: &Cluster, batch: &Batch) -> Vec<Self::Event>;

    /// Says that everything up to `revision` has been sent with this event.
    fn set_revision(&self, event: &mut Self::Event, revision: Revision);

    /// The event that says that everything up to `revision` was sent; `None` where the stream has no such event.
    fn bookmark(&self, revision: Revision) -> Option<Self::Event>;

    /// Whether the watch is over with this event.
    fn is_last(&self, _event: &Self::Event) -> bool {
        false
    }
}

struct Watch<V: View> {
    cluster: Arc<Cluster>,
    view: V,
    queue: VecDeque<V::Event>,
    changes: Subscription,
    /// What comes before is not asked for.
    from: Revision,
    /// What the watcher knows to have seen.
    told: Revision,
    over: bool,
}

/// After how many revisions without an event a bookmark is sent.
const BOOKMARK_EVERY: u64 = 1024;

impl<V: View> Watch<V> {
    fn take(&mut self, batch: &Batch) {
        if batch.revision < self.from {
            return;
        }
        let mut events = self.view.changes(&self.cluster, batch);
        if let Some((_, all_but_last)) = events.split_last_mut() {
            for event in all_but_last {
                self.view.set_revision(event, Revision(batch.revision.0 - 1));
            }
            self.told = batch.revision;
        } else if batch.revision.0 >= self.told.0 + BOOKMARK_EVERY {
            // A watcher whose objects rest must not fall behind what is kept.
            events.extend(self.view.bookmark(batch.revision));
            self.told = batch.revision;
        }
        self.queue.extend(events);
    }
}

/// Starts a watch: from `from` on, or with what there is if `from` is 0.
pub(crate) async fn watch<V: View>(
    cluster: Arc<Cluster>,
    view: V,
    from: u64,
) -> Result<ReplyStream<V::Event>, Status> {
    cluster.sync().await.map_err(failed)?;
    let (queue, changes) = if from == 0 {
        cluster.cache().subscribe(|state| {
            let mut queue: VecDeque<_> = view.initial(&cluster, state).into();
            queue.extend(view.bookmark(state.revision()));
            queue
        })
    } else {
        let changes =
            cluster.cache().subscribe_from(Revision(from)).map_err(|error| failed(expired(error)))?;
        (VecDeque::new(), changes)
    };
    let told = cluster.cache().revision();
    let watch = Watch { cluster, view, queue, changes, from: Revision(from), told, over: false };
    Ok(Box::pin(futures::stream::try_unfold(watch, next)))
}

async fn next<V: View>(mut watch: Watch<V>) -> Result<Option<(V::Event, Watch<V>)>, Status> {
    loop {
        if watch.over {
            return Ok(None);
        }
        if let Some(event) = watch.queue.pop_front() {
            watch.over = watch.view.is_last(&event);
            return Ok(Some((event, watch)));
        }
        match watch.changes.next().await {
            Ok(Some(batch)) => watch.take(&batch),
            Ok(None) => return Ok(None),
            Err(error) => return Err(failed(expired(error))),
        }
    }
}

fn expired(error: SubscriptionError) -> Error {
    Error::expired(match error {
        SubscriptionError::Expired => {
            "the revision to watch from is no longer kept; list again and watch from there"
        }
        SubscriptionError::Lagged => "the watcher was too slow; list again and watch from there",
    })
}
