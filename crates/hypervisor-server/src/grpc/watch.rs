//! Watches: the state as it is, a bookmark, then each change; resumable from a revision.
//!
//! # Theory of operation
//! A watch subscribes first, at some revision, and lists then, in pieces: what is there is looked at for a moment at a time
//! and only as fast as the watcher takes it. What has changed meanwhile follows from the subscription, less what a piece
//! showed already. So each object is seen as it was at one revision, and then in every later state.
//!
//! # Invariants
//! A watcher that resumes after the revision of the last event it has got misses nothing. So the events of the initial
//! list have none (the bookmark that ends it has), and of several events of one revision only the last has that one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use hv_cluster::cache::{Batch, State, Subscription, SubscriptionError};
use hv_cluster::{Cluster, Error};
use hv_types::{InstanceId, Revision};
use tokio::time::Instant;
use tonic::Status;

use super::ReplyStream;
use super::request::failed;

/// How changes become a watch's events.
pub(crate) trait View: Send + Sync + 'static {
    /// An event as it is sent.
    type Event: Send + 'static;

    /// What there is, as events; without a revision unless the first is also the last.
    fn initial(&self, cluster: &Cluster, state: &State) -> Vec<Self::Event>;

    /// A piece of what there is, after the object `after`. Unless a view says otherwise all comes as one.
    fn piece(&self, cluster: &Cluster, _after: Option<&InstanceId>) -> Piece<Self::Event> {
        let (events, revision) =
            cluster.cache().read(|state| (self.initial(cluster, state), state.revision()));
        Piece { events, next: None, revision }
    }

    /// The object of an event, where a view lists in pieces.
    fn object<'a>(&self, _event: &'a Self::Event) -> Option<&'a str> {
        None
    }

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

/// A piece of what there is.
pub(crate) struct Piece<E> {
    /// What was found.
    pub(crate) events: Vec<E>,
    /// Where to go on; `None` if that was all.
    pub(crate) next: Option<InstanceId>,
    /// What has changed up to here it shows.
    pub(crate) revision: Revision,
}

/// Up to which object a piece went, and what it showed.
type Listed = (Option<InstanceId>, Revision);

struct Watch<V: View> {
    cluster: Arc<Cluster>,
    view: V,
    queue: VecDeque<V::Event>,
    changes: Subscription,
    /// What comes before is not asked for.
    from: Revision,
    /// What the watcher knows to have seen.
    told: Revision,
    /// What it has been sent all of.
    seen: Revision,
    /// While it is listed: where to go on.
    listing: Option<Option<InstanceId>>,
    /// What was listed; until what follows is later.
    listed: Vec<Listed>,
    /// When something was sent last.
    sent: Instant,
    over: bool,
}

/// After how many revisions without an event a bookmark is sent.
const BOOKMARK_EVERY: u64 = 1024;
/// After what time without an event a bookmark is sent.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(10);

impl<V: View> Watch<V> {
    fn take(&mut self, batch: &Batch) {
        if batch.revision < self.from {
            return;
        }
        let mut events = self.view.changes(&self.cluster, batch);
        if self.listed.iter().any(|(_, shown)| *shown >= batch.revision) {
            events.retain(|event| !shows(&self.listed, self.view.object(event), batch.revision));
        } else {
            self.listed.clear();
        }
        self.seen = batch.revision;
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

    fn list(&mut self, after: Option<&InstanceId>) {
        let piece = self.view.piece(&self.cluster, after);
        self.queue.extend(piece.events);
        self.listed.push((piece.next.clone(), piece.revision));
        self.listing = piece.next.map(Some);
        if self.listing.is_none() {
            self.queue.extend(self.view.bookmark(self.seen));
        }
    }
}

/// Whether what was listed shows the change of an object at `revision`.
fn shows(listed: &[Listed], object: Option<&str>, revision: Revision) -> bool {
    let holds = |(last, _): &&Listed| match (last, object) {
        (Some(last), Some(object)) => object <= last.as_str(),
        _ => true,
    };
    listed.iter().find(holds).is_some_and(|(_, shown)| *shown >= revision)
}

/// Starts a watch: from `from` on, or with what there is if `from` is 0.
pub(crate) async fn watch<V: View>(
    cluster: Arc<Cluster>,
    view: V,
    from: u64,
) -> Result<ReplyStream<V::Event>, Status> {
    cluster.sync().await.map_err(failed)?;
    let (seen, changes, listing) = if from == 0 {
        let (revision, changes) = cluster.cache().subscribe(State::revision);
        (revision, changes, Some(None))
    } else {
        let from = Revision(from);
        let changes = cluster.cache().subscribe_from(from).map_err(|error| failed(expired(error)))?;
        (Revision(from.0 - 1), changes, None)
    };
    let watch = Watch {
        cluster,
        view,
        queue: VecDeque::new(),
        changes,
        from: Revision(from),
        told: seen,
        seen,
        listing,
        listed: Vec::new(),
        sent: Instant::now(),
        over: false,
    };
    Ok(Box::pin(futures::stream::try_unfold(watch, next)))
}

async fn next<V: View>(mut watch: Watch<V>) -> Result<Option<(V::Event, Watch<V>)>, Status> {
    loop {
        if watch.over {
            return Ok(None);
        }
        if let Some(event) = watch.queue.pop_front() {
            watch.over = watch.view.is_last(&event);
            watch.sent = Instant::now();
            return Ok(Some((event, watch)));
        }
        if let Some(after) = watch.listing.take() {
            watch.list(after.as_ref());
            tokio::task::consume_budget().await;
            continue;
        }
        match tokio::time::timeout_at(watch.sent + BOOKMARK_INTERVAL, watch.changes.next()).await {
            Ok(Ok(Some(batch))) => watch.take(&batch),
            Ok(Ok(None)) => return Ok(None),
            Ok(Err(error)) => return Err(failed(expired(error))),
            Err(_) => {
                watch.sent = Instant::now();
                watch.told = watch.seen;
                watch.queue.extend(watch.view.bookmark(watch.seen));
            }
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
