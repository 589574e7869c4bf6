//! Freezing: for a move to another store, nothing is changed any more, by users, leaders or nodes.
//!
//! # Guarantees
//! A transaction that carries [`Cluster::unfrozen`] is refused once the store is frozen, however late it arrives: what is
//! read at the revision of the freeze, or later, is all there will ever be. Signs of life and elections go on.

use hv_store::record::encode_message;
use hv_store::{Compare, Op, Txn, TxnOutcome};
use hv_types::Revision;

use crate::Cluster;
use crate::error::{Error, Result};

/// How often a freeze is tried when others write the cluster's record at the same time.
const ATTEMPTS: usize = 8;

impl Cluster {
    /// Whether changes are refused.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.cache.read(|state| state.cluster().is_some_and(|(record, _)| record.frozen))
    }

    /// The condition that a change carries so that it does not outrun a freeze.
    ///
    /// # Errors
    /// The store is frozen.
    pub(crate) fn unfrozen(&self) -> Result<Compare> {
        let key = self.keys.cluster();
        match self.cache.read(|state| state.cluster().map(|(record, revision)| (record.frozen, *revision))) {
            Some((true, _)) => Err(Error::precondition(
                "the store is frozen for a move to another server; ask that one, or unfreeze with \
                 `hypervisor-ctl store unfreeze`",
            )),
            Some((false, revision)) => Ok(Compare::ModRevision(key, revision)),
            // The cache is not filled yet; the record is there since the cluster was opened.
            None => Ok(Compare::Present(key)),
        }
    }

    /// Freezes or unfreezes the store; answers when it was last so decided.
    ///
    /// # Errors
    /// The store does not answer, or others write the same record all the time.
    pub async fn set_frozen(&self, frozen: bool) -> Result<Revision> {
        for _ in 0..ATTEMPTS {
            self.sync().await?;
            let known = self.cache.read(|state| state.cluster().cloned());
            let (mut record, revision) =
                known.ok_or_else(|| Error::internal("the cluster's record is not in the cache"))?;
            if record.frozen == frozen {
                return Ok(revision);
            }
            record.frozen = frozen;
            let key = self.keys.cluster();
            let txn = Txn {
                compares: vec![Compare::ModRevision(key.clone(), revision)],
                then: vec![Op::put(key, encode_message(&record))],
                ..Txn::default()
            };
            if let TxnOutcome::Committed(revision) = self.store.txn(txn).await? {
                self.cache.wait_for(revision).await?;
                return Ok(revision);
            }
        }
        Err(Error::conflict("the cluster's record"))
    }
}
