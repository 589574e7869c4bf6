//! Taking a backup over, into a store that is empty.

use std::time::SystemTime;

use bytes::Bytes;
use hv_proto::convert::to_timestamp;
use hv_proto::store::{BackupRecord, ClusterRecord, RestoreMarker};
use prost::Message;
use tokio::io::{AsyncRead, AsyncSeek, AsyncSeekExt};

use super::read::Reader;
use super::{BackupError, Summary, end_of, verify};
use crate::keys::Keys;
use crate::record::{decode_message, encode_message};
use crate::{
    Compare, KeyRange, MAX_TXN_OPS, Op, RangeRequest, SharedStore, StoreError, StoreExt, Txn, TxnOutcome,
};

/// Bytes of values in one transaction.
const TXN_BYTES: usize = 1 << 20;
/// What may be there beforehand, below the prefix: what a new server writes by itself.
const OF_A_NEW_SERVER: [&str; 6] =
    ["config/cluster", "events/", "leader/", "leases/", "requests/", "restore"];
/// How many keys are looked at at once for whether the store is empty.
const PAGE: usize = 1000;

/// Writes the records of a backup below the prefix of `keys`. The cluster's record says afterwards when that was.
///
/// The whole backup is read and verified before the first record is written.
///
/// # Errors
/// The backup is damaged or newer, the store is not empty, or does not answer; after the latter the same call goes on.
pub async fn restore(
    store: &SharedStore,
    keys: &Keys,
    mut source: impl AsyncRead + AsyncSeek + Unpin + Send,
) -> Result<Summary, BackupError> {
    source.rewind().await.map_err(BackupError::Read)?;
    let summary = verify(&mut source).await?;
    source.rewind().await.map_err(BackupError::Read)?;
    let marker = RestoreMarker {
        sha256: summary.sha256.clone().into(),
        began_at: Some(to_timestamp(SystemTime::now())),
    };
    begin(store, keys, &marker).await?;

    let mut reader = Reader::open(&mut source).await?;
    let mut batch = Vec::new();
    let mut bytes = 0;
    let mut cluster = None;
    while let Some(record) = reader.next().await? {
        let key = Bytes::from([&keys.all()[..], record.key.as_bytes()].concat());
        if key == keys.cluster() {
            cluster = Some(restored(&record)?);
            continue;
        }
        if batch.len() == MAX_TXN_OPS || bytes + record.value.len() > TXN_BYTES {
            write(store, std::mem::take(&mut batch)).await?;
            bytes = 0;
        }
        bytes += record.value.len();
        batch.push(Op::put(key, record.value));
    }
    // The cluster's record last, and the end of the marker with it: until then the store does not count as restored.
    write(store, batch).await?;
    let mut last = vec![Op::delete(keys.restore())];
    last.extend(cluster.map(|record| Op::put(keys.cluster(), encode_message(&record))));
    write(store, last).await?;
    Ok(summary)
}

/// The cluster's record as it is after a restore.
fn restored(record: &BackupRecord) -> Result<ClusterRecord, BackupError> {
    let mut cluster = ClusterRecord::decode(record.value.clone())
        .map_err(|cause| StoreError::Corrupt { key: record.key.clone(), source: Box::new(cause) })?;
    cluster.restored_at = Some(to_timestamp(SystemTime::now()));
    cluster.frozen = false;
    Ok(cluster)
}

async fn write(store: &SharedStore, then: Vec<Op>) -> Result<(), BackupError> {
    if !then.is_empty() {
        store.txn(Txn { then, ..Txn::default() }).await?;
    }
    Ok(())
}

/// Puts the marker down, or finds that of the same backup.
async fn begin(store: &SharedStore, keys: &Keys, marker: &RestoreMarker) -> Result<(), BackupError> {
    if let Some(kv) = store.get(keys.restore()).await? {
        let under_way: RestoreMarker = decode_message(&kv)?;
        return if under_way.sha256 == marker.sha256 { Ok(()) } else { Err(BackupError::OtherUnderWay) };
    }
    check_empty(store, keys).await?;
    let txn = Txn {
        compares: vec![
            Compare::Absent(keys.restore()),
            Compare::NoneIn(KeyRange::Prefix(keys.instances())),
            Compare::NoneIn(KeyRange::Prefix(keys.nodes())),
        ],
        then: vec![Op::put(keys.restore(), encode_message(marker))],
        otherwise_get: Vec::new(),
    };
    match store.txn(txn).await? {
        TxnOutcome::Committed(_) => Ok(()),
        TxnOutcome::Refused(_) => Err(BackupError::NotEmpty("something came in between".into())),
    }
}

async fn check_empty(store: &SharedStore, keys: &Keys) -> Result<(), BackupError> {
    let prefix = keys.all();
    let mut start = prefix.clone();
    loop {
        let request = RangeRequest {
            keys: KeyRange::Between(start.clone(), end_of(keys)),
            limit: PAGE,
            at: None,
            keys_only: true,
        };
        let page = store.range(request).await?;
        for kv in &page.kvs {
            let path = String::from_utf8_lossy(&kv.key[prefix.len()..]);
            if !OF_A_NEW_SERVER.iter().any(|known| path.starts_with(known)) {
                return Err(BackupError::NotEmpty(path.into_owned()));
            }
        }
        match page.kvs.last().filter(|_| page.more) {
            Some(last) => start = [&last.key[..], &[0]].concat().into(),
            None => return Ok(()),
        }
    }
}
