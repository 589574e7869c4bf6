//! What happened: recorded beside the hot path, those of a moment in one record, and kept up to a number and an age.
//!
//! # Caveats
//! Events are for people. They are written a moment after what they tell of, and are dropped (and counted) when they come
//! faster than the store takes them; nothing decides by them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use hv_store::keys::Keys;
use hv_store::record::encode_events;
use hv_store::{KeyRange, Op, SharedStore, Txn};
use hv_types::{Event, InstanceRecord, NodeRecord, Revision};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::cache::Cache;

/// How many events may wait to be written.
const QUEUE_BOUND: usize = 4096;
/// How many are written in one transaction.
const BATCH: usize = 64;
/// How long events are collected before they are written.
const LINGER: Duration = Duration::from_millis(50);
/// Old events are removed once there are so many more than are kept.
const TRIM_SLACK: usize = 256;
/// How often at most it is told that events were dropped.
const TELL_OF_DROPS_EVERY: Duration = Duration::from_secs(60);
/// Events are removed once they are so much older than they may become.
const AGE_SLACK: Duration = Duration::from_secs(60);

/// Records events.
pub struct EventLog {
    store: SharedStore,
    keys: Keys,
    limit: usize,
    max_age: Duration,
    queue: mpsc::Sender<Event>,
    pending: Mutex<Option<mpsc::Receiver<Event>>>,
    /// How many were dropped that nobody was told of.
    dropped: AtomicU64,
}

/// What an event is about.
#[derive(Clone, Copy)]
pub enum About<'a> {
    /// An instance.
    Instance(&'a InstanceRecord),
    /// A node.
    Node(&'a NodeRecord),
}

impl EventLog {
    pub(crate) fn new(store: SharedStore, keys: Keys, limit: usize, max_age: Duration) -> Self {
        let (queue, pending) = mpsc::channel(QUEUE_BOUND);
        Self {
            store,
            keys,
            limit,
            max_age,
            queue,
            pending: Mutex::new(Some(pending)),
            dropped: AtomicU64::new(0),
        }
    }

    /// Records that `reason` happened to an object; `message` is for people.
    pub fn record(&self, about: About<'_>, reason: &str, message: impl Into<String>, source: &str) {
        self.push(about, reason, message.into(), source, false);
    }

    /// Records something that somebody should look at.
    pub fn warn(&self, about: About<'_>, reason: &str, message: impl Into<String>, source: &str) {
        self.push(about, reason, message.into(), source, true);
    }

    fn push(&self, about: About<'_>, reason: &str, message: String, source: &str, warning: bool) {
        let (object_kind, object_id, object_name) = match about {
            About::Instance(record) => ("instance", record.id.to_string(), record.name.clone()),
            About::Node(record) => ("node", record.id.to_string(), record.hostname.clone()),
        };
        info!(object_kind, object_id, object_name, reason, source, warning, "{message}");
        let event = Event {
            id: uuid::Uuid::now_v7().to_string(),
            at: SystemTime::now(),
            object_kind: object_kind.into(),
            object_id,
            object_name,
            reason: reason.into(),
            message,
            warning,
            source: source.into(),
            request_id: hv_telemetry::RequestId::current()
                .map(|id| id.as_str().to_owned())
                .unwrap_or_default(),
            actor: String::new(),
            revision: Revision::default(),
        };
        if self.queue.try_send(event).is_err() {
            self.drop_events(1);
        }
    }

    fn drop_events(&self, count: u64) {
        metrics::counter!("hypervisor_events_dropped_total").increment(count);
        self.dropped.fetch_add(count, Ordering::Relaxed);
    }

    /// An event that tells how many are missing.
    fn gap(&self) -> Option<Event> {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        (dropped > 0).then(|| Event {
            id: uuid::Uuid::now_v7().to_string(),
            at: SystemTime::now(),
            object_kind: "cluster".into(),
            object_id: String::new(),
            object_name: String::new(),
            reason: "EventsDropped".into(),
            message: format!(
                "{dropped} events were not recorded: more happened than the store takes, or it did not answer; they \
                 are in the server's log"
            ),
            warning: true,
            source: "server".into(),
            request_id: String::new(),
            actor: String::new(),
            revision: Revision::default(),
        })
    }

    /// Writes events until `stop`, then what is left.
    pub async fn run(&self, cache: &Cache, stop: CancellationToken) {
        let Some(mut pending) = self.pending.lock().take() else { return };
        let mut told: Option<Instant> = None;
        loop {
            let mut batch = Vec::with_capacity(BATCH);
            tokio::select! {
                biased;
                taken = pending.recv_many(&mut batch, BATCH) => if taken == 0 { return },
                () = stop.cancelled() => {
                    while let Ok(event) = pending.try_recv() {
                        batch.push(event);
                    }
                    for rest in batch.chunks(BATCH) {
                        self.write(rest).await;
                    }
                    return;
                }
            }
            if told.is_none_or(|told| told.elapsed() >= TELL_OF_DROPS_EVERY)
                && let Some(gap) = self.gap()
            {
                batch.push(gap);
                told = Some(Instant::now());
            }
            self.write(&batch).await;
            self.trim(cache).await;
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(LINGER) => {}
            }
        }
    }

    async fn write(&self, batch: &[Event]) {
        let (Some(first), Some(value)) = (batch.first(), encode_events(batch)) else { return };
        let then = vec![Op::put(self.keys.event(&first.id), value)];
        if let Err(error) = self.store.txn(Txn { then, ..Txn::default() }).await {
            self.drop_events(batch.len() as u64);
            warn!(error = hv_telemetry::error_chain(&error), count = batch.len(), "events were not recorded");
        }
    }

    /// Removes records that hold nothing but events which are too many or too old.
    async fn trim(&self, cache: &Cache) {
        let oldest = SystemTime::now().checked_sub(self.max_age).unwrap_or(SystemTime::UNIX_EPOCH);
        let first_kept = cache.read(|state| {
            let too_many = state.event_count() > self.limit + TRIM_SLACK;
            let too_old = state.oldest_event().is_some_and(|event| event.at + AGE_SLACK < oldest);
            if !too_many && !too_old {
                return None;
            }
            let kept = state.events_before(None).take(self.limit).take_while(|event| event.at >= oldest);
            let last = kept.last().or_else(|| state.events_before(None).next())?;
            state.event_record_of(&last.id).map(str::to_owned)
        });
        let Some(first_kept) = first_kept else { return };
        let old = KeyRange::Between(self.keys.events(), self.keys.event(&first_kept));
        if let Err(error) = self.store.txn(Txn { then: vec![Op::Delete(old)], ..Txn::default() }).await {
            warn!(
                error = hv_telemetry::error_chain(&error),
                "old events were not removed; it is tried again"
            );
        }
    }
}
