//! The etcd backend: etcd 3.4 and later, one member or several.
//!
//! # Theory of operation
//! Each member has its own connections (`members`). Calls go to one member until it fails; then the next one is
//! preferred. Reads are repeated there within the request's time. A transaction is repeated only if it certainly was
//! not sent, as it may have been applied otherwise: see the caveat of the contract.
//!
//! A watch (`watch`) remembers the last revision that it delivered whole. When its stream breaks it starts the next
//! one from the revision after that, on whichever member answers, so nothing is lost or repeated. etcd may split a large
//! revision; its parts are put together again.
//!
//! Those who ask for the revision at the same time share one read that began after they asked (`shared_reads`).
//!
//! All renewals of leases share a few streams (`keep_alive`).
//!
//! # Progress of watches
//! A watch is told of a revision that changed nothing in its range when etcd notifies it, which by etcd's default is every
//! ten minutes. (etcd answers requests for progress too, but before 3.4.25 and 3.5.8 such an answer may overtake changes,
//! so it is not used.) With [`EtcdOptions::scope`], watches inside the scope are opened on all of it and filtered here, so
//! that they learn at once of every revision made in the scope.
//!
//! # Failure and recovery
//! - *No member answers*: calls fail with [`StoreError::Unavailable`] or [`StoreError::Timeout`] within
//!   [`EtcdOptions::request_timeout`]; watches go on trying. Everything resumes by itself.
//! - *A member hangs or is cut off from the others*: a call takes at most the request's time, the next ones go elsewhere;
//!   watches move on within [`PING_INTERVAL`] and [`PING_TIMEOUT`].
//! - *etcd is filling up*: etcd refuses everything that grows once it has reached its quota, and has to be told when that is
//!   over. Before that, from [`REFUSE_PERCENT`] of the quota on, transactions with puts are refused here with
//!   [`StoreError::Full`]; deleting, leases, compaction and reading go on. Compaction and [`Store::defragment`] make room;
//!   below [`ACCEPT_PERCENT`] writes are accepted again and the alarm, where etcd has raised it, is cleared.
//! - *etcd 3.5.0 to 3.5.2 crashes*: it may have lost acknowledged writes (etcd's issue 13766). Health warns of these versions.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{CompactionOptions, LeaseGrantOptions};

use crate::bounds::{Interval, check_range, check_txn, check_watch, lease_seconds};
use crate::{
    Health, KeyRange, LeaseId, OnDefragment, RangeRequest, RangeResult, Result, Revision, Store, StoreError,
    StoreStatus, Txn, TxnOutcome, WatchStream,
};

mod error;
mod health;
mod keep_alive;
mod members;
mod quota;
mod range;
mod shared_reads;
mod status;
mod txn;
mod watch;
mod wire;

use keep_alive::KeepAlive;
use members::{Members, Repeat};
use quota::Quota;
pub use quota::{ACCEPT_PERCENT, DEFAULT_QUOTA_BYTES, REFUSE_PERCENT};
use shared_reads::SharedReads;

/// How often an idle connection that has calls open is checked. etcd takes more than one in 5 s for an attack.
pub const PING_INTERVAL: Duration = Duration::from_secs(6);
/// How long the answer to such a check may take.
pub const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// How to reach etcd.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// The members' client addresses: `http://host:port`, `https://host:port` or `host:port`. At least one.
    pub endpoints: Vec<String>,
    /// Certificates; needed for `https`.
    pub tls: Option<EtcdTls>,
    /// Name and password, if etcd's authentication is enabled.
    pub user: Option<(String, String)>,
    /// How long connecting to a member may take.
    pub dial_timeout: Duration,
    /// How long a call may take, over all members that are tried.
    pub request_timeout: Duration,
    /// How many connections to open to each member that is used; at least one.
    pub channels: usize,
    /// The prefix below which everything is that this program and its peers write: see "Progress of watches".
    pub scope: Option<Bytes>,
    /// The members' `--quota-backend-bytes`. `None`: what they report (etcd 3.6 and later do), or else etcd's default.
    pub quota_bytes: Option<u64>,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self {
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            tls: None,
            user: None,
            dial_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(5),
            channels: 4,
            scope: None,
            quota_bytes: None,
        }
    }
}

/// Certificates in PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdTls {
    /// Who signed the members' certificates.
    pub ca: PathBuf,
    /// This client's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A store in an etcd cluster.
pub struct EtcdStore {
    members: Arc<Members>,
    keep_alive: KeepAlive,
    scope: Option<Interval>,
    quota: Arc<Quota>,
    reads: SharedReads,
}

impl EtcdStore {
    /// Connects, and checks that a member answers. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] with the endpoints if none answers (calling again may succeed),
    /// [`StoreError::InvalidRequest`] if an option makes no sense or etcd refuses the user, [`StoreError::Io`] if a
    /// certificate cannot be read.
    pub async fn connect(options: EtcdOptions) -> Result<Arc<Self>> {
        let scope = options.scope.clone().map(|scope| Interval::of(&KeyRange::Prefix(scope)));
        let quota = Arc::new(Quota::new(options.quota_bytes));
        let members = Arc::new(Members::new(options)?);
        let keep_alive = KeepAlive::start(Arc::clone(&members));
        let read_by = Arc::clone(&members);
        let reads = SharedReads::start(move || {
            let members = Arc::clone(&read_by);
            async move { range::revision(&members).await }
        });
        let store = Arc::new(Self { keep_alive, members, scope, quota, reads });
        store.revision().await?;
        quota::observe(&store.members, &store.quota).await;
        quota::follow(&store.members, &store.quota);
        tracing::info!(endpoints = %store.members.endpoints(), "connected to etcd");
        Ok(store)
    }

    /// Whether the member that is asked leads the cluster. With several endpoints that is any one of them.
    pub async fn is_leader(&self) -> bool {
        health::is_leader(&self.members).await
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn range(&self, request: RangeRequest) -> Result<RangeResult> {
        check_range(&request)?;
        range::range(&self.members, request).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        check_txn(&txn)?;
        self.quota.admit(&txn, &self.members)?;
        txn::txn(&self.members, txn).await
    }

    async fn watch(&self, keys: KeyRange, from: Option<Revision>) -> Result<WatchStream> {
        check_watch(&keys)?;
        let from = match from {
            // A member may lag behind; this makes "now" the same for all of them, also across reconnects.
            None | Some(Revision(0)) => Revision(self.revision().await?.0 + 1),
            Some(from) => from,
        };
        watch::watch(Arc::clone(&self.members), &keys, self.scope.as_ref(), from).await
    }

    async fn revision(&self) -> Result<Revision> {
        self.reads.revision().await
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        let seconds = i64::try_from(lease_seconds(ttl)?).expect("the time of a lease is bounded");
        // A repeated grant leaves at worst a lease that nobody renews, and that ends by itself.
        let granted = self
            .members
            .call(Repeat::Always, move |mut member| async move {
                member.lease.grant(seconds, Some(LeaseGrantOptions::new())).await
            })
            .await?;
        Ok(LeaseId(granted.id()))
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.keep_alive.renew(lease).await
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<()> {
        let revoked = self
            .members
            .call(Repeat::Always, move |mut member| async move { member.lease.revoke(lease.0).await })
            .await;
        match revoked {
            Ok(_) | Err(StoreError::LeaseNotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn compact(&self, revision: Revision) -> Result<()> {
        let at = wire::to_etcd(revision);
        let compacted = self
            .members
            .call(Repeat::Always, move |mut member| async move {
                member.kv.compact(at, Some(CompactionOptions::new())).await
            })
            .await;
        match compacted {
            // Somebody was here before.
            Ok(_) | Err(StoreError::Compacted { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn health(&self) -> Result<Health> {
        let mut health = health::health(&self.members).await?;
        health.warnings.extend(self.quota.warning());
        Ok(health)
    }

    async fn status(&self) -> Result<StoreStatus> {
        status::status(&self.members, &self.quota).await
    }

    async fn defragment(&self, on_step: OnDefragment<'_>) -> Result<()> {
        status::defragment(&self.members, &self.quota, on_step).await
    }
}
