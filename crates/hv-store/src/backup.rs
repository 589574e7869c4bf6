//! Backups: all records at one revision as a file, and back into a store that is empty.
//!
//! # Guarantees
//! - A backup is what the store held at one revision. It ends with a digest over all of it: a file that was cut off or
//!   changed is refused before the first record is written.
//! - A restore writes into a store without records only. If it is interrupted, a marker keeps every later restore of
//!   another file out; the same file goes on where it stopped.
//!
//! # What is not in it
//! Keys that end with a lease: signs of life, leaderships, request keys. They belong to who is alive now.
//!
//! # Format
//! The line [`MAGIC`], then frames: four bytes of length, least significant first, and a `BackupFrame`
//! (`api/proto/hypervisor/store/v1/record.proto`): a header, records in key order, a trailer.

mod read;
mod restore;

use std::time::SystemTime;

use bytes::{BufMut, Bytes, BytesMut};
use futures::stream::{self, Stream, StreamExt};
use hv_proto::convert::{RECORD_SCHEMA, to_timestamp};
use hv_proto::store::backup_frame::Frame;
use hv_proto::store::{BackupFrame, BackupHeader, BackupRecord, BackupTrailer, ClusterRecord};
use prost::Message;
use sha2::{Digest, Sha256};

use crate::keys::Keys;
use crate::record::decode_message;
use crate::{KeyRange, MAX_VALUE_BYTES, RangeRequest, Revision, SharedStore, StoreError, StoreExt};

pub use read::verify;
pub use restore::restore;

/// How a backup begins.
pub const MAGIC: &[u8] = b"hypervisor-backup 1\n";
/// Largest frame, in bytes: a record with its key.
const MAX_FRAME_BYTES: usize = MAX_VALUE_BYTES + (16 << 10);
/// How many records are read at once.
const PAGE: usize = 500;

/// Why a backup cannot be made or taken over.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file cannot be read.
    #[error("the backup cannot be read")]
    Read(#[source] std::io::Error),
    /// It is something else.
    #[error("the file is not a backup of this system: {0}")]
    Foreign(String),
    /// It was cut off, or changed since it was made.
    #[error("the backup is damaged at byte {at}: {why}; take another copy of it")]
    Damaged {
        /// Where it was noticed.
        at: u64,
        /// What is wrong.
        why: String,
    },
    /// A newer release made it.
    #[error(
        "the backup has records of schema {found}, this release reads up to {RECORD_SCHEMA}: upgrade first"
    )]
    Newer {
        /// The schema found.
        found: u32,
    },
    /// There are records in the store.
    #[error("the store is not empty ({0} is there); restore into a new one")]
    NotEmpty(String),
    /// Another backup is half restored.
    #[error(
        "another backup is half restored in this store; go on with that file, or begin with an empty store"
    )]
    OtherUnderWay,
}

/// What a backup says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The cluster's identity; empty if it had none.
    pub cluster_id: String,
    /// The revision that it is of.
    pub revision: Revision,
    /// When it was made.
    pub created_at: SystemTime,
    /// How many records there are.
    pub records: u64,
    /// SHA-256 over everything before the trailer.
    pub sha256: Vec<u8>,
}

/// Where the making of a backup is.
struct Writer {
    store: SharedStore,
    keys: Keys,
    revision: Revision,
    next: Option<Bytes>,
    hash: Sha256,
    records: u64,
    is_done: bool,
}

/// A backup of everything below the prefix of `keys`, as pieces of at most a few MiB. It is of the store's present
/// revision; where that is compacted while the backup runs it ends with an error.
///
/// # Errors
/// The store does not answer.
pub async fn backup(
    store: SharedStore,
    keys: Keys,
) -> Result<impl Stream<Item = Result<Bytes, BackupError>> + Send + 'static, BackupError> {
    let revision = store.revision().await?;
    let cluster = store.get(keys.cluster()).await?;
    let cluster_id =
        cluster.map(|kv| decode_message::<ClusterRecord>(&kv)).transpose()?.map(|record| record.id);
    let header = BackupHeader {
        cluster_id: cluster_id.unwrap_or_default(),
        revision: revision.0,
        created_at: Some(to_timestamp(SystemTime::now())),
        schema: RECORD_SCHEMA,
    };
    let mut writer = Writer {
        next: Some(keys.all()),
        store,
        keys,
        revision,
        hash: Sha256::new(),
        records: 0,
        is_done: false,
    };
    let mut first = BytesMut::from(MAGIC);
    push(&mut first, Frame::Header(header));
    let first = first.freeze();
    writer.hash.update(&first);
    let rest = stream::try_unfold(writer, |mut writer| async move {
        Ok(writer.piece().await?.map(|piece| (piece, writer)))
    });
    Ok(stream::iter([Ok(first)]).chain(rest))
}

impl Writer {
    async fn piece(&mut self) -> Result<Option<Bytes>, BackupError> {
        let mut piece = BytesMut::new();
        let Some(start) = self.next.take() else {
            if std::mem::replace(&mut self.is_done, true) {
                return Ok(None);
            }
            let sha256 = self.hash.clone().finalize().to_vec();
            push(&mut piece, Frame::Trailer(BackupTrailer { records: self.records, sha256: sha256.into() }));
            return Ok(Some(piece.freeze()));
        };
        let request = RangeRequest {
            keys: KeyRange::Between(start, end_of(&self.keys)),
            limit: PAGE,
            at: Some(self.revision),
            keys_only: false,
        };
        let page = self.store.range(request).await?;
        if page.more {
            self.next = page.kvs.last().map(|kv| [&kv.key[..], &[0]].concat().into());
        }
        let marker = self.keys.restore();
        let prefix = self.keys.all();
        for kv in page.kvs.into_iter().filter(|kv| kv.lease.is_none() && kv.key != marker) {
            let key = String::from_utf8_lossy(&kv.key[prefix.len()..]).into_owned();
            push(&mut piece, Frame::Record(BackupRecord { key, value: kv.value }));
            self.records += 1;
        }
        self.hash.update(&piece);
        Ok(Some(piece.freeze()))
    }
}

/// The first key after all below the prefix, which ends with a slash.
fn end_of(keys: &Keys) -> Bytes {
    let mut end = keys.all().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end.into()
}

fn push(piece: &mut BytesMut, frame: Frame) {
    let frame = BackupFrame { frame: Some(frame) };
    let length = u32::try_from(frame.encoded_len()).unwrap_or(u32::MAX);
    piece.put_u32_le(length);
    // A vector grows: encoding into it cannot fail.
    piece.extend_from_slice(&frame.encode_to_vec());
}
