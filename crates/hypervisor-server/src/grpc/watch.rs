//! Watches: the state as it is, a bookmark, then each change; resumable from a revision.

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

    /// What there is, as events.
    fn initial(&self, cluster: &Cluster, state: &State) -> Vec<Self::Event>;

    /// What a batch of changes means.
    fn changes(&self, cluster: &Cluster, batch: &Batch) -> Vec<Self::Event>;

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
    over: bool,
}

/// Starts a watch: from `from` on, or with what there is if `from` is 0.
pub(crate) async fn watch<V: View>(cluster: Arc<Cluster>, view: V, from: u64) -> Result<ReplyStream<V::Event>, Status> {
    cluster.sync().await.map_err(failed)?;
    let (queue, changes) = if from == 0 {
        cluster.cache().subscribe(|state| {
            let mut queue: VecDeque<_> = view.initial(&cluster, state).into();
            queue.extend(view.bookmark(state.revision()));
            queue
        })
    } else {
        let changes = cluster.cache().subscribe_from(Revision(from)).map_err(|error| failed(expired(error)))?;
        (VecDeque::new(), changes)
    };
    let watch = Watch { cluster, view, queue, changes, over: false };
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
            Ok(Some(batch)) => watch.queue.extend(watch.view.changes(&watch.cluster, &batch)),
            Ok(None) => return Ok(None),
            Err(error) => return Err(failed(expired(error))),
        }
    }
}

fn expired(error: SubscriptionError) -> Error {
    Error::expired(match error {
        SubscriptionError::Expired => "the revision to watch from is no longer kept; list again and watch from there",
        SubscriptionError::Lagged => "the watcher was too slow; list again and watch from there",
    })
}
