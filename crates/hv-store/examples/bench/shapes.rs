//! What the clients of the bench do.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::StreamExt;
use futures::future::try_join_all;
use hv_store::{
    Compare, KeyRange, LeaseId, MAX_TXN_OPS, Op, Revision, SharedStore, StoreExt, Txn, TxnOutcome,
};
use hv_types::InstanceId;

/// How many different keys each client of [`Shape::Puts`] writes.
const KEYS: usize = 1000;
/// Clients of the shapes that have a fixed number of them.
const CREATING: usize = 64;
const BATCHING: usize = 4;
const RENEWING: usize = 256;
/// Keys in a large transaction.
const BATCH: usize = 100;
/// Leases that are renewed in turn.
const LEASES: usize = 10_000;
/// How long the watch may take to see the last change.
const WATCH_PATIENCE: Duration = Duration::from_secs(1);

/// What each client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Single puts, from so many clients.
    Puts(usize),
    /// A record and its name, if the name is not taken.
    Create,
    /// 100 new records.
    Batch,
    /// 100 records changed, each as it was read.
    Rebind,
    /// Renewals of leases.
    KeepAlive,
}

/// What came of it.
pub(crate) struct Round {
    pub(crate) latencies: Vec<Duration>,
    pub(crate) elapsed: Duration,
    pub(crate) keys_per_call: usize,
    pub(crate) cpu_seconds: f64,
    pub(crate) note: String,
}

impl Round {
    pub(crate) fn per_second(&self) -> f64 {
        self.latencies.len() as f64 / self.elapsed.as_secs_f64()
    }
}

impl Shape {
    pub(crate) const ALL: [Self; 7] = [
        Self::Puts(1),
        Self::Puts(64),
        Self::Puts(256),
        Self::Create,
        Self::Batch,
        Self::Rebind,
        Self::KeepAlive,
    ];

    pub(crate) fn named(name: &str) -> anyhow::Result<Vec<Self>> {
        Ok(match name {
            "puts" => Self::ALL[..3].to_vec(),
            "puts64" => vec![Self::Puts(64)],
            "create" => vec![Self::Create],
            "batch100" => vec![Self::Batch],
            "rebind100" => vec![Self::Rebind],
            "keepalive" => vec![Self::KeepAlive],
            _ => bail!("there is no shape {name}"),
        })
    }

    pub(crate) fn name(self) -> String {
        match self {
            Self::Puts(clients) => format!("puts{clients}"),
            Self::Create => "create".to_owned(),
            Self::Batch => "batch100".to_owned(),
            Self::Rebind => "rebind100".to_owned(),
            Self::KeepAlive => "keepalive".to_owned(),
        }
    }

    pub(crate) async fn run(
        self,
        store: &SharedStore,
        measured: Duration,
        value_bytes: usize,
    ) -> anyhow::Result<Round> {
        let (clients, keys_per_call) = match self {
            Self::Puts(clients) => (clients, 1),
            Self::Create => (CREATING, 2),
            Self::Batch | Self::Rebind => (BATCHING, BATCH),
            Self::KeepAlive => (RENEWING, 1),
        };
        let value = vec![b'v'; value_bytes];
        let leases = if self == Self::KeepAlive { grant(store).await? } else { Vec::new() };
        let mut records = Vec::new();
        if self == Self::Rebind {
            for _ in 0..clients {
                records.push(own_records(store, &value).await?);
            }
        }
        let watched = follow(store).await?;
        let started = Instant::now();
        let until = started + measured;
        let tasks = (0..clients).map(|index| {
            let client = Client {
                store: store.clone(),
                index,
                until,
                value: value.clone().into(),
                leases: leases.iter().skip(index).step_by(clients).copied().collect(),
                records: records.get(index).cloned().unwrap_or_default(),
            };
            tokio::spawn(client.run(self))
        });
        let done = try_join_all(tasks).await?;
        let elapsed = started.elapsed();
        let latencies: Vec<_> = done.into_iter().collect::<anyhow::Result<Vec<_>>>()?.concat();
        let changed = if self == Self::KeepAlive { 0 } else { latencies.len() * keys_per_call };
        let seen = watched.await?;
        let note = if seen == changed {
            String::new()
        } else {
            format!("; the watch saw {seen} of {changed} changes")
        };
        for lease in leases {
            store.lease_revoke(lease).await?;
        }
        Ok(Round { latencies, elapsed, keys_per_call, cpu_seconds: 0.0, note })
    }
}

/// One watch follows everything, as a server's cache does.
async fn follow(store: &SharedStore) -> anyhow::Result<tokio::task::JoinHandle<usize>> {
    let mut stream = store.watch(KeyRange::Prefix("bench/".into()), None).await?;
    Ok(tokio::spawn(async move {
        let mut count = 0;
        while let Ok(Some(Ok(events))) = tokio::time::timeout(WATCH_PATIENCE, stream.next()).await {
            count += events.changes.len();
        }
        count
    }))
}

async fn grant(store: &SharedStore) -> anyhow::Result<Vec<LeaseId>> {
    let mut leases = Vec::new();
    while leases.len() < LEASES {
        let some = (0..RENEWING).map(|_| store.lease_grant(Duration::from_secs(600)));
        leases.extend(try_join_all(some).await?);
    }
    Ok(leases)
}

type Record = (String, Revision);

/// Records for one client to change, ordered by key.
async fn own_records(store: &SharedStore, value: &[u8]) -> anyhow::Result<Vec<Record>> {
    let mut records = Vec::new();
    for _ in 0..KEYS / BATCH {
        let keys = new_keys();
        let then = keys.iter().map(|key| Op::put(key.clone(), value.to_vec())).collect();
        let TxnOutcome::Committed(at) = store.txn(Txn { then, ..Txn::default() }).await? else {
            bail!("a transaction without conditions was refused")
        };
        records.extend(keys.into_iter().map(|key| (key, at)));
    }
    records.sort();
    Ok(records)
}

/// New keys as instances have them, in order.
fn new_keys() -> Vec<String> {
    let mut keys: Vec<_> =
        (0..BATCH).map(|_| format!("bench/instances/{}", InstanceId::generate())).collect();
    keys.sort();
    keys
}

struct Client {
    store: SharedStore,
    index: usize,
    until: Instant,
    value: bytes::Bytes,
    leases: Vec<LeaseId>,
    records: Vec<Record>,
}

impl Client {
    async fn run(mut self, shape: Shape) -> anyhow::Result<Vec<Duration>> {
        let mut latencies = Vec::new();
        while Instant::now() < self.until {
            let count = latencies.len();
            let started = Instant::now();
            match shape {
                Shape::Puts(_) => {
                    let key = format!("bench/{}/{}", self.index, count % KEYS);
                    self.store.put(key, self.value.clone()).await?;
                }
                Shape::Create => self.create().await?,
                Shape::Batch => {
                    let then = new_keys().into_iter().map(|key| Op::put(key, self.value.clone())).collect();
                    self.commit(Txn { then, ..Txn::default() }).await?;
                }
                Shape::Rebind => self.rebind(count).await?,
                Shape::KeepAlive => {
                    let lease = self.leases[count % self.leases.len()];
                    self.store.lease_keep_alive(lease).await.context("renewing")?;
                }
            }
            latencies.push(started.elapsed());
        }
        Ok(latencies)
    }

    async fn create(&self) -> anyhow::Result<()> {
        let id = InstanceId::generate();
        let name = format!("bench/names/default/instance/{id}");
        let txn = Txn {
            compares: vec![Compare::Absent(name.clone().into())],
            then: vec![
                Op::put(format!("bench/instances/{id}"), self.value.clone()),
                Op::put(name, self.value.clone()),
            ],
            otherwise_get: Vec::new(),
        };
        self.commit(txn).await?;
        Ok(())
    }

    async fn rebind(&mut self, count: usize) -> anyhow::Result<()> {
        const { assert!(BATCH <= MAX_TXN_OPS) };
        let first = count * BATCH % self.records.len();
        let chosen = first..first + BATCH;
        let part = &self.records[chosen.clone()];
        let txn = Txn {
            compares: part.iter().map(|(key, at)| Compare::ModRevision(key.clone().into(), *at)).collect(),
            then: part.iter().map(|(key, _)| Op::put(key.clone(), self.value.clone())).collect(),
            otherwise_get: Vec::new(),
        };
        let at = self.commit(txn).await?;
        for record in &mut self.records[chosen] {
            record.1 = at;
        }
        Ok(())
    }

    async fn commit(&self, txn: Txn) -> anyhow::Result<Revision> {
        match self.store.txn(txn).await? {
            TxnOutcome::Committed(at) => Ok(at),
            TxnOutcome::Refused(_) => bail!("a transaction of the bench was refused"),
        }
    }
}
