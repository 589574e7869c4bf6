//! Mutations that have one effect and one answer however often they are sent.
//!
//! # Theory of operation
//! A mutation reads what it needs from the cache, computes a change with its conditions, and commits. The record of
//! its request key is part of the same transaction, so there is no instant at which one is there without the other.
//! If the key is there already, the recorded answer is returned. If another condition failed, somebody was faster:
//! the mutation is computed afresh, a bounded number of times.

use hv_proto::store::RequestRecord;
use hv_store::record::{decode_message, encode_message};
use hv_store::{Compare, KeyValue, LeaseId, Op, StoreError, StoreExt, Txn, TxnOutcome};
use hv_types::{RequestKey, Revision};
use prost::Message;

use crate::Cluster;
use crate::error::{Error, Result};

/// How often a mutation is computed afresh before the caller is told of the conflict.
const ATTEMPTS: usize = 16;

/// Who asks for a mutation, and how to recognise a repetition.
#[derive(Clone, Debug)]
pub struct Mutation {
    /// The full name of the method.
    pub method: &'static str,
    /// The caller's key, if it gave one.
    pub key: Option<RequestKey>,
    /// SHA-256 of the request without its key.
    pub digest: Vec<u8>,
}

impl Mutation {
    /// A mutation that nobody repeats.
    #[must_use]
    pub fn once(method: &'static str) -> Self {
        Self { method, key: None, digest: Vec::new() }
    }
}

/// A change with its conditions, and what to answer once it is made. The answer to a change is recorded before its
/// revision is known: revision 0 in it stands for that of the change ([`Done::revision`]).
pub(crate) struct Plan<M> {
    pub(crate) compares: Vec<Compare>,
    pub(crate) then: Vec<Op>,
    pub(crate) reply: M,
}

impl<M> Plan<M> {
    /// Nothing to change: the answer as things are.
    pub(crate) fn unchanged(reply: M) -> Self {
        Self { compares: Vec::new(), then: Vec::new(), reply }
    }
}

/// The answer to a mutation.
#[derive(Clone, Debug)]
pub struct Done<M> {
    /// What was answered, now or the first time.
    pub reply: M,
    /// When the change was made; the same for every repetition.
    pub revision: Revision,
    /// Whether this call changed something.
    pub fresh: bool,
}

impl Cluster {
    /// Commits what `plan` computes, once per request key.
    ///
    /// `plan` is called again if what it read has changed in between; it reads from the cache.
    pub(crate) async fn mutate<M, F>(&self, mutation: &Mutation, what: &str, mut plan: F) -> Result<Done<M>>
    where
        M: Message + Default + Clone,
        F: FnMut() -> Result<Plan<M>>,
    {
        if let Some(done) = self.recorded(mutation).await? {
            return Ok(done);
        }
        self.sync().await?;
        for _ in 0..ATTEMPTS {
            let planned = match plan() {
                Ok(planned) => planned,
                // What stands in the way may be what this very request has done since it was looked up above.
                Err(error) => return self.recorded(mutation).await?.ok_or(error),
            };
            let changes = !planned.then.is_empty();
            let txn = self.transaction(mutation, &planned).await?;
            if txn.then.is_empty() {
                return Ok(Done { reply: planned.reply, revision: self.cache.revision(), fresh: false });
            }
            let outcome = match self.store.txn(txn).await {
                Err(StoreError::LeaseNotFound(lease)) => {
                    self.request_leases.forget(lease).await;
                    continue;
                }
                outcome => outcome?,
            };
            match outcome {
                TxnOutcome::Committed(revision) => {
                    return Ok(Done { reply: planned.reply, revision, fresh: changes });
                }
                TxnOutcome::Refused(found) => {
                    if let Some(kv) = found.into_iter().flatten().next() {
                        return repeat(mutation, &kv);
                    }
                }
            }
            // Somebody was faster: look again, at least at what they did.
            self.sync().await?;
        }
        Err(Error::conflict(what))
    }

    /// The answer that was recorded for the request key, if it has one.
    pub(crate) async fn recorded<M: Message + Default>(
        &self,
        mutation: &Mutation,
    ) -> Result<Option<Done<M>>> {
        let Some(key) = &mutation.key else { return Ok(None) };
        let kv = self.store.get(self.keys.request(key)).await?;
        kv.map(|kv| repeat(mutation, &kv)).transpose()
    }

    async fn transaction<M: Message>(&self, mutation: &Mutation, plan: &Plan<M>) -> Result<Txn> {
        let mut txn =
            Txn { compares: plan.compares.clone(), then: plan.then.clone(), otherwise_get: Vec::new() };
        if !txn.then.is_empty() || mutation.key.is_some() {
            txn.compares.push(self.unfrozen()?);
        }
        if mutation.key.is_some() {
            let lease = self.request_leases.current(&self.store, self.config.request_ttl).await?;
            self.record_request(&mut txn, mutation, &plan.reply, lease);
        }
        Ok(txn)
    }

    /// Adds the record of the mutation's key, if it has one, to a transaction.
    pub(crate) fn record_request(
        &self,
        txn: &mut Txn,
        mutation: &Mutation,
        reply: &impl Message,
        lease: LeaseId,
    ) {
        let Some(key) = &mutation.key else { return };
        let record = RequestRecord {
            schema: hv_proto::convert::RECORD_SCHEMA,
            method: mutation.method.into(),
            digest: mutation.digest.clone().into(),
            reply: reply.encode_to_vec().into(),
        };
        let store_key = self.keys.request(key);
        txn.compares.push(Compare::Absent(store_key.clone()));
        txn.otherwise_get.push(store_key.clone());
        txn.then.push(Op::put_leased(store_key, encode_message(&record), lease));
    }
}

/// The refusal of a key that stands for another request.
pub(crate) fn key_was_used() -> Error {
    Error::precondition(
        "this request key was used for another request in the last 24 hours; use a new key for a new request",
    )
}

/// The answer that `kv`, the record of the mutation's key, holds.
pub(crate) fn repeat<M: Message + Default>(mutation: &Mutation, kv: &KeyValue) -> Result<Done<M>> {
    let record: RequestRecord = decode_message(kv)?;
    if record.method != mutation.method || record.digest != mutation.digest {
        return Err(key_was_used());
    }
    let reply = M::decode(record.reply).map_err(|cause| {
        hv_types::ServiceError::internal("the recorded answer cannot be read").caused_by(cause)
    })?;
    Ok(Done { reply, revision: kv.mod_revision, fresh: false })
}
