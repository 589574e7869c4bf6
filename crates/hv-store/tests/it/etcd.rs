//! The etcd backend against real etcd servers: the conformance suite, and what only it promises.

use bytes::Bytes;
use hv_store::SharedStore;
use hv_store::conformance::etcd_server::{EtcdServer, EtcdVersion};
use hv_store::conformance::{self, PREFIX};
use hv_store::etcd::{EtcdOptions, EtcdStore};

/// As servers use it: all they write is below one prefix.
fn scoped(server: &EtcdServer) -> EtcdOptions {
    EtcdOptions { scope: Some(Bytes::from_static(PREFIX.as_bytes())), ..server.options() }
}

macro_rules! chapters {
    ($version:expr, $($chapter:ident),*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $chapter() {
            let Some(server) = EtcdServer::start($version).await else { return };
            let store: SharedStore = EtcdStore::connect(scoped(&server)).await.unwrap();
            conformance::$chapter(&store).await;
        }
    )*};
}

mod v3_4 {
    use super::*;
    chapters!(EtcdVersion::V3_4, keys, transactions, watches, history, compaction, upkeep, leases, races);
}

mod v3_5 {
    use super::*;
    chapters!(EtcdVersion::V3_5, keys, transactions, watches, history, compaction, upkeep, leases, races);
}
