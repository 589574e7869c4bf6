//! Reads every record from the store.
//!
//! # Theory of operation
//! All ranges are read at the revision of the first. While one page is on its way the page before is read into records on
//! the blocking pool, and the one before that is taken into the new state: nobody waits, and readers see the old state
//! until the new one is whole. Leases come first, so that no instance is taken for lost on the way. Names and request
//! records, which are as many as instances, are not read; only the names of sets are sought out.

use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use hv_store::{KeyRange, KeyValue, RangeRequest, SharedStore, StoreError};
use hv_types::Revision;
use tokio::time::Instant;
use tracing::info;

use super::change::Decoded;
use super::state::State;
use super::{Cache, decode};

/// How many keys are read at once.
const FILL_PAGE: usize = 5000;
/// So few records are read in place: less work than handing them over, and a simulated server depends on no thread.
const IN_PLACE: usize = 200;
/// How many pages are read into records at once.
const DECODERS: usize = 2;
/// How often the log tells how far it is.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

impl Cache {
    /// Reads everything and publishes the differences to what was known.
    pub(super) async fn fill(&self) -> Result<Revision, StoreError> {
        let began = Instant::now();
        let keys = &self.keys;
        let first = KeyRange::Prefix(keys.cluster());
        let revision = page(&self.store, first, None, 1).await?.1;
        let mut ranges = vec![keys.node_leases(), keys.nodes(), keys.cluster(), keys.operations()];
        ranges.push(keys.node_holds());
        ranges.extend(self.sets(revision).await?);
        ranges.extend([keys.events(), keys.instances()]);

        let pages =
            futures::stream::iter(ranges).flat_map(|prefix| pages(self.store.clone(), prefix, revision));
        let mut decoded = std::pin::pin!(
            pages
                .map_ok(|page| {
                    let keys = keys.clone();
                    let records = page.len();
                    let read = move || page.iter().map(|kv| decode(&keys, kv)).collect::<Vec<_>>();
                    async move { blocking(records, read).await }
                })
                .try_buffered(DECODERS)
        );
        let mut state = State::default();
        let (mut count, mut told) = (0usize, Instant::now());
        while let Some(records) = decoded.try_next().await? {
            count += records.len();
            state = blocking(records.len(), move || take_in(state, records)).await?;
            if told.elapsed() >= PROGRESS_EVERY {
                told = Instant::now();
                info!(records = count, seconds = began.elapsed().as_secs(), "the cache is being filled");
            }
        }
        let milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        if began.elapsed() >= PROGRESS_EVERY {
            info!(records = count, milliseconds, "every record was read");
        }
        self.replace(state, revision);
        Ok(revision)
    }

    /// The prefixes below which the names of sets lie, one for each project.
    async fn sets(&self, revision: Revision) -> Result<Vec<Bytes>, StoreError> {
        let (mut start, end) = (self.keys.names(), prefix_end(&self.keys.names()));
        let mut found = Vec::new();
        loop {
            let range = KeyRange::Between(start, end.clone());
            let (kvs, _, _) = page(&self.store, range, Some(revision), 1).await?;
            let Some(project) = kvs.first().and_then(|kv| self.keys.project_of_name(&kv.key)) else {
                return Ok(found);
            };
            found.push(self.keys.instance_set(project, ""));
            start = prefix_end(&self.keys.names_of(project));
        }
    }
}

/// The pages of a prefix, as it was at `revision`.
fn pages(
    store: SharedStore,
    prefix: Bytes,
    revision: Revision,
) -> impl Stream<Item = Result<Vec<KeyValue>, StoreError>> {
    let end = prefix_end(&prefix);
    futures::stream::try_unfold(Some(prefix), move |start| {
        let (end, store) = (end.clone(), store.clone());
        async move {
            let Some(start) = start else { return Ok(None) };
            let range = KeyRange::Between(start, end);
            let (kvs, _, more) = page(&store, range, Some(revision), FILL_PAGE).await?;
            let next = kvs.last().filter(|_| more).map(|kv| Bytes::from([&kv.key[..], &[0]].concat()));
            Ok(Some((kvs, next)))
        }
    })
}

async fn page(
    store: &SharedStore,
    keys: KeyRange,
    at: Option<Revision>,
    limit: usize,
) -> Result<(Vec<KeyValue>, Revision, bool), StoreError> {
    let page = store.range(RangeRequest { keys, limit, at, keys_only: false }).await?;
    Ok((page.kvs, page.revision, page.more))
}

fn take_in(mut state: State, records: Vec<Decoded>) -> State {
    for record in records {
        state.put(record);
    }
    state
}

/// Runs what takes long for many records beside the tasks.
async fn blocking<T: Send + 'static>(
    records: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StoreError> {
    if records <= IN_PLACE {
        return Ok(work());
    }
    // It fails only where the work panicked, or the runtime is going away.
    tokio::task::spawn_blocking(work).await.map_err(|_| StoreError::Closed)
}

/// The first key after all that start with `prefix`.
fn prefix_end(prefix: &Bytes) -> Bytes {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end.into()
}
