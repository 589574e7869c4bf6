//! One process's way to the simulated store: delays, refusals before and after the commit, stalls and cuts.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream;
use hv_store::bounds::{self, Interval};
use hv_store::{
    Change, Compare, Health, KeyRange, LeaseId, Op, RangeRequest, RangeResult, Result, Revision, Store,
    StoreError, Txn, TxnOutcome, WatchEvents, WatchStream,
};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::watch;

use super::core::Core;
use super::meddler;
use super::planted::{Bug, Planted};

/// How long a call waits for a store that does not answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often a call that waits looks again.
const LOOK: Duration = Duration::from_millis(100);

/// What is wrong with the way to the store.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trouble {
    /// Nothing gets through, in either direction.
    pub(crate) cut: bool,
    /// How long a call takes at most, in milliseconds.
    pub(crate) delay_ms: u64,
    /// How likely a call fails before it did something, and after.
    pub(crate) fails: (f64, f64),
    /// Counts how often watches were broken.
    pub(crate) breaks: u64,
}

struct Way {
    rng: StdRng,
    trouble: Trouble,
}

/// The store, as one process reaches it.
pub struct SimStore {
    core: Arc<Mutex<Core>>,
    revision: watch::Sender<u64>,
    way: Arc<Mutex<Way>>,
    planted: Planted,
}

/// What all processes share.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) core: Arc<Mutex<Core>>,
    pub(crate) revision: watch::Sender<u64>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self { core: Arc::new(Mutex::new(Core::new())), revision: watch::Sender::new(1) }
    }

    /// Moves the store's clock on.
    pub(crate) fn advance(&self, now: Duration) {
        let mut core = self.core.lock();
        if core.advance(now) {
            self.revision.send_replace(core.revision().0);
        }
    }
}

/// Sets what is wrong with one way.
#[derive(Clone)]
pub(crate) struct Valve(Arc<Mutex<Way>>);

impl Valve {
    pub(crate) fn change(&self, change: impl FnOnce(&mut Trouble)) {
        change(&mut self.0.lock().trouble);
    }
}

impl SimStore {
    /// A store of its own without faults, whose leases end by tokio's clock; must be made in a runtime.
    #[must_use]
    pub fn alone() -> Arc<Self> {
        let shared = Shared::new();
        let (store, _) = Self::new(&shared, 0, Planted::default());
        let begin = tokio::time::Instant::now();
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(20));
            while Arc::strong_count(&shared.core) > 1 {
                ticks.tick().await;
                shared.advance(begin.elapsed());
            }
        });
        Arc::new(store)
    }

    /// A way to the store, with its own sequence of mishaps.
    pub(crate) fn new(shared: &Shared, seed: u64, planted: Planted) -> (Self, Valve) {
        let way = Way { rng: StdRng::seed_from_u64(seed), trouble: Trouble::default() };
        let way = Arc::new(Mutex::new(way));
        let store =
            Self { core: shared.core.clone(), revision: shared.revision.clone(), way: way.clone(), planted };
        (store, Valve(way))
    }

    fn unavailable(why: &'static str) -> StoreError {
        StoreError::Unavailable { endpoint: "simulated".into(), source: why.into() }
    }

    /// Half of a call's way. `late`: it was done already.
    async fn travel(&self, late: bool) -> Result<()> {
        let mut waited = Duration::ZERO;
        while self.way.lock().trouble.cut {
            if waited >= PATIENCE {
                return Err(StoreError::Timeout { endpoint: "simulated".into(), timeout_ms: 3000 });
            }
            waited += LOOK;
            tokio::time::sleep(LOOK).await;
        }
        let (delay, fails) = {
            let mut way = self.way.lock();
            let (most, fails) = (way.trouble.delay_ms, way.trouble.fails);
            let likely = if late { fails.1 } else { fails.0 };
            let delay = if most == 0 { 0 } else { way.rng.random_range(0..=most) };
            (delay, likely > 0.0 && way.rng.random_bool(likely))
        };
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        if fails {
            return Err(Self::unavailable(if late { "the answer was lost" } else { "it was refused" }));
        }
        Ok(())
    }

    async fn call<T>(&self, work: impl FnOnce(&mut Core) -> Result<T>) -> Result<T> {
        self.travel(false).await?;
        let outcome = {
            let mut core = self.core.lock();
            let before = core.revision();
            let outcome = work(&mut core);
            if core.revision() != before {
                self.revision.send_replace(core.revision().0);
            }
            outcome
        };
        self.travel(true).await?;
        outcome
    }
}

#[async_trait]
impl Store for SimStore {
    async fn range(&self, request: RangeRequest) -> Result<RangeResult> {
        bounds::check_range(&request)?;
        self.call(|core| core.range(&request)).await
    }

    async fn txn(&self, mut txn: Txn) -> Result<TxnOutcome> {
        bounds::check_txn(&txn)?;
        if self.planted.is(Bug::NoLeaderGuard) {
            txn.compares.retain(|compare| !matches!(compare, Compare::CreateRevision(..)));
        }
        if self.planted.is(Bug::NoCompare) {
            txn.compares.retain(|compare| !matches!(compare, Compare::ModRevision(..)));
        }
        if self.planted.is(Bug::RequestKeyApart) {
            let is_request = |op: &Op| matches!(op, Op::Put { key, .. } if key.windows(10).any(|part| part == b"/requests/"));
            let (requests, others): (Vec<_>, Vec<_>) = txn.then.drain(..).partition(is_request);
            txn.then = others;
            let outcome = self.call(|core| core.txn(txn)).await?;
            if let TxnOutcome::Committed(_) = outcome
                && !requests.is_empty()
            {
                self.call(|core| core.txn(Txn { then: requests, ..Txn::default() })).await?;
            }
            return Ok(outcome);
        }
        if self.planted.is(Bug::DrainDropsBinding) {
            txn.then.iter_mut().for_each(meddler::drop_binding);
        }
        if self.planted.is(Bug::LostCommit) && !txn.then.is_empty() && self.way.lock().rng.random_bool(0.1) {
            return self.call(|core| Ok(TxnOutcome::Committed(core.revision()))).await;
        }
        self.call(|core| core.txn(txn)).await
    }

    async fn watch(&self, keys: KeyRange, from: Option<Revision>) -> Result<WatchStream> {
        bounds::check_watch(&keys)?;
        let interval = Interval::of(&keys);
        let from = self
            .call(|core| {
                let from = from.map_or(core.revision().0 + 1, |from| from.0);
                core.after(&interval, from)?;
                Ok(from)
            })
            .await?;
        let follower = Follower {
            core: self.core.clone(),
            way: self.way.clone(),
            revision: self.revision.subscribe(),
            interval,
            from,
            breaks: self.way.lock().trouble.breaks,
            late: Vec::new(),
            held: None,
            planted: self.planted.clone(),
        };
        Ok(Box::pin(stream::unfold(Some(follower), |follower| async move {
            let mut follower = follower?;
            match follower.next().await {
                Ok(events) => Some((Ok(events), Some(follower))),
                Err(error) => Some((Err(error), None)),
            }
        })))
    }

    async fn revision(&self) -> Result<Revision> {
        self.call(|core| Ok(core.revision())).await
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        let seconds = bounds::lease_seconds(ttl)?;
        self.call(|core| Ok(core.grant(Duration::from_secs(seconds)))).await
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.call(|core| core.renew(lease)).await
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<()> {
        self.call(|core| {
            core.end_lease(lease);
            Ok(())
        })
        .await
    }

    async fn compact(&self, revision: Revision) -> Result<()> {
        self.call(|core| core.compact(revision)).await
    }

    async fn health(&self) -> Result<Health> {
        self.call(|core| {
            Ok(Health {
                backend: "simulated",
                version: env!("CARGO_PKG_VERSION").into(),
                size_bytes: core.size_bytes(),
                revision: core.revision(),
                warnings: Vec::new(),
            })
        })
        .await
    }
}

struct Follower {
    core: Arc<Mutex<Core>>,
    way: Arc<Mutex<Way>>,
    revision: watch::Receiver<u64>,
    interval: Interval,
    from: u64,
    breaks: u64,
    /// Deletions held back by a planted bug.
    late: Vec<Change>,
    /// Changes whose revision was told already, by a planted bug.
    held: Option<WatchEvents>,
    planted: Planted,
}

impl Follower {
    async fn next(&mut self) -> Result<WatchEvents> {
        loop {
            let trouble = self.way.lock().trouble.clone();
            if trouble.breaks != self.breaks {
                return Err(SimStore::unavailable("the watch was cut"));
            }
            if trouble.cut {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            if let Some(held) = self.held.take() {
                tokio::time::sleep(LOOK).await;
                return Ok(held);
            }
            self.revision.borrow_and_update();
            let found = self.core.lock().after(&self.interval, self.from)?;
            if let Some(mut events) = found {
                if trouble.delay_ms > 0 {
                    let delay = self.way.lock().rng.random_range(0..=trouble.delay_ms);
                    tokio::time::sleep(Duration::from_millis(delay)).await;
                }
                self.from = events.revision.0 + 1;
                if self.planted.is(Bug::LateDelete) {
                    let (deletes, mut now): (Vec<_>, Vec<_>) =
                        events.changes.drain(..).partition(|change| matches!(change, Change::Deleted { .. }));
                    now.splice(0..0, std::mem::replace(&mut self.late, deletes));
                    events.changes = now;
                }
                if self.planted.is(Bug::EarlyProgress) && !events.changes.is_empty() {
                    let revision = events.revision;
                    self.held = Some(events);
                    return Ok(WatchEvents { revision, changes: Vec::new() });
                }
                return Ok(events);
            }
            if self.revision.changed().await.is_err() {
                return Err(StoreError::Closed);
            }
        }
    }
}
