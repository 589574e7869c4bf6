//! Transactions.

use std::collections::BTreeSet;

use etcd_client::proto::PbTxnOpResponse;
use etcd_client::{
    Compare as EtcdCompare, CompareOp, DeleteOptions, LeaseTimeToLiveOptions, PutOptions, Txn as EtcdTxn,
    TxnOp,
};

use super::members::{Members, Repeat};
use super::range::is_empty;
use super::wire::{WireRange, from_etcd, kv_from_etcd, to_etcd};
use crate::{Compare, KeyRange, LeaseId, Op, Result, Revision, StoreError, Txn, TxnOutcome};

/// Carries out a transaction that is within the bounds.
pub(super) async fn txn(members: &Members, txn: Txn) -> Result<TxnOutcome> {
    if let ([], [Op::Delete(keys)]) = (&txn.compares[..], &txn.then[..])
        && !is_empty(keys)
    {
        return delete(members, keys).await;
    }
    let request = to_wire(&txn);
    let repeat = if txn.then.is_empty() { Repeat::Always } else { Repeat::IfNeverSent };
    let sent = members.call(repeat, |mut member| {
        let request = request.clone();
        async move { member.kv.txn(request).await }
    });
    let answer = match sent.await {
        Err(StoreError::LeaseNotFound(_)) => {
            return Err(StoreError::LeaseNotFound(ended_lease(members, &txn).await));
        }
        answer => answer?.0,
    };
    if answer.succeeded {
        let revision = answer.header.map_or(0, |header| from_etcd(header.revision));
        return Ok(TxnOutcome::Committed(Revision(revision)));
    }
    let found = answer.responses.into_iter().map(|response| match response.response {
        Some(PbTxnOpResponse::ResponseRange(range)) => range.kvs.into_iter().next().map(kv_from_etcd),
        _ => None,
    });
    Ok(TxnOutcome::Refused(found.collect()))
}

/// A delete alone goes as such: once its quota is used up, etcd 3.4 and 3.5.1 refuse every transaction, and deletes not.
async fn delete(members: &Members, keys: &KeyRange) -> Result<TxnOutcome> {
    let sent = members.call(Repeat::IfNeverSent, |mut member| {
        let WireRange { key, end } = WireRange::of(keys);
        let options = (!end.is_empty()).then(|| DeleteOptions::new().with_range(end));
        async move { member.kv.delete(key, options).await }
    });
    let answer = sent.await?;
    Ok(TxnOutcome::Committed(Revision(answer.header().map_or(0, |header| from_etcd(header.revision())))))
}

fn to_wire(txn: &Txn) -> EtcdTxn {
    let gets = txn.otherwise_get.iter().map(|key| TxnOp::get(&key[..], None));
    EtcdTxn::new()
        .when(txn.compares.iter().filter_map(compare).collect::<Vec<_>>())
        .and_then(txn.then.iter().filter_map(op).collect::<Vec<_>>())
        .or_else(gets.collect::<Vec<_>>())
}

/// Nothing for a compare with an empty range, which etcd cannot express and which always holds.
fn compare(compare: &Compare) -> Option<EtcdCompare> {
    use CompareOp::{Equal, Greater};
    Some(match compare {
        Compare::Absent(key) => EtcdCompare::create_revision(&key[..], Equal, 0),
        Compare::Present(key) => EtcdCompare::create_revision(&key[..], Greater, 0),
        Compare::ModRevision(key, revision) => EtcdCompare::mod_revision(&key[..], Equal, to_etcd(*revision)),
        Compare::CreateRevision(key, revision) => {
            EtcdCompare::create_revision(&key[..], Equal, to_etcd(*revision))
        }
        Compare::Version(key, version) => {
            EtcdCompare::version(&key[..], Equal, i64::try_from(*version).unwrap_or(i64::MAX))
        }
        Compare::Value(key, value) => EtcdCompare::value(&key[..], Equal, &value[..]),
        Compare::NoneIn(keys) if is_empty(keys) => return None,
        // etcd compares each key that the range holds; where there is none it compares one of revision 0.
        Compare::NoneIn(keys) => {
            let WireRange { key, end } = WireRange::of(keys);
            let compare = EtcdCompare::create_revision(key, Equal, 0);
            if end.is_empty() { compare } else { compare.with_range(end) }
        }
    })
}

/// Nothing for a delete of an empty range, which etcd cannot express.
fn op(op: &Op) -> Option<TxnOp> {
    match op {
        Op::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            Some(TxnOp::put(&key[..], &value[..], options))
        }
        Op::Delete(keys) if is_empty(keys) => None,
        Op::Delete(keys) => {
            let WireRange { key, end } = WireRange::of(keys);
            let options = (!end.is_empty()).then(|| DeleteOptions::new().with_range(end));
            Some(TxnOp::delete(key, options))
        }
    }
}

/// Which of the transaction's leases it is that has ended: etcd does not say.
async fn ended_lease(members: &Members, txn: &Txn) -> LeaseId {
    let leases: BTreeSet<LeaseId> = txn
        .then
        .iter()
        .filter_map(|op| match op {
            Op::Put { lease, .. } => *lease,
            Op::Delete(_) => None,
        })
        .collect();
    let first = leases.first().copied().unwrap_or(LeaseId(0));
    if leases.len() < 2 {
        return first;
    }
    for lease in &leases {
        let asked = members.call(Repeat::Always, |mut member| async move {
            member.lease.time_to_live(lease.0, Some(LeaseTimeToLiveOptions::new())).await
        });
        if matches!(asked.await, Ok(answer) if answer.ttl() < 0) {
            return *lease;
        }
    }
    first
}
