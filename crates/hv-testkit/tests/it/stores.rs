//! The stores that the same suite runs on.

use hv_store::conformance::etcd_server::{EtcdServer, EtcdVersion};
use hv_testkit::{ClusterOptions, StoreKind};

/// A store that runs for one test.
pub(crate) struct TestStore {
    pub(crate) kind: StoreKind,
    /// Ends with the test.
    _etcd: Option<EtcdServer>,
}

impl TestStore {
    pub(crate) fn embedded() -> Self {
        Self { kind: StoreKind::Embedded, _etcd: None }
    }

    /// `None` where this etcd is not installed; the skip is reported.
    pub(crate) async fn etcd(version: EtcdVersion) -> Option<Self> {
        let etcd = EtcdServer::start(version).await?;
        Some(Self { kind: StoreKind::Etcd(etcd.endpoints()), _etcd: Some(etcd) })
    }

    pub(crate) fn options(&self) -> ClusterOptions {
        ClusterOptions { store: self.kind.clone(), ..ClusterOptions::default() }
    }
}
