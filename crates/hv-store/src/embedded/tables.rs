//! What is on disk: the tables, and how their values are laid out (integers are little-endian).

use bytes::Bytes;
use redb::{ReadTransaction, ReadableTable, Table, TableDefinition, WriteTransaction};

use crate::{KeyValue, LeaseId, Revision};

/// Which layout a file has. Another one is refused.
pub(super) const LAYOUT: u64 = 1;

type Bytestring = &'static [u8];

/// key -> version: every key as it is now.
pub(super) const CURRENT: TableDefinition<'static, Bytestring, Bytestring> = TableDefinition::new("current");
/// (key, revision of the put) -> revision that superseded it, version.
pub(super) const PAST: TableDefinition<'static, (Bytestring, u64), Bytestring> = TableDefinition::new("past");
/// revision -> its changes: see [`LogEntry`].
pub(super) const LOG: TableDefinition<'static, u64, Bytestring> = TableDefinition::new("log");
/// lease -> seconds granted.
pub(super) const LEASES: TableDefinition<'static, i64, u64> = TableDefinition::new("leases");
/// (lease, key): what ends with which lease.
pub(super) const LEASE_KEYS: TableDefinition<'static, (i64, Bytestring), ()> =
    TableDefinition::new("lease_keys");
/// Two rows: see [`Meta`].
pub(super) const META: TableDefinition<'static, u8, Bytestring> = TableDefinition::new("meta");

/// The rows of [`META`]. The second holds the counts; it may be missing, or of an earlier revision than the first, where
/// a release wrote the file that did not count: then opening counts anew.
const META_ROW: u8 = 0;
const COUNTS_ROW: u8 = 1;
/// create revision, mod revision, version, lease.
const HEADER_BYTES: usize = 32;
/// What marks a change in a log entry.
const MARK_PUT: u8 = 1;
const MARK_DELETE: u8 = 2;

/// A row does not have the layout it must have: the file was damaged, or written by something else.
#[derive(Debug, thiserror::Error)]
#[error("a row of table {table} is damaged")]
pub(super) struct Damaged {
    pub(super) table: &'static str,
}

/// Where the store stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    /// The last revision.
    pub(super) revision: u64,
    /// The oldest revision that can be read or watched.
    pub(super) oldest: u64,
    /// The last lease that was granted.
    pub(super) last_lease: i64,
    /// How many bytes the superseded versions and the log take, without what the tree adds to them.
    pub(super) history_bytes: u64,
    /// The same of the keys as they are now.
    pub(super) live_bytes: u64,
}

impl Meta {
    /// An empty store is at revision 1, as etcd's is, so that 0 never names a state.
    pub(super) const EMPTY: Self =
        Self { revision: 1, oldest: 1, last_lease: 0, history_bytes: 0, live_bytes: 0 };

    fn encode(self) -> [u8; 32] {
        let mut row = [0; 32];
        row[..8].copy_from_slice(&LAYOUT.to_le_bytes());
        row[8..16].copy_from_slice(&self.revision.to_le_bytes());
        row[16..24].copy_from_slice(&self.oldest.to_le_bytes());
        row[24..].copy_from_slice(&self.last_lease.to_le_bytes());
        row
    }

    fn decode(row: &[u8]) -> Result<Self, Damaged> {
        let damaged = Damaged { table: "meta" };
        if row.len() != 32 || take_u64(row, 0) != LAYOUT {
            return Err(damaged);
        }
        Ok(Self {
            revision: take_u64(row, 8),
            oldest: take_u64(row, 16),
            last_lease: take_u64(row, 24).cast_signed(),
            history_bytes: 0,
            live_bytes: 0,
        })
    }

    fn encode_counts(self) -> [u8; 24] {
        let mut row = [0; 24];
        row[..8].copy_from_slice(&self.revision.to_le_bytes());
        row[8..16].copy_from_slice(&self.history_bytes.to_le_bytes());
        row[16..].copy_from_slice(&self.live_bytes.to_le_bytes());
        row
    }

    /// Whether `row` holds the counts at this revision, which are taken over then.
    fn take_counts(&mut self, row: &[u8]) -> bool {
        let matches = row.len() == 24 && take_u64(row, 0) == self.revision;
        if matches {
            self.history_bytes = take_u64(row, 8);
            self.live_bytes = take_u64(row, 16);
        }
        matches
    }

    /// Both rows of a table, and whether the counts are there.
    fn read(table: &impl ReadableTable<u8, Bytestring>) -> TablesResult<Option<(Self, bool)>> {
        let Some(row) = table.get(META_ROW)? else { return Ok(None) };
        let mut meta = Self::decode(row.value())?;
        let counted = table.get(COUNTS_ROW)?.is_some_and(|row| meta.take_counts(row.value()));
        Ok(Some((meta, counted)))
    }
}

/// Why a read or a write of tables failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum TablesError {
    #[error(transparent)]
    Database(#[from] redb::Error),
    #[error(transparent)]
    Damaged(#[from] Damaged),
}

macro_rules! through_redb_error {
    ($($error:ty),*) => {$(
        impl From<$error> for TablesError {
            fn from(error: $error) -> Self {
                Self::Database(error.into())
            }
        }
    )*};
}
through_redb_error!(
    redb::StorageError,
    redb::TableError,
    redb::TransactionError,
    redb::CommitError,
    redb::DatabaseError
);

pub(super) type TablesResult<T> = Result<T, TablesError>;

/// The tables, open for writing.
pub(super) struct Tables<'txn> {
    pub(super) current: Table<'txn, Bytestring, Bytestring>,
    pub(super) past: Table<'txn, (Bytestring, u64), Bytestring>,
    pub(super) log: Table<'txn, u64, Bytestring>,
    pub(super) leases: Table<'txn, i64, u64>,
    pub(super) lease_keys: Table<'txn, (i64, Bytestring), ()>,
    meta: Table<'txn, u8, Bytestring>,
}

impl<'txn> Tables<'txn> {
    pub(super) fn open(txn: &'txn WriteTransaction) -> TablesResult<Self> {
        Ok(Self {
            current: txn.open_table(CURRENT)?,
            past: txn.open_table(PAST)?,
            log: txn.open_table(LOG)?,
            leases: txn.open_table(LEASES)?,
            lease_keys: txn.open_table(LEASE_KEYS)?,
            meta: txn.open_table(META)?,
        })
    }

    /// `None` in a new file. Counts where nobody has counted yet.
    pub(super) fn meta(&self) -> TablesResult<Option<Meta>> {
        let Some((mut meta, counted)) = Meta::read(&self.meta)? else { return Ok(None) };
        if counted {
            return Ok(Some(meta));
        }
        for row in self.current.iter()? {
            let (key, row) = row?;
            meta.live_bytes += (key.value().len() + row.value().len()) as u64;
        }
        for row in self.past.iter()? {
            let (key, row) = row?;
            meta.history_bytes += (key.value().0.len() + row.value().len()) as u64;
        }
        for row in self.log.iter()? {
            meta.history_bytes += row?.1.value().len() as u64;
        }
        Ok(Some(meta))
    }

    pub(super) fn set_meta(&mut self, meta: Meta) -> TablesResult<()> {
        self.meta.insert(META_ROW, &meta.encode()[..])?;
        self.meta.insert(COUNTS_ROW, &meta.encode_counts()[..])?;
        Ok(())
    }
}

/// Where the store stood when `txn` began.
pub(super) fn read_meta(txn: &ReadTransaction) -> TablesResult<Meta> {
    let table = txn.open_table(META)?;
    Ok(Meta::read(&table)?.ok_or(Damaged { table: "meta" })?.0)
}

/// Appends the row that [`CURRENT`] holds for `kv`.
pub(super) fn encode_version(kv: &KeyValue, row: &mut Vec<u8>) {
    row.extend_from_slice(&kv.create_revision.0.to_le_bytes());
    row.extend_from_slice(&kv.mod_revision.0.to_le_bytes());
    row.extend_from_slice(&kv.version.to_le_bytes());
    row.extend_from_slice(&kv.lease.map_or(0, |lease| lease.0).to_le_bytes());
    row.extend_from_slice(&kv.value);
}

/// A row of [`CURRENT`], taken apart without copying its value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Version<'row> {
    pub(super) create_revision: u64,
    pub(super) mod_revision: u64,
    pub(super) version: u64,
    pub(super) lease: Option<LeaseId>,
    pub(super) value: &'row [u8],
}

impl<'row> Version<'row> {
    pub(super) fn decode(row: &'row [u8], table: &'static str) -> Result<Self, Damaged> {
        if row.len() < HEADER_BYTES {
            return Err(Damaged { table });
        }
        let lease = take_u64(row, 24).cast_signed();
        Ok(Self {
            create_revision: take_u64(row, 0),
            mod_revision: take_u64(row, 8),
            version: take_u64(row, 16),
            lease: (lease != 0).then_some(LeaseId(lease)),
            value: &row[HEADER_BYTES..],
        })
    }

    pub(super) fn to_kv(self, key: Bytes, keys_only: bool) -> KeyValue {
        KeyValue {
            key,
            value: if keys_only { Bytes::new() } else { Bytes::copy_from_slice(self.value) },
            create_revision: Revision(self.create_revision),
            mod_revision: Revision(self.mod_revision),
            version: self.version,
            lease: self.lease,
        }
    }
}

/// A row of [`PAST`]: the revision that superseded it, and what it was.
pub(super) fn decode_past(row: &[u8]) -> Result<(u64, Version<'_>), Damaged> {
    if row.len() < 8 {
        return Err(Damaged { table: "past" });
    }
    Ok((take_u64(row, 0), Version::decode(&row[8..], "past")?))
}

/// One change in a row of [`LOG`]. Values are not repeated there: that of a put is in [`CURRENT`], or in [`PAST`] if
/// it was superseded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LogEntry<'row> {
    pub(super) deleted: bool,
    /// When the version that this change superseded was put; 0 if there was none. It says what compaction can drop.
    pub(super) superseded: u64,
    pub(super) key: &'row [u8],
}

impl<'row> LogEntry<'row> {
    pub(super) fn encode(&self, row: &mut Vec<u8>) {
        let key_len = u32::try_from(self.key.len()).expect("keys are bounded");
        row.push(if self.deleted { MARK_DELETE } else { MARK_PUT });
        row.extend_from_slice(&self.superseded.to_le_bytes());
        row.extend_from_slice(&key_len.to_le_bytes());
        row.extend_from_slice(self.key);
    }

    pub(super) fn decode_all(mut row: &'row [u8]) -> Result<Vec<Self>, Damaged> {
        let damaged = || Damaged { table: "log" };
        let mut entries = Vec::new();
        while !row.is_empty() {
            let (head, rest) = row.split_at_checked(13).ok_or_else(damaged)?;
            let deleted = match head[0] {
                MARK_PUT => false,
                MARK_DELETE => true,
                _ => return Err(damaged()),
            };
            let key_len = u32::from_le_bytes(head[9..13].try_into().expect("four bytes")) as usize;
            let (key, rest) = rest.split_at_checked(key_len).ok_or_else(damaged)?;
            entries.push(Self { deleted, superseded: take_u64(head, 1), key });
            row = rest;
        }
        Ok(entries)
    }
}

fn take_u64(row: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(row[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_entries_come_back_as_they_were_written() {
        let entries = [
            LogEntry { deleted: false, superseded: 0, key: b"a" },
            LogEntry { deleted: true, superseded: 7, key: b"\0\xff" },
        ];
        let mut row = Vec::new();
        for entry in &entries {
            entry.encode(&mut row);
        }
        assert_eq!(LogEntry::decode_all(&row).unwrap(), entries);
        for cut in 1..row.len() {
            // A cut between the two entries leaves a shorter, valid row.
            assert_eq!(LogEntry::decode_all(&row[..cut]).is_ok(), cut == 14, "cut at {cut}");
        }
    }

    #[test]
    fn a_damaged_row_is_an_error_and_not_a_panic() {
        assert!(Meta::decode(&[0; 31]).is_err());
        assert!(Meta::decode(&[9; 32]).is_err());
        assert!(Version::decode(&[0; HEADER_BYTES - 1], "current").is_err());
        assert!(decode_past(&[0; 7]).is_err());
        assert!(LogEntry::decode_all(&[3; 40]).is_err());
    }
}
