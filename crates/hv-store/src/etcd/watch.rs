//! Watches that survive the loss of their stream.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::proto::{PbEvent, PbWatchResponse};
use etcd_client::{Error, WatchOptions, WatchStream as EtcdStream};
use futures::{StreamExt, stream};
use tokio::time::timeout;

use super::error::store_error;
use super::members::Members;
use super::wire::{WireRange, from_etcd, kv_from_etcd, to_etcd};
use crate::bounds::Interval;
use crate::{Change, KeyRange, Result, Revision, StoreError, WatchEvents, WatchStream};

/// How long to wait before the first attempt to open the stream again, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// etcd's number for a deletion.
const EVENT_DELETE: i32 = 1;

/// Follows `keys` from revision `from` on.
pub(super) async fn watch(
    members: Arc<Members>,
    keys: &KeyRange,
    scope: Option<&Interval>,
    from: Revision,
) -> Result<WatchStream> {
    let interval = Interval::of(keys);
    let wire = match scope.filter(|scope| scope.covers(&interval)) {
        Some(scope) => WireRange::of_interval(scope),
        None => WireRange::of(keys),
    };
    let mut follower =
        Follower { members, wire, assembly: Assembly::new(interval, from.0), open: None, over: false };
    // The first stream is opened here, so that a caller learns at once if etcd is not there.
    let opened = timeout(follower.members.request_timeout, follower.open()).await;
    opened.unwrap_or_else(|_| Err(follower.members.timeout()))?;
    let items = stream::unfold(follower, |mut follower| async move {
        let item = follower.next_item().await?;
        Some((item, follower))
    });
    Ok(items.boxed())
}

/// The oldest revision that is kept, given one that is not: etcd says it only to watches.
pub(super) async fn oldest(members: &Members, compacted: Revision) -> Revision {
    let asked = async {
        let mut member = members.member(members.preferred()).await?;
        let options = WatchOptions::new().with_start_revision(to_etcd(compacted).max(1));
        let mut stream = member.watch.watch(&b"\0"[..], Some(options)).await?;
        while let Some(message) = stream.message().await? {
            if message.compact_revision() > 0 {
                return Ok(message.compact_revision());
            }
        }
        Ok::<_, Error>(0)
    };
    let known = match timeout(members.request_timeout, asked).await {
        Ok(Ok(oldest)) => from_etcd(oldest),
        Ok(Err(_)) | Err(_) => 0,
    };
    Revision(known.max(compacted.0 + 1))
}

struct Follower {
    members: Arc<Members>,
    wire: WireRange,
    assembly: Assembly,
    open: Option<(EtcdStream, usize)>,
    over: bool,
}

impl Follower {
    async fn next_item(&mut self) -> Option<Result<WatchEvents>> {
        let mut pause = FIRST_PAUSE;
        loop {
            if let Some(events) = self.assembly.ready.pop_front() {
                return Some(Ok(events));
            }
            if self.over {
                return None;
            }
            let problem = match &mut self.open {
                Some((stream, _)) => match stream.message().await {
                    Ok(Some(message)) => {
                        pause = FIRST_PAUSE;
                        self.take(message.0).err()
                    }
                    Ok(None) => Some(Error::WatchError("etcd ended the stream".to_owned())),
                    Err(error) => Some(error),
                }
                .map(|error| store_error(error, &self.members.endpoints())),
                None => match timeout(self.members.request_timeout, self.open()).await {
                    Ok(opened) => opened.err(),
                    Err(_) => Some(self.members.timeout()),
                },
            };
            let Some(problem) = problem else { continue };
            if !problem.retryable() {
                self.over = true;
                return Some(Err(self.explain(problem).await));
            }
            tracing::debug!(%problem, next = self.assembly.next, "a watch lost its stream and opens it again");
            self.lose();
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn open(&mut self) -> Result<()> {
        let index = self.members.preferred();
        let opened = async {
            let mut member = self.members.member(index).await?;
            let mut options = WatchOptions::new()
                .with_start_revision(i64::try_from(self.assembly.next).unwrap_or(i64::MAX))
                .with_progress_notify()
                .with_fragment();
            if !self.wire.end.is_empty() {
                options = options.with_range(self.wire.end.clone());
            }
            member.watch.watch(self.wire.key.clone(), Some(options)).await
        };
        match opened.await {
            Ok(stream) => {
                self.open = Some((stream, index));
                Ok(())
            }
            Err(error) => {
                self.members.failed(index);
                Err(store_error(error, &self.members.endpoints()))
            }
        }
    }

    fn lose(&mut self) {
        if let Some((_, index)) = self.open.take() {
            self.members.failed(index);
        }
        self.assembly.forget_partial();
    }

    fn take(&mut self, message: PbWatchResponse) -> std::result::Result<(), Error> {
        if message.compact_revision > 0 {
            let text = "the revision has been compacted";
            return Err(Error::GRpcStatus(tonic::Status::out_of_range(text)));
        }
        if message.canceled {
            return Err(Error::WatchError(format!("etcd cancelled the watch: {}", message.cancel_reason)));
        }
        if !message.created {
            self.assembly.take(message);
        }
        Ok(())
    }

    async fn explain(&self, problem: StoreError) -> StoreError {
        match problem {
            StoreError::Compacted { .. } => {
                let requested = Revision(self.assembly.next);
                StoreError::Compacted { requested, oldest: oldest(&self.members, requested).await }
            }
            problem => problem,
        }
    }
}

/// Puts the changes of each revision together, and drops what is not asked for.
struct Assembly {
    interval: Interval,
    /// The first revision that was not yet seen whole: where a new stream starts.
    next: u64,
    /// The last revision that the reader was told.
    told: u64,
    /// The changes of a revision that may go on in the next message, and which one that is.
    partial: Vec<Change>,
    partial_revision: u64,
    ready: VecDeque<WatchEvents>,
}

impl Assembly {
    fn new(interval: Interval, next: u64) -> Self {
        let told = next.saturating_sub(1);
        Self { interval, next, told, partial: Vec::new(), partial_revision: 0, ready: VecDeque::new() }
    }

    /// A new stream sends the revision from its start again.
    fn forget_partial(&mut self) {
        self.partial.clear();
        self.partial_revision = 0;
    }

    fn take(&mut self, message: PbWatchResponse) {
        let progress = message.events.is_empty() && !message.fragment;
        for event in message.events {
            let Some((revision, change)) = change_of(event) else { continue };
            if revision < self.next {
                continue;
            }
            if revision != self.partial_revision {
                self.finish_partial();
                self.partial_revision = revision;
            }
            let key = match &change {
                Change::Put(kv) => &kv.key,
                Change::Deleted { key, .. } => key,
            };
            if self.interval.contains(key) {
                self.partial.push(change);
            }
        }
        if !message.fragment {
            self.finish_partial();
        }
        let header_revision = message.header.map_or(0, |header| from_etcd(header.revision));
        if progress && header_revision >= self.next {
            self.next = header_revision + 1;
        }
        let seen = self.next - 1;
        if self.partial_revision == 0 && self.told < seen {
            self.told = seen;
            self.ready.push_back(WatchEvents { revision: Revision(seen), changes: Vec::new() });
        }
    }

    /// The revision is whole: etcd has gone on to the next, or said that nothing follows.
    fn finish_partial(&mut self) {
        if self.partial_revision == 0 {
            return;
        }
        let revision = std::mem::take(&mut self.partial_revision);
        self.next = revision + 1;
        if !self.partial.is_empty() {
            self.told = revision;
            let changes = std::mem::take(&mut self.partial);
            self.ready.push_back(WatchEvents { revision: Revision(revision), changes });
        }
    }
}

fn change_of(event: PbEvent) -> Option<(u64, Change)> {
    let deleted = event.r#type == EVENT_DELETE;
    let kv = kv_from_etcd(event.kv?);
    let revision = kv.mod_revision;
    Some((revision.0, if deleted { Change::Deleted { key: kv.key, revision } } else { Change::Put(kv) }))
}

#[cfg(test)]
mod tests {
    use etcd_client::proto::{PbKeyValue, PbResponseHeader};

    use super::*;

    fn put(key: &str, revision: i64) -> PbEvent {
        let kv = PbKeyValue { key: key.into(), mod_revision: revision, ..PbKeyValue::default() };
        PbEvent { kv: Some(kv), ..PbEvent::default() }
    }

    fn message(events: Vec<PbEvent>, fragment: bool, revision: i64) -> PbWatchResponse {
        let header = Some(PbResponseHeader { revision, ..PbResponseHeader::default() });
        PbWatchResponse { header, events, fragment, ..PbWatchResponse::default() }
    }

    fn assembly(prefix: &'static str, next: u64) -> Assembly {
        Assembly::new(Interval::of(&KeyRange::Prefix(prefix.into())), next)
    }

    fn ready(assembly: &mut Assembly) -> Vec<(u64, usize)> {
        assembly.ready.drain(..).map(|events| (events.revision.0, events.changes.len())).collect()
    }

    #[test]
    fn a_split_revision_is_put_together() {
        let mut assembly = assembly("", 5);
        assembly.take(message(vec![put("a", 5), put("a", 6)], true, 7));
        assert_eq!(ready(&mut assembly), [(5, 1)]);
        assembly.take(message(vec![put("b", 6)], true, 7));
        assert_eq!(ready(&mut assembly), []);
        assembly.take(message(vec![put("c", 6), put("a", 7)], false, 7));
        assert_eq!(ready(&mut assembly), [(6, 3), (7, 1)]);
    }

    #[test]
    fn what_was_half_seen_is_forgotten_when_the_stream_breaks() {
        let mut assembly = assembly("", 5);
        assembly.take(message(vec![put("a", 5), put("b", 6)], true, 6));
        assembly.forget_partial();
        assert_eq!(assembly.next, 6);
        assembly.take(message(vec![put("b", 6), put("c", 6)], false, 6));
        assert_eq!(ready(&mut assembly), [(5, 1), (6, 2)]);
    }

    #[test]
    fn what_was_delivered_is_not_delivered_again() {
        let mut assembly = assembly("", 5);
        assembly.take(message(vec![put("a", 5), put("a", 6)], false, 6));
        assembly.take(message(vec![put("a", 6), put("a", 7)], false, 7));
        assert_eq!(ready(&mut assembly), [(5, 1), (6, 1), (7, 1)]);
    }

    #[test]
    fn changes_elsewhere_only_move_the_revision() {
        let mut assembly = assembly("mine/", 5);
        assembly.take(message(vec![put("mine/a", 5), put("other", 6), put("other", 7)], false, 7));
        assert_eq!(ready(&mut assembly), [(5, 1), (7, 0)]);
        assembly.take(message(vec![], false, 9));
        assert_eq!(ready(&mut assembly), [(9, 0)]);
        assembly.take(message(vec![], false, 9));
        assert_eq!(ready(&mut assembly), []);
    }
}
