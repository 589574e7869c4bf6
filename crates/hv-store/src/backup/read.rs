//! Reading a backup: bounded, and believing nothing.

use hv_proto::convert::{RECORD_SCHEMA, from_timestamp};
use hv_proto::store::backup_frame::Frame;
use hv_proto::store::{BackupFrame, BackupRecord};
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{BackupError, MAGIC, MAX_FRAME_BYTES, Summary};
use crate::Revision;

/// Longest key, in bytes, that a backup may hold: that of the store.
const MAX_KEY_BYTES: usize = 4096;

/// Reads frames one after another.
pub(super) struct Reader<R> {
    source: R,
    at: u64,
    hash: Sha256,
    summary: Option<Summary>,
    last_key: String,
}

impl<R: AsyncRead + Unpin + Send> Reader<R> {
    /// Reads the beginning.
    pub(super) async fn open(source: R) -> Result<Self, BackupError> {
        let mut reader = Self { source, at: 0, hash: Sha256::new(), summary: None, last_key: String::new() };
        let mut magic = vec![0; MAGIC.len()];
        let begun = reader.source.read_exact(&mut magic).await;
        match begun {
            Ok(_) if magic == MAGIC => {}
            Ok(_) => return Err(BackupError::Foreign("it does not begin as one".into())),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(BackupError::Foreign("it is too short".into()));
            }
            Err(error) => return Err(BackupError::Read(error)),
        }
        reader.at += MAGIC.len() as u64;
        reader.hash.update(&magic);
        let (bytes, frame) = reader.frame().await?;
        let Frame::Header(header) = frame else { return Err(reader.damaged("it has no header")) };
        if header.schema > RECORD_SCHEMA {
            return Err(BackupError::Newer { found: header.schema });
        }
        reader.hash.update(&bytes);
        reader.summary = Some(Summary {
            cluster_id: header.cluster_id,
            revision: Revision(header.revision),
            created_at: header.created_at.as_ref().map_or(std::time::UNIX_EPOCH, from_timestamp),
            records: 0,
            sha256: Vec::new(),
        });
        Ok(reader)
    }

    /// The next record; `None` after the last, when the whole was found to be as it was written.
    pub(super) async fn next(&mut self) -> Result<Option<BackupRecord>, BackupError> {
        let (bytes, frame) = self.frame().await?;
        match frame {
            Frame::Header(_) => Err(self.damaged("it has a second header")),
            Frame::Record(record) => {
                if record.key.len() > MAX_KEY_BYTES || record.key <= self.last_key {
                    return Err(self.damaged("its keys are not in order"));
                }
                self.last_key.clone_from(&record.key);
                self.hash.update(&bytes);
                if let Some(summary) = &mut self.summary {
                    summary.records += 1;
                }
                Ok(Some(record))
            }
            Frame::Trailer(trailer) => {
                let found = self.hash.clone().finalize().to_vec();
                let records = self.summary.as_ref().map_or(0, |summary| summary.records);
                if trailer.sha256 != found || trailer.records != records {
                    return Err(self.damaged("its content is not what was written"));
                }
                if let Some(summary) = &mut self.summary {
                    summary.sha256 = found;
                }
                let mut rest = [0; 1];
                match self.source.read(&mut rest).await.map_err(BackupError::Read)? {
                    0 => Ok(None),
                    _ => Err(self.damaged("there is something behind its end")),
                }
            }
        }
    }

    /// What the header and, after the last record, the trailer say.
    pub(super) fn summary(&self) -> Option<&Summary> {
        self.summary.as_ref()
    }

    async fn frame(&mut self) -> Result<(Vec<u8>, Frame), BackupError> {
        let mut length = [0; 4];
        self.fill(&mut length).await?;
        let size = u32::from_le_bytes(length) as usize;
        if size > MAX_FRAME_BYTES {
            return Err(self.damaged("a part of it is larger than any record can be"));
        }
        let mut bytes = vec![0; 4 + size];
        bytes[..4].copy_from_slice(&length);
        self.fill(&mut bytes[4..]).await?;
        let frame = BackupFrame::decode(&bytes[4..]).ok().and_then(|frame| frame.frame);
        let frame = frame.ok_or_else(|| self.damaged("a part of it cannot be read"))?;
        self.at += bytes.len() as u64;
        Ok((bytes, frame))
    }

    async fn fill(&mut self, bytes: &mut [u8]) -> Result<(), BackupError> {
        match self.source.read_exact(bytes).await {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(self.damaged("it ends before its end"))
            }
            Err(error) => Err(BackupError::Read(error)),
        }
    }

    fn damaged(&self, why: &str) -> BackupError {
        BackupError::Damaged { at: self.at, why: why.to_owned() }
    }
}

/// Reads a whole backup and says what it is.
///
/// # Errors
/// It is not one, or not as it was written.
pub async fn verify(source: impl AsyncRead + Unpin + Send) -> Result<Summary, BackupError> {
    let mut reader = Reader::open(source).await?;
    while reader.next().await?.is_some() {}
    reader.summary().cloned().ok_or_else(|| BackupError::Foreign("it has no header".into()))
}
