//! The stores that the same suite runs on.

use std::sync::atomic::{AtomicUsize, Ordering};

use hv_store::conformance::etcd_server::{EtcdServer, EtcdVersion};
use hv_testkit::{ClusterOptions, StoreKind};

/// A store that runs for one test, for one cluster or for several after one another.
pub(crate) struct TestStore {
    etcd: Option<EtcdServer>,
    clusters: AtomicUsize,
}

impl TestStore {
    pub(crate) fn embedded() -> Self {
        Self { etcd: None, clusters: AtomicUsize::new(0) }
    }

    /// `None` where this etcd is not installed; the skip is reported.
    pub(crate) async fn etcd(version: EtcdVersion) -> Option<Self> {
        let etcd = EtcdServer::start(version).await?;
        Some(Self { etcd: Some(etcd), clusters: AtomicUsize::new(0) })
    }

    /// For a new cluster, which finds nothing of the ones before it.
    pub(crate) fn options(&self) -> ClusterOptions {
        let number = self.clusters.fetch_add(1, Ordering::Relaxed);
        let store = self.etcd.as_ref().map_or(StoreKind::Embedded, |etcd| StoreKind::Etcd {
            endpoints: etcd.endpoints(),
            prefix: format!("/cluster-{number}"),
        });
        ClusterOptions { store, ..ClusterOptions::default() }
    }
}
