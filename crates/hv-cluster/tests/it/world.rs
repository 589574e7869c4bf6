//! What the claims are made about: servers' cluster logic on one store, and doubles of nodes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use hv_cluster::reports::{Report, Verdict};
use hv_cluster::{Cluster, ClusterConfig, Election, Error, Mutation};
use hv_proto::{convert, v1};
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::{
    Health, KeyRange, KeyValue, LeaseId, RangeRequest, RangeResult, SharedStore, Store, StoreError, Txn,
    TxnOutcome, WatchStream,
};
use hv_types::instance::{Request, StopOptions};
use hv_types::{Epoch, ErrorCode, InstanceId, InstanceRecord, InstanceState, NodeId, RequestKey, Revision};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// How long a condition may take to come true on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

/// Waits until `look` finds something.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begin = tokio::time::Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begin.elapsed() < LIMIT, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// An embedded store that ends with this value.
pub(crate) struct Disk {
    pub(crate) store: SharedStore,
    _dir: TempDir,
}

pub(crate) fn disk() -> Disk {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(dir.path(), EmbeddedOptions::default()).unwrap();
    Disk { store, _dir: dir }
}

/// One server's cluster logic, with all its parts running.
pub(crate) struct Server {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) election: Arc<Election>,
    stop: CancellationToken,
    parts: JoinSet<()>,
}

pub(crate) fn config(server_id: &str) -> ClusterConfig {
    ClusterConfig {
        server_id: server_id.into(),
        leader_ttl: Duration::from_secs(2),
        ..ClusterConfig::default()
    }
}

impl Server {
    /// One that never leads and writes nothing by itself.
    pub(crate) async fn idle(store: &SharedStore, config: ClusterConfig) -> Self {
        let cluster = Cluster::open(store.clone(), config.clone()).await.unwrap();
        let key = cluster.keys().leader("scheduler");
        let election = Election::new(store.clone(), key, &config.server_id, config.leader_ttl);
        let stop = CancellationToken::new();
        let mut parts = JoinSet::new();
        let (c, t) = (cluster.clone(), stop.clone());
        parts.spawn(async move { c.cache().run(t).await });
        Self { cluster, election, stop, parts }
    }

    pub(crate) async fn start(store: &SharedStore, config: ClusterConfig) -> Self {
        let Self { cluster, election, stop, mut parts } = Self::idle(store, config).await;
        let (e, t) = (election.clone(), stop.clone());
        parts.spawn(async move { e.run(t).await });
        let (c, l, t) = (cluster.clone(), election.leadership(), stop.clone());
        parts.spawn(async move { c.run_placer(l, t).await });
        let (c, l, t) = (cluster.clone(), election.leadership(), stop.clone());
        parts.spawn(async move { c.run_reconciler(l, t).await });
        let (c, t) = (cluster.clone(), stop.clone());
        parts.spawn(async move { c.events().run(c.cache(), t).await });
        Self { cluster, election, stop, parts }
    }

    /// Ends in order: the next leader need not wait.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        while self.parts.join_next().await.is_some() {}
    }

    /// Ends as a process does that is killed.
    pub(crate) async fn kill(mut self) {
        self.parts.shutdown().await;
    }

    pub(crate) fn leads(&self) -> bool {
        self.election.leadership().borrow().is_some()
    }

    pub(crate) async fn create(&self, record: InstanceRecord) -> Result<v1::Instance, Error> {
        self.cluster.create_instance(&Mutation::once("create"), record).await.map(|done| done.reply)
    }

    pub(crate) async fn add_node(&self, node: v1::RegisterNodeRequest) -> NodeId {
        let record = convert::node_from_registration(node).unwrap();
        self.cluster.register_node(None, record).await.unwrap().id
    }

    pub(crate) async fn drain(&self, id: &NodeId) -> v1::DrainNodeResponse {
        let (once, options) = (Mutation::once("drain"), hv_cluster::nodes::DrainOptions::default());
        self.cluster.drain_node(&once, id, options).await.unwrap().reply
    }

    pub(crate) async fn get(&self, id: &InstanceId) -> Arc<InstanceRecord> {
        self.cluster.instance(id).await.unwrap()
    }

    pub(crate) async fn change(&self, id: &InstanceId, request: Request) -> Result<v1::Instance, Error> {
        let (once, stop) = (Mutation::once("change"), StopOptions::default());
        self.cluster.change_instance(&once, id, request, stop).await.map(|done| done.reply)
    }

    pub(crate) async fn report(&self, node: &NodeId, reports: &[Report]) -> Vec<Verdict> {
        self.cluster.report(&self.cluster.id(), node, reports).await.unwrap()
    }

    pub(crate) async fn report_one(&self, node: &NodeId, report: Report) -> Verdict {
        self.report(node, &[report]).await[0]
    }

    /// Waits until the instance is bound; says where.
    pub(crate) async fn bound(&self, id: &InstanceId) -> NodeId {
        until("the instance to be bound", async || self.get(id).await.node_id().cloned()).await
    }

    /// An instance that runs on a node, as its agent has reported.
    pub(crate) async fn running(&self, record: InstanceRecord) -> (InstanceId, NodeId) {
        let id = record.id.clone();
        self.create(record).await.unwrap();
        let node = self.bound(&id).await;
        let report = report(&*self.get(&id).await, InstanceState::Running);
        assert_eq!(self.report_one(&node, report).await, Verdict::Accepted);
        (id, node)
    }
}

/// A node with so many cores and all else in plenty.
pub(crate) fn node(id: &str, cores: i32) -> v1::RegisterNodeRequest {
    let room = v1::Resources { cpu_cores: cores, memory_bytes: 1 << 40, disk_bytes: 1 << 40, gpu_count: 0 };
    v1::RegisterNodeRequest {
        node_id: id.into(),
        hostname: format!("host-{id}"),
        ip: "127.0.0.1".into(),
        port: 1,
        capacity: Some(room),
        supported_instance_types: vec!["vm".into(), "container".into()],
        ..v1::RegisterNodeRequest::default()
    }
}

/// A container of one core without disks, so that a drain can move it.
pub(crate) fn wish(name: &str) -> v1::CreateInstanceRequest {
    v1::CreateInstanceRequest {
        name: name.into(),
        r#type: v1::InstanceType::Container.into(),
        spec: Some(v1::InstanceSpec {
            image: "tiny".into(),
            cpu_cores: 1,
            memory_bytes: 64 << 20,
            ..v1::InstanceSpec::default()
        }),
        ..v1::CreateInstanceRequest::default()
    }
}

pub(crate) fn asked(name: &str) -> InstanceRecord {
    convert::create_request_from(wish(name)).unwrap()
}

/// What the node of `record` reports once it has done what is asked.
pub(crate) fn report(record: &InstanceRecord, state: InstanceState) -> Report {
    Report {
        id: record.id.clone(),
        epoch: record.epoch,
        observed_generation: record.generation,
        state,
        reason: format!("{state} it is"),
        ip_address: String::new(),
        started_at: None,
        gone: false,
        restart_count: 0,
        update_note: String::new(),
        migration: String::new(),
    }
}

pub(crate) fn gone(record: &InstanceRecord) -> Report {
    Report { gone: true, ..report(record, InstanceState::Deleting) }
}

pub(crate) fn at_epoch(report: Report, epoch: u64) -> Report {
    Report { epoch: Epoch(epoch), ..report }
}

pub(crate) fn keyed(key: &str, digest: u8) -> Mutation {
    Mutation { method: "create", key: Some(key.parse::<RequestKey>().unwrap()), digest: vec![digest] }
}

pub(crate) fn code<T>(outcome: Result<T, Error>) -> ErrorCode {
    match outcome {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.code(),
    }
}

/// Everything in the store but what is leased or only for people: what a refused request must not change.
pub(crate) async fn dump(store: &SharedStore) -> Vec<KeyValue> {
    let all = RangeRequest { keys: KeyRange::Prefix("".into()), limit: 10_000, at: None, keys_only: false };
    let kvs = store.range(all).await.unwrap().kvs;
    let matters = |kv: &KeyValue| kv.lease.is_none() && !kv.key.starts_with(b"/hypervisor/events/");
    kvs.into_iter().filter(matters).collect()
}

/// A double: a store that commits and then does not say so, and that counts transactions.
pub(crate) struct Mute {
    inner: SharedStore,
    /// The next transaction's outcome is lost.
    pub(crate) lose_next: AtomicBool,
    /// The next transaction meets a lease that has ended.
    pub(crate) lease_ended: AtomicBool,
    pub(crate) txns: AtomicUsize,
    /// A leader's transaction waits while nobody can write this.
    pub(crate) leader_gate: tokio::sync::RwLock<()>,
    /// How many transactions of leaders have come.
    pub(crate) leader_waits: AtomicUsize,
    /// Renewals of leases are never answered.
    pub(crate) hang_leases: AtomicBool,
}

impl Mute {
    pub(crate) fn over(inner: &SharedStore) -> Arc<Self> {
        let (lose_next, lease_ended) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self {
            inner: inner.clone(),
            lose_next,
            lease_ended,
            txns: AtomicUsize::new(0),
            leader_gate: tokio::sync::RwLock::new(()),
            leader_waits: AtomicUsize::new(0),
            hang_leases: AtomicBool::new(false),
        })
    }
}

#[async_trait]
impl Store for Mute {
    async fn range(&self, request: RangeRequest) -> Result<RangeResult, StoreError> {
        self.inner.range(request).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.txns.fetch_add(1, Ordering::SeqCst);
        let is_leaders =
            txn.compares.iter().any(|compare| matches!(compare, hv_store::Compare::CreateRevision(..)));
        self.leader_waits.fetch_add(usize::from(is_leaders), Ordering::SeqCst);
        let _passed = if is_leaders { Some(self.leader_gate.read().await) } else { None };
        let lease = txn.then.iter().find_map(|op| match op {
            hv_store::Op::Put { lease, .. } => *lease,
            hv_store::Op::Delete(_) => None,
        });
        if let Some(lease) = lease
            && self.lease_ended.swap(false, Ordering::SeqCst)
        {
            self.inner.lease_revoke(lease).await?;
        }
        let outcome = self.inner.txn(txn).await?;
        if self.lose_next.swap(false, Ordering::SeqCst) {
            return Err(StoreError::Timeout { endpoint: "a double".into(), timeout_ms: 1 });
        }
        Ok(outcome)
    }

    async fn watch(&self, keys: KeyRange, from: Option<Revision>) -> Result<WatchStream, StoreError> {
        self.inner.watch(keys, from).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.inner.revision().await
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.inner.lease_grant(ttl).await
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        if self.hang_leases.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        self.inner.lease_keep_alive(lease).await
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.lease_revoke(lease).await
    }

    async fn compact(&self, revision: Revision) -> Result<(), StoreError> {
        self.inner.compact(revision).await
    }

    async fn health(&self) -> Result<Health, StoreError> {
        self.inner.health().await
    }
}
