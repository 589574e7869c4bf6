//! The store: one ordered key space with revisions, transactions, watches and leases.
//!
//! # Guarantees
//! - Every transaction is atomic and durable before it is acknowledged; each that changes something gets a
//!   [`Revision`] of its own, higher than all before it.
//! - A range or a transaction sees everything that was acknowledged before it began (linearizable).
//! - A watch delivers every change in its range exactly once, in the order of revisions, all changes of one revision
//!   in one [`WatchEvents`]; across reconnects it resumes by itself. Where it cannot (the revision is compacted) it
//!   ends with [`StoreError::Compacted`].
//! - When a lease ends, by expiry or revocation, its keys are deleted in one revision.
//!
//! # Assumptions
//! Keys and values are bytes; values are at most [`MAX_VALUE_BYTES`], transactions at most [`MAX_TXN_OPS`].
//!
//! # Caveats
//! A transaction that failed with [`StoreError::Unavailable`] or [`StoreError::Timeout`] may have been applied: callers
//! make their transactions repeatable by comparing what they read.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
pub use hv_types::Revision;

pub mod backup;
pub mod bounds;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod dump;
pub mod embedded;
pub mod error;
pub mod etcd;
pub mod keys;
pub mod record;
pub mod status;
pub mod upkeep;

pub use error::StoreError;
pub use status::{DefragmentStep, MemberStatus, OnDefragment, StoreStatus};

/// What a store operation returns.
pub type Result<T> = std::result::Result<T, StoreError>;

/// A store that is shared by the parts of a program.
pub type SharedStore = Arc<dyn Store>;

/// Largest value, in bytes: etcd's default request limit is 1.5 MiB, less room for keys and compares.
pub const MAX_VALUE_BYTES: usize = 1 << 20;
/// Most operations and compares in one transaction: etcd's default `--max-txn-ops`.
pub const MAX_TXN_OPS: usize = 128;
/// Most keys that one range returns; callers page.
pub const MAX_RANGE_LIMIT: usize = 10_000;

/// A lease's identity. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub i64);

/// A key with its value and history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: Bytes,
    /// The value.
    pub value: Bytes,
    /// When the key came into being.
    pub create_revision: Revision,
    /// When it last changed.
    pub mod_revision: Revision,
    /// How often it was put since it came into being, from 1.
    pub version: u64,
    /// The lease that it ends with.
    pub lease: Option<LeaseId>,
}

/// Which keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyRange {
    /// This key.
    Key(Bytes),
    /// All keys that start with this; all keys if empty.
    Prefix(Bytes),
    /// From the first (included) to the second (excluded).
    Between(Bytes, Bytes),
}

/// What to read.
#[derive(Clone, Debug)]
pub struct RangeRequest {
    /// Which keys.
    pub keys: KeyRange,
    /// At most so many, in key order; at most [`MAX_RANGE_LIMIT`].
    pub limit: usize,
    /// As they were at this revision; now if `None`.
    pub at: Option<Revision>,
    /// Leave the values out.
    pub keys_only: bool,
}

/// What was read.
#[derive(Clone, Debug)]
pub struct RangeResult {
    /// In key order.
    pub kvs: Vec<KeyValue>,
    /// Whether the limit left some out.
    pub more: bool,
    /// The store's revision when it was read.
    pub revision: Revision,
}

/// A condition of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent(Bytes),
    /// The key exists.
    Present(Bytes),
    /// The key last changed at exactly this revision.
    ModRevision(Bytes, Revision),
    /// The key came into being at exactly this revision.
    CreateRevision(Bytes, Revision),
    /// The key was put exactly so often.
    Version(Bytes, u64),
    /// The key has exactly this value.
    Value(Bytes, Bytes),
    /// No key exists in this range; holds of an empty range. Where keys exist etcd reads all of them to tell, so it is
    /// meant for ranges that hold few.
    NoneIn(KeyRange),
}

/// A change in a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Write a key.
    Put {
        /// The key.
        key: Bytes,
        /// Its value.
        value: Bytes,
        /// The lease to end with; the transaction fails with [`StoreError::LeaseNotFound`] if it is gone.
        lease: Option<LeaseId>,
    },
    /// Delete keys; none there is no error.
    Delete(KeyRange),
}

impl Op {
    /// A put without a lease.
    pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// A put that ends with a lease.
    pub fn put_leased(key: impl Into<Bytes>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: Some(lease) }
    }

    /// A delete of one key.
    pub fn delete(key: impl Into<Bytes>) -> Self {
        Self::Delete(KeyRange::Key(key.into()))
    }
}

/// All conditions, then all changes; or nothing but reads. A key may be changed only once in a transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// All must hold.
    pub compares: Vec<Compare>,
    /// Done if they hold.
    pub then: Vec<Op>,
    /// Read, in the same instant, if they do not: what the caller needs to tell why.
    pub otherwise_get: Vec<Bytes>,
}

/// How a transaction went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    /// The conditions held and the changes are durable, at this revision.
    Committed(Revision),
    /// A condition did not hold and nothing was changed. The values of `otherwise_get`, in its order.
    Refused(Vec<Option<KeyValue>>),
}

/// What happened to a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was written.
    Put(KeyValue),
    /// It was deleted.
    Deleted {
        /// Which key.
        key: Bytes,
        /// When.
        revision: Revision,
    },
}

/// What a watch delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvents {
    /// Everything up to and including this revision has now been delivered.
    pub revision: Revision,
    /// The changes, in order; empty where only the revision moved on.
    pub changes: Vec<Change>,
}

/// A stream of changes. It ends only with an error, or when the store is closed.
pub type WatchStream = BoxStream<'static, Result<WatchEvents>>;

/// How the store is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// `embedded` or `etcd`.
    pub backend: &'static str,
    /// The backend's version.
    pub version: String,
    /// Size on disk, in bytes.
    pub size_bytes: u64,
    /// The store's revision.
    pub revision: Revision,
    /// What an operator should know; empty if all is well.
    pub warnings: Vec<String>,
}

/// The contract. Both backends pass the suite in `conformance`.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Reads keys.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if the revision asked for is no longer kept, [`StoreError::InvalidRequest`] beyond a bound.
    async fn range(&self, request: RangeRequest) -> Result<RangeResult>;

    /// Compares and changes.
    ///
    /// # Errors
    /// [`StoreError::InvalidRequest`] beyond a bound or if a key is changed twice, [`StoreError::LeaseNotFound`],
    /// [`StoreError::Full`] where the store has no room.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome>;

    /// Follows changes of `keys` from revision `from` on (included); `None` is "from now on".
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if `from` is no longer kept; it may also come as the stream's last item.
    async fn watch(&self, keys: KeyRange, from: Option<Revision>) -> Result<WatchStream>;

    /// The store's revision, as a linearizable read.
    async fn revision(&self) -> Result<Revision>;

    /// A new lease. Its keys are deleted when it was not kept alive for `ttl` (at least 1 s, whole seconds count).
    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId>;

    /// Renews a lease for its full time.
    ///
    /// # Errors
    /// [`StoreError::LeaseNotFound`] if it has ended.
    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<()>;

    /// Ends a lease and deletes its keys. One that has ended already is no error.
    async fn lease_revoke(&self, lease: LeaseId) -> Result<()>;

    /// Forgets what was superseded before `revision`.
    async fn compact(&self, revision: Revision) -> Result<()>;

    /// How the store is doing; answers within a few seconds also when it is not well.
    async fn health(&self) -> Result<Health>;

    /// How the store is, in detail; takes longer than [`Self::health`].
    async fn status(&self) -> Result<StoreStatus> {
        Ok(self.health().await?.into())
    }

    /// Gives room that nothing uses any more back to the file system: one member after the other, the leader last, each
    /// once the one before it is well again. A member answers nobody meanwhile. Afterwards a store that had refused writes
    /// for lack of room accepts them again if it is well below its limit.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] if a member does not answer or does not come back; those before it are done.
    async fn defragment(&self, on_step: OnDefragment<'_>) -> Result<()> {
        on_step(DefragmentStep { message: "nothing to give back".to_owned(), done: 0, total: 0 });
        Ok(())
    }
}

/// What is often needed, on top of the contract.
#[async_trait]
pub trait StoreExt: Store {
    /// One key, now.
    async fn get(&self, key: impl Into<Bytes> + Send) -> Result<Option<KeyValue>> {
        let request = RangeRequest { keys: KeyRange::Key(key.into()), limit: 1, at: None, keys_only: false };
        Ok(self.range(request).await?.kvs.into_iter().next())
    }

    /// Writes one key, whatever it was.
    async fn put(&self, key: impl Into<Bytes> + Send, value: impl Into<Bytes> + Send) -> Result<Revision> {
        let txn = Txn { then: vec![Op::put(key, value)], ..Txn::default() };
        match self.txn(txn).await? {
            TxnOutcome::Committed(revision) => Ok(revision),
            TxnOutcome::Refused(_) => unreachable!("a transaction without conditions cannot be refused"),
        }
    }
}

impl<S: Store + ?Sized> StoreExt for S {}
