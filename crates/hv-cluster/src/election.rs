//! Who leads: the owner of a leased key. What a leader writes carries the key's creation as a condition.
//!
//! # Guarantees
//! A transaction with [`Leadership::guard`] among its conditions is refused once another server leads, however late it
//! arrives. So it does no harm that a server may believe to lead for a while after it has ceased to.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use hv_proto::store::LeaderRecord;
use hv_store::record::{decode_message, encode_message};
use hv_store::{Change, Compare, KeyRange, LeaseId, Op, SharedStore, StoreError, StoreExt, Txn, TxnOutcome};
use hv_types::Revision;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// The pause before a failed election is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How long a server that resigns waits for the store.
const RESIGN_LIMIT: Duration = Duration::from_secs(2);
/// How often a lease is renewed in its time.
const RENEWALS: u32 = 3;
/// A leader steps down so much before its lease can have ended, as a part of its time: clocks may run at slightly
/// different speeds.
const STEP_DOWN_MARGIN: u32 = 20;

/// The proof of leading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leadership {
    key: bytes::Bytes,
    /// When it was won.
    pub since: Revision,
}

impl Leadership {
    /// The condition that makes a transaction void once somebody else leads.
    #[must_use]
    pub fn guard(&self) -> Compare {
        Compare::CreateRevision(self.key.clone(), self.since)
    }
}

/// Does `work` in each term of this server, until `stop`; a term that ends drops the work where it stands.
pub(crate) async fn in_each_term<F, Work>(
    mut leading: watch::Receiver<Option<Leadership>>,
    stop: CancellationToken,
    work: F,
) where
    F: Fn(Leadership) -> Work,
    Work: Future<Output = ()>,
{
    loop {
        let leadership = leading.borrow_and_update().clone();
        let term = async {
            match leadership {
                Some(leadership) => work(leadership).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // A server that ceased to lead does not go on for want of a turn.
            biased;
            () = stop.cancelled() => return,
            changed = leading.changed() => if changed.is_err() { return },
            () = term => {}
        }
    }
}

/// Takes part in an election.
pub struct Election {
    store: SharedStore,
    key: bytes::Bytes,
    server_id: String,
    ttl: Duration,
    leading: watch::Sender<Option<Leadership>>,
}

impl Election {
    /// Takes part in the election for `key` under the name `server_id`; a leader that is silent for `ttl` is replaced.
    #[must_use]
    pub fn new(store: SharedStore, key: bytes::Bytes, server_id: &str, ttl: Duration) -> Arc<Self> {
        let leading = watch::Sender::new(None);
        Arc::new(Self { store, key, server_id: server_id.to_owned(), ttl, leading })
    }

    /// Whether this server leads, as it changes.
    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Option<Leadership>> {
        self.leading.subscribe()
    }

    /// Campaigns until `stop`, then resigns.
    pub async fn run(&self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            if let Err(error) = self.term(&stop).await {
                warn!(error = hv_telemetry::error_chain(&error), "the election failed; it is tried again");
            }
            self.leading.send_replace(None);
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(RETRY_PAUSE) => {}
            }
        }
    }

    /// Waits to be elected, then leads until that ends.
    async fn term(&self, stop: &CancellationToken) -> Result<(), StoreError> {
        let granted = Instant::now();
        let lease = self.store.lease_grant(self.ttl).await?;
        let outcome = tokio::select! {
            () = stop.cancelled() => Ok(()),
            outcome = self.campaign_and_lead(lease, granted) => outcome,
        };
        self.leading.send_replace(None);
        // Without this the next leader would have to wait for the lease to run out. A store that does not answer must not
        // keep this server from the next term, nor from its end.
        let revoked = tokio::time::timeout(RESIGN_LIMIT, self.store.lease_revoke(lease)).await;
        if !matches!(revoked, Ok(Ok(()))) {
            debug!("the leader's lease was not revoked; it runs out");
        }
        outcome
    }

    async fn campaign_and_lead(&self, lease: LeaseId, granted: Instant) -> Result<(), StoreError> {
        let record =
            LeaderRecord { schema: hv_proto::convert::RECORD_SCHEMA, server_id: self.server_id.clone() };
        // The time before the last request that renewed the lease: to put a key does not.
        let mut renewed = granted;
        loop {
            let txn = Txn {
                compares: vec![Compare::Absent(self.key.clone())],
                then: vec![Op::put_leased(self.key.clone(), encode_message(&record), lease)],
                otherwise_get: vec![self.key.clone()],
            };
            match self.store.txn(txn).await? {
                TxnOutcome::Committed(since) => return self.lead(lease, since, renewed).await,
                TxnOutcome::Refused(holder) => {
                    let after = holder.into_iter().flatten().next().map(|kv| kv.mod_revision);
                    self.wait_for_vacancy(lease, after, &mut renewed).await?;
                }
            }
        }
    }

    /// Leads, and steps down before the lease can have ended: counted on the monotonic clock, from before the request that
    /// renewed it last, and whether or not the store answers.
    async fn lead(&self, lease: LeaseId, since: Revision, mut renewed: Instant) -> Result<(), StoreError> {
        let limit = self.ttl - self.ttl / STEP_DOWN_MARGIN;
        let mut attempt = Instant::now();
        if attempt >= renewed + limit {
            return Err(StoreError::LeaseNotFound(lease));
        }
        info!(server = self.server_id, "this server leads");
        self.leading.send_replace(Some(Leadership { key: self.key.clone(), since }));
        loop {
            let renewal = tokio::time::timeout_at(renewed + limit, self.store.lease_keep_alive(lease));
            let next = match renewal.await {
                Ok(Ok(())) => {
                    renewed = attempt;
                    attempt + self.ttl / RENEWALS
                }
                Ok(Err(error @ StoreError::LeaseNotFound(_))) => return Err(error),
                Ok(Err(error)) => {
                    warn!(error = hv_telemetry::error_chain(&error), "the leader's lease was not renewed");
                    Instant::now() + RETRY_PAUSE.min(self.ttl / (2 * RENEWALS))
                }
                Err(_) => {
                    warn!(server = self.server_id, "the leader's lease may end; this server steps down");
                    return Err(StoreError::LeaseNotFound(lease));
                }
            };
            tokio::time::sleep_until(next.min(renewed + limit)).await;
            attempt = Instant::now();
        }
    }

    async fn wait_for_vacancy(
        &self,
        lease: LeaseId,
        after: Option<Revision>,
        renewed: &mut Instant,
    ) -> Result<(), StoreError> {
        let from = after.map(|revision| Revision(revision.0 + 1));
        let mut watch = self.store.watch(KeyRange::Key(self.key.clone()), from).await?;
        let mut tick = tokio::time::interval(self.ttl / RENEWALS);
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    let attempt = Instant::now();
                    self.store.lease_keep_alive(lease).await?;
                    *renewed = attempt;
                }
                events = watch.next() => match events {
                    Some(events) => {
                        if events?.changes.iter().any(|change| matches!(change, Change::Deleted { .. })) {
                            return Ok(());
                        }
                    }
                    None => return Err(StoreError::Closed),
                },
            }
        }
    }

    /// The server that leads now, if any.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn leader(&self) -> Result<Option<String>, StoreError> {
        match self.store.get(self.key.clone()).await? {
            Some(kv) => Ok(Some(decode_message::<LeaderRecord>(&kv)?.server_id)),
            None => Ok(None),
        }
    }
}
