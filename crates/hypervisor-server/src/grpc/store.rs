//! `StoreService`: the store's upkeep.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use hv_cluster::Cluster;
use hv_proto::v1::store_service_server::StoreService;
use hv_proto::{convert, v1};
use hv_store::backup::{self, BackupError};
use hv_store::dump::dump;
use hv_store::{DefragmentStep, StoreStatus};
use hv_types::{ErrorCode, Invalid, ServiceError};
use tokio::io::{AsyncSeekExt, AsyncWriteExt};
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::info;

use super::request::{failed, refuse};
use super::{ReplyStream, until_stop};

/// Largest piece of a file in one message, in bytes.
const CHUNK_BYTES: usize = 1 << 20;
/// Largest backup that is taken over, in bytes: 64 GiB, many times a full store.
const MAX_BACKUP_BYTES: u64 = 64 << 30;
/// How many messages of progress may wait for the caller.
const PROGRESS_BOUND: usize = 64;
/// Longest beginning of a key that a dump takes, in bytes.
const MAX_DUMP_PREFIX_BYTES: usize = 512;

pub(crate) struct Service {
    cluster: Arc<Cluster>,
    stop: CancellationToken,
    /// Where backups wait until they are known to be whole.
    spool_dir: PathBuf,
    /// One at a time: restores and defragmentations.
    exclusive: Arc<Mutex<()>>,
}

impl Service {
    pub(crate) fn new(cluster: Arc<Cluster>, spool_dir: PathBuf, stop: CancellationToken) -> Self {
        Self { cluster, stop, spool_dir, exclusive: Arc::default() }
    }

    fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    async fn status(&self) -> Result<v1::StoreStatus, Status> {
        let cluster = self.cluster();
        cluster.sync().await.map_err(failed)?;
        let status = cluster.store().status().await.map_err(|error| failed(error.into()))?;
        Ok(status_to(cluster, status))
    }

    fn alone(&self) -> Result<tokio::sync::OwnedMutexGuard<()>, Status> {
        self.exclusive.clone().try_lock_owned().map_err(|_| {
            let message = "a restore or a compaction is under way on this server; wait until it has ended";
            refuse(ServiceError::precondition(message))
        })
    }
}

fn status_to(cluster: &Cluster, status: StoreStatus) -> v1::StoreStatus {
    let records = cluster.cache().read(|state| {
        let counts = [
            ("nodes", state.nodes().count()),
            ("instances", state.instances_after(None).count()),
            ("operations", state.operations_before(None).count()),
            ("events", state.event_count()),
        ];
        counts.map(|(kind, count)| (kind.to_owned(), count as u64)).into()
    });
    let member = |member: hv_store::MemberStatus| v1::StoreMember {
        endpoint: member.endpoint,
        id: member.id,
        version: member.version,
        is_leader: member.is_leader,
        size_bytes: member.size_bytes,
        used_bytes: member.used_bytes,
        error: member.error.unwrap_or_else(|| member.alarms.join(", ")),
    };
    v1::StoreStatus {
        backend: status.backend.to_owned(),
        revision: status.revision.0,
        compacted_revision: status.oldest.map_or(0, |revision| revision.0),
        size_bytes: status.size_bytes,
        used_bytes: status.used_bytes,
        quota_bytes: status.quota_bytes.unwrap_or(0),
        is_full: status.is_full,
        is_frozen: cluster.is_frozen(),
        members: status.members.into_iter().map(member).collect(),
        warnings: status.warnings,
        records,
        schema: convert::RECORD_SCHEMA,
    }
}

fn backup_failed(error: BackupError) -> Status {
    let code = match &error {
        BackupError::Store(_) => ErrorCode::Unavailable,
        BackupError::Read(_) => ErrorCode::Internal,
        BackupError::Foreign(_) | BackupError::Damaged { .. } => ErrorCode::InvalidArgument,
        BackupError::Newer { .. } | BackupError::NotEmpty(_) | BackupError::OtherUnderWay => {
            ErrorCode::FailedPrecondition
        }
    };
    match error {
        BackupError::Store(error) => failed(error.into()),
        error => refuse(ServiceError::new(code, error.to_string()).caused_by(error)),
    }
}

/// Pieces as messages that are not too large.
fn chunks<E: Send + 'static>(
    pieces: impl futures::Stream<Item = Result<bytes::Bytes, E>> + Send + 'static,
    explain: fn(E) -> Status,
) -> impl futures::Stream<Item = Result<v1::StoreChunk, Status>> + Send + 'static {
    pieces.map_err(explain).flat_map(|piece| {
        let parts: Vec<Result<v1::StoreChunk, Status>> = match piece {
            Err(status) => vec![Err(status)],
            Ok(mut piece) => {
                let mut parts = Vec::new();
                while !piece.is_empty() {
                    let part = piece.split_to(piece.len().min(CHUNK_BYTES));
                    parts.push(Ok(v1::StoreChunk { data: part }));
                }
                parts
            }
        };
        futures::stream::iter(parts)
    })
}

#[tonic::async_trait]
impl StoreService for Service {
    type BackupStoreStream = ReplyStream<v1::StoreChunk>;
    type DumpStoreStream = ReplyStream<v1::StoreChunk>;
    type CompactStoreStream = ReplyStream<v1::StoreProgress>;

    async fn get_store_status(
        &self,
        _: Request<v1::GetStoreStatusRequest>,
    ) -> Result<Response<v1::StoreStatus>, Status> {
        self.status().await.map(Response::new)
    }

    async fn backup_store(
        &self,
        _: Request<v1::BackupStoreRequest>,
    ) -> Result<Response<Self::BackupStoreStream>, Status> {
        let cluster = self.cluster();
        let pieces =
            backup::backup(cluster.store().clone(), cluster.keys().clone()).await.map_err(backup_failed)?;
        Ok(until_stop(&self.stop, chunks(pieces, backup_failed)))
    }

    async fn restore_store(
        &self,
        request: Request<Streaming<v1::StoreChunk>>,
    ) -> Result<Response<v1::RestoreStoreResponse>, Status> {
        let _alone = self.alone()?;
        let cluster = self.cluster();
        let file = spool(&self.spool_dir, request.into_inner()).await?;
        let summary = backup::restore(cluster.store(), cluster.keys(), file).await.map_err(backup_failed)?;
        cluster.sync().await.map_err(failed)?;
        info!(records = summary.records, cluster = summary.cluster_id, "a backup was restored");
        Ok(Response::new(v1::RestoreStoreResponse {
            records: summary.records,
            backup_created_at: Some(convert::to_timestamp(summary.created_at)),
        }))
    }

    async fn dump_store(
        &self,
        request: Request<v1::DumpStoreRequest>,
    ) -> Result<Response<Self::DumpStoreStream>, Status> {
        let prefix = request.into_inner().key_prefix;
        if prefix.len() > MAX_DUMP_PREFIX_BYTES || prefix.starts_with('/') {
            let expected = "must be the beginning of a key below the prefix, as instances/";
            return Err(refuse(Invalid::new("key_prefix", &prefix, expected)));
        }
        let cluster = self.cluster();
        let explain = |error: hv_store::StoreError| failed(error.into());
        let pieces = dump(cluster.store().clone(), cluster.keys().clone(), &prefix).await.map_err(explain)?;
        Ok(until_stop(&self.stop, chunks(pieces, explain)))
    }

    async fn compact_store(
        &self,
        request: Request<v1::CompactStoreRequest>,
    ) -> Result<Response<Self::CompactStoreStream>, Status> {
        let alone = self.alone()?;
        let defragment = request.into_inner().defragment;
        let (sender, receiver) = mpsc::channel(PROGRESS_BOUND);
        let cluster = self.cluster().clone();
        // It goes on without the caller: half a defragmentation helps nobody.
        tokio::spawn(async move {
            let _alone = alone;
            if let Err(error) = compact(&cluster, defragment, &sender).await {
                // The caller may be gone.
                let _ = sender.send(Err(failed(error.into()))).await;
            }
        });
        Ok(until_stop(
            &self.stop,
            futures::stream::unfold(receiver, |mut receiver| async move {
                receiver.recv().await.map(|step| (step, receiver))
            }),
        ))
    }

    async fn freeze_store(
        &self,
        request: Request<v1::FreezeStoreRequest>,
    ) -> Result<Response<v1::StoreStatus>, Status> {
        let frozen = request.into_inner().frozen;
        self.cluster().set_frozen(frozen).await.map_err(failed)?;
        info!(frozen, "the store was frozen or unfrozen");
        self.status().await.map(Response::new)
    }
}

async fn compact(
    cluster: &Cluster,
    defragment: bool,
    progress: &mpsc::Sender<Result<v1::StoreProgress, Status>>,
) -> hv_store::Result<()> {
    // A caller that does not listen, or not fast enough, misses steps and nothing else.
    let tell = |message: String, done: u32, total: u32| {
        let _ = progress.try_send(Ok(v1::StoreProgress { message, done, total }));
    };
    let store = cluster.store();
    let revision = store.revision().await?;
    tell(format!("forgetting what was superseded before revision {revision}"), 0, 1);
    match store.compact(revision).await {
        // Another server was faster.
        Ok(()) | Err(hv_store::StoreError::Compacted { .. }) => {}
        Err(error) => return Err(error),
    }
    tell("compacted".to_owned(), 1, 1);
    if defragment {
        store
            .defragment(&|step: DefragmentStep| {
                tell(
                    step.message,
                    u32::try_from(step.done).unwrap_or(u32::MAX),
                    u32::try_from(step.total).unwrap_or(u32::MAX),
                );
            })
            .await?;
    }
    Ok(())
}

/// Keeps what comes in an unnamed file: nothing is believed before all of it is there.
async fn spool(
    dir: &std::path::Path,
    mut stream: Streaming<v1::StoreChunk>,
) -> Result<tokio::fs::File, Status> {
    let cannot = |cause: io::Error| {
        let message = "this server cannot keep the backup while it checks it; see its log and its disk";
        refuse(ServiceError::new(ErrorCode::ResourceExhausted, message).caused_by(cause))
    };
    let file = tempfile::tempfile_in(dir).map_err(cannot)?;
    let mut file = tokio::fs::File::from_std(file);
    let mut size = 0;
    while let Some(chunk) = stream.message().await? {
        size += chunk.data.len() as u64;
        if size > MAX_BACKUP_BYTES {
            let expected = format!("must be at most {MAX_BACKUP_BYTES} bytes");
            return Err(refuse(Invalid::new("backup", size, expected)));
        }
        file.write_all(&chunk.data).await.map_err(cannot)?;
    }
    file.flush().await.map_err(cannot)?;
    file.rewind().await.map_err(cannot)?;
    Ok(file)
}
