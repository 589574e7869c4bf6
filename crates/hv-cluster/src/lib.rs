//! The control plane's decisions over the store. gRPC handlers only translate to and from what is here.
//!
//! # Theory of operation
//! [`Cluster`] is one server's view: a [`Cache`] that follows the whole key space, and operations that change it by
//! compare-and-set transactions. Parts that must act only once in a cluster (placement, reconciliation) run on every
//! server, act only on the one that leads, and add the leader key to the conditions of each of their transactions, so
//! that a deposed leader writes nothing.
//!
//! # Failure and recovery
//! Nothing that matters lives only in memory. A server that dies in the middle of anything leaves either no trace or a
//! record whose owner (the leader, or the node it is bound to) carries on from what the record says.

pub mod assignments;
pub mod cache;
pub mod config;
pub mod election;
mod error;
pub mod events;
pub mod failover;
mod freeze;
pub mod instances;
mod leases;
pub mod nodes;
pub mod operations;
pub mod page;
pub mod placer;
pub mod reconcile;
pub mod reports;
mod requests;
mod upkeep;

use std::sync::Arc;
use std::time::SystemTime;

use hv_proto::store::ClusterRecord;
use hv_store::keys::Keys;
use hv_store::record::{decode_message, encode_message};
use hv_store::{Compare, Op, SharedStore, StoreExt, Txn, TxnOutcome};
use hv_types::{ClusterId, Revision};

pub use cache::Cache;
pub use config::ClusterConfig;
pub use election::{Election, Leadership};
pub use error::{Error, Result};
pub use events::EventLog;
pub use requests::{Done, Mutation};

/// Bytes of values that go into one transaction, where there are several: well below what the store takes.
pub(crate) const TXN_BYTES: usize = 1 << 20;

/// The bytes of the value that an operation writes.
pub(crate) fn op_bytes(op: &Op) -> usize {
    match op {
        Op::Put { value, .. } => value.len(),
        Op::Delete(_) => 0,
    }
}

/// One server's handle on the cluster.
pub struct Cluster {
    pub(crate) store: SharedStore,
    pub(crate) keys: Keys,
    pub(crate) cache: Arc<Cache>,
    pub(crate) events: EventLog,
    pub(crate) config: ClusterConfig,
    pub(crate) liveness: nodes::Liveness,
    pub(crate) gates: nodes::Gates,
    pub(crate) reporters: reports::Reporters,
    pub(crate) request_leases: leases::RollingLease,
    pub(crate) creates: placer::Queue,
    pub(crate) admission: instances::Admission,
    pub(crate) outlook: instances::Outlook,
    pub(crate) agents: operations::Agents,
    pub(crate) reservations: placer::Reservations,
    id: ClusterId,
}

impl Cluster {
    /// Opens the cluster in `store`, making its identity if the store is new. The cache is filled by [`Cache::run`].
    ///
    /// # Errors
    /// The store does not answer, or holds what cannot be read.
    pub async fn open(store: SharedStore, config: ClusterConfig) -> Result<Arc<Self>> {
        let keys = Keys::new(&config.key_prefix);
        let id = cluster_id(&store, &keys).await?;
        let cache = Cache::new(store.clone(), keys.clone());
        let events = EventLog::new(store.clone(), keys.clone(), config.event_limit, config.event_max_age);
        Ok(Arc::new(Self {
            store,
            keys,
            cache,
            events,
            config,
            liveness: nodes::Liveness::default(),
            gates: nodes::Gates::default(),
            reporters: reports::Reporters::default(),
            request_leases: leases::RollingLease::default(),
            creates: placer::Queue::default(),
            admission: instances::Admission::default(),
            outlook: instances::Outlook::default(),
            agents: operations::Agents::default(),
            reservations: placer::Reservations::default(),
            id,
        }))
    }

    /// The cluster's identity. It changes only where its records are restored from a backup.
    #[must_use]
    pub fn id(&self) -> ClusterId {
        self.cache.read(|state| state.cluster_id().cloned()).unwrap_or_else(|| self.id.clone())
    }

    /// The cache that reads are served from.
    #[must_use]
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Where events are recorded.
    #[must_use]
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    /// The store itself, for health.
    #[must_use]
    pub fn store(&self) -> &SharedStore {
        &self.store
    }

    /// The key layout.
    #[must_use]
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &ClusterConfig {
        &self.config
    }

    /// Waits until the cache shows everything that was acknowledged before this call.
    ///
    /// # Errors
    /// The store does not answer, or the cache does not catch up in time.
    pub async fn sync(&self) -> Result<Revision> {
        let revision = self.store.revision().await?;
        self.cache.wait_for(revision).await?;
        Ok(revision)
    }
}

async fn cluster_id(store: &SharedStore, keys: &Keys) -> Result<ClusterId> {
    let fresh = ClusterRecord {
        schema: hv_proto::convert::RECORD_SCHEMA,
        id: ClusterId::generate().to_string(),
        created_at: Some(hv_proto::convert::to_timestamp(SystemTime::now())),
        restored_at: None,
        frozen: false,
    };
    let txn = Txn {
        compares: vec![Compare::Absent(keys.cluster())],
        then: vec![Op::put(keys.cluster(), encode_message(&fresh))],
        otherwise_get: Vec::new(),
    };
    let record = match store.txn(txn).await? {
        TxnOutcome::Committed(_) => fresh,
        TxnOutcome::Refused(_) => match store.get(keys.cluster()).await? {
            Some(kv) => decode_message(&kv)?,
            None => return Err(Error::internal("the cluster's record vanished while it was read")),
        },
    };
    record.id.parse().map_err(Error::from)
}
