//! The fake's StoreService: a backup is a few bytes.

use futures::StreamExt;
use hv_proto::v1;
use hv_proto::v1::store_service_server::StoreService;
use hv_types::ErrorCode;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::{Service, Streamed, status};

/// What a backup holds.
pub(crate) const BACKUP: &[u8] = b"the first half, the second half";

impl Service {
    fn store_status(&self) -> v1::StoreStatus {
        v1::StoreStatus {
            backend: "embedded".into(),
            revision: 42,
            size_bytes: 1 << 20,
            used_bytes: 1 << 19,
            is_frozen: self.0.lock().frozen,
            warnings: vec!["the disk is nearly full".into()],
            records: [("instances".to_owned(), 2)].into(),
            ..Default::default()
        }
    }
}

fn chunks(parts: Vec<&'static [u8]>) -> Streamed<v1::StoreChunk> {
    Box::pin(futures::stream::iter(parts).map(|part| Ok(v1::StoreChunk { data: part.into() })))
}

#[async_trait]
impl StoreService for Service {
    type BackupStoreStream = Streamed<v1::StoreChunk>;
    type DumpStoreStream = Streamed<v1::StoreChunk>;
    type CompactStoreStream = Streamed<v1::StoreProgress>;

    async fn get_store_status(
        &self,
        _: Request<v1::GetStoreStatusRequest>,
    ) -> Result<Response<v1::StoreStatus>, Status> {
        Ok(Response::new(self.store_status()))
    }

    async fn backup_store(
        &self,
        _: Request<v1::BackupStoreRequest>,
    ) -> Result<Response<Self::BackupStoreStream>, Status> {
        let (first, second) = BACKUP.split_at(15);
        Ok(Response::new(chunks(vec![first, second])))
    }

    async fn restore_store(
        &self,
        request: Request<Streaming<v1::StoreChunk>>,
    ) -> Result<Response<v1::RestoreStoreResponse>, Status> {
        let mut stream = request.into_inner();
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.message().await? {
            bytes.extend_from_slice(&chunk.data);
        }
        let mut model = self.0.lock();
        if let Some(why) = &model.script.restore_refused {
            return Err(status(ErrorCode::FailedPrecondition, why.clone()));
        }
        model.restored = bytes;
        Ok(Response::new(v1::RestoreStoreResponse { records: 7, ..Default::default() }))
    }

    async fn dump_store(
        &self,
        _: Request<v1::DumpStoreRequest>,
    ) -> Result<Response<Self::DumpStoreStream>, Status> {
        Ok(Response::new(chunks(vec![b"{\"key\":\"a\"}\n", b"{\"key\":\"b\"}\n"])))
    }

    async fn compact_store(
        &self,
        _: Request<v1::CompactStoreRequest>,
    ) -> Result<Response<Self::CompactStoreStream>, Status> {
        let step = v1::StoreProgress { message: "compacting".into(), done: 1, total: 1 };
        Ok(Response::new(Box::pin(futures::stream::iter([Ok(step)]))))
    }

    async fn freeze_store(
        &self,
        request: Request<v1::FreezeStoreRequest>,
    ) -> Result<Response<v1::StoreStatus>, Status> {
        self.0.lock().frozen = request.get_ref().frozen;
        Ok(Response::new(self.store_status()))
    }
}
