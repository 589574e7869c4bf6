//! The fake driver of a node, watched: after each call the truth is read from what the driver keeps.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use hv_driver::{
    Console, Display, Driver, DriverError, DriverEvent, Exec, ExecRequest, FenceTarget, Fingerprint, Handle,
    InstanceConfig, LogRequest, Observed, Result, Stats, StopMode,
};
use hv_driver_fake::{FakeDriver, Phase, read_record};
use hv_types::{ImageInfo, InstanceId, InstanceType};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::history::History;
use super::host::Life;

/// What really is on the nodes.
#[derive(Default)]
pub(crate) struct Truth {
    /// On which nodes an instance runs (or stands still in memory).
    pub(crate) runs: BTreeMap<InstanceId, BTreeSet<usize>>,
    /// On which nodes something of it is.
    pub(crate) exists: BTreeMap<InstanceId, BTreeSet<usize>>,
    /// On which nodes it was ever started.
    pub(crate) started: BTreeSet<(usize, InstanceId)>,
    /// What came (true) and went (false) since the last look.
    pub(crate) news: Vec<(usize, InstanceId, bool)>,
}

impl Truth {
    pub(crate) fn runs_on(&self, id: &InstanceId, node: usize) -> bool {
        self.runs.get(id).is_some_and(|nodes| nodes.contains(&node))
    }
}

/// How a driver misbehaves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Moods {
    /// Each call takes up to so many milliseconds.
    pub(crate) delay_ms: u64,
    /// How likely a call fails.
    pub(crate) fails: f64,
    /// How likely a call does its work and reports a failure.
    pub(crate) fails_late: f64,
    /// How likely a call never returns.
    pub(crate) hangs: f64,
}

/// A node's machines, which outlive its agent.
#[derive(Clone)]
pub(crate) struct Machines {
    pub(crate) node: usize,
    pub(crate) dir: PathBuf,
    pub(crate) truth: Arc<Mutex<Truth>>,
    pub(crate) history: History,
    pub(crate) moods: Arc<Mutex<Moods>>,
}

impl Machines {
    fn is_fenced(&self, id: &InstanceId) -> bool {
        self.dir.join(format!("{id}.fenced")).exists()
    }

    /// Looks for what was fenced.
    pub(crate) fn look_for_fenced(&self) {
        let runs: Vec<_> = {
            let truth = self.truth.lock();
            truth.runs.iter().filter(|(_, on)| on.contains(&self.node)).map(|(id, _)| id.clone()).collect()
        };
        runs.iter().filter(|id| self.is_fenced(id)).for_each(|id| self.refresh(id));
    }

    /// Reads what there is of an instance now.
    pub(crate) fn refresh(&self, id: &InstanceId) {
        let phase = read_record(&self.dir, id).ok().flatten().map(|record| record.phase);
        let is_fenced = self.is_fenced(id);
        let runs = matches!(phase, Some(Phase::Running { .. } | Phase::Paused { .. })) && !is_fenced;
        let mut truth = self.truth.lock();
        let there = truth.exists.entry(id.clone()).or_default();
        let changed = if phase.is_some() { there.insert(self.node) } else { there.remove(&self.node) };
        if changed {
            truth.news.push((self.node, id.clone(), phase.is_some()));
        }
        let on = truth.runs.entry(id.clone()).or_default();
        let turned = if runs { on.insert(self.node) } else { on.remove(&self.node) };
        let several = on.len() > 1;
        let nodes = format!("{on:?}");
        if runs {
            truth.started.insert((self.node, id.clone()));
        }
        drop(truth);
        if changed || turned {
            let what = if is_fenced { "fenced" } else { shown(phase.as_ref()) };
            self.history.note(format_args!("node {} has {id}: {what}", self.node));
        }
        if several {
            self.history.violation(1, format_args!("instance {id} runs on the nodes {nodes}"));
        }
    }
}

fn shown(phase: Option<&Phase>) -> &'static str {
    match phase {
        None => "nothing",
        Some(Phase::Creating) => "half created",
        Some(Phase::Stopped(_)) => "stopped",
        Some(Phase::Running { .. }) => "running",
        Some(Phase::Paused { .. }) => "paused",
    }
}

/// The driver that an agent gets.
pub(crate) struct SimDriver {
    pub(crate) inner: Arc<FakeDriver>,
    machines: Machines,
    life: Arc<Life>,
    rng: Mutex<StdRng>,
}

impl SimDriver {
    pub(crate) fn new(inner: Arc<FakeDriver>, machines: Machines, life: Arc<Life>, seed: u64) -> Self {
        Self { inner, machines, life, rng: Mutex::new(StdRng::seed_from_u64(seed)) }
    }

    async fn before(&self, id: &InstanceId, operation: &'static str) -> Result<bool> {
        let moods = self.machines.moods.lock().clone();
        let (delay, fails, late, hangs) = {
            let mut rng = self.rng.lock();
            (
                rng.random_range(0..=moods.delay_ms),
                rng.random_bool(moods.fails),
                rng.random_bool(moods.fails_late),
                rng.random_bool(moods.hangs),
            )
        };
        if hangs || self.life.is_dead() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_millis(delay)).await;
        if fails {
            return Err(DriverError::failed(id, operation, "a mishap of the simulation"));
        }
        Ok(late)
    }

    fn after<T>(
        &self,
        id: &InstanceId,
        operation: &'static str,
        late: bool,
        outcome: Result<T>,
    ) -> Result<T> {
        self.machines.refresh(id);
        match outcome {
            Ok(_) if late => Err(DriverError::failed(id, operation, "done, and reported as failed")),
            outcome => outcome,
        }
    }
}

macro_rules! watched {
    ($self:ident, $id:expr, $name:literal, $call:expr) => {{
        let late = $self.before($id, $name).await?;
        let outcome = $call.await;
        $self.after($id, $name, late, outcome)
    }};
}

#[async_trait]
impl Driver for SimDriver {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn instance_type(&self) -> InstanceType {
        self.inner.instance_type()
    }
    async fn fingerprint(&self) -> Fingerprint {
        self.inner.fingerprint().await
    }
    async fn images(&self) -> Result<Vec<ImageInfo>> {
        self.inner.images().await
    }
    async fn create(&self, config: &InstanceConfig) -> Result<Handle> {
        watched!(self, &config.id, "create", self.inner.create(config))
    }
    async fn start(&self, id: &InstanceId) -> Result<Handle> {
        watched!(self, id, "start", self.inner.start(id))
    }
    async fn stop(&self, id: &InstanceId, mode: StopMode) -> Result<()> {
        watched!(self, id, "stop", self.inner.stop(id, mode))
    }
    async fn pause(&self, id: &InstanceId) -> Result<()> {
        watched!(self, id, "pause", self.inner.pause(id))
    }
    async fn resume(&self, id: &InstanceId) -> Result<()> {
        watched!(self, id, "resume", self.inner.resume(id))
    }
    async fn delete(&self, id: &InstanceId) -> Result<()> {
        watched!(self, id, "delete", self.inner.delete(id))
    }
    async fn recover(&self, id: &InstanceId, handle: Option<&Handle>) -> Result<Observed> {
        self.inner.recover(id, handle).await
    }
    async fn observe(&self, id: &InstanceId) -> Result<Observed> {
        self.inner.observe(id).await
    }
    fn fence_target(&self, id: &InstanceId) -> Option<FenceTarget> {
        self.inner.fence_target(id)
    }
    async fn list(&self) -> Result<Vec<InstanceId>> {
        self.inner.list().await
    }
    fn events(&self) -> BoxStream<'static, DriverEvent> {
        self.inner.events()
    }
    async fn stats(&self, id: &InstanceId) -> Result<Stats> {
        self.inner.stats(id).await
    }
    async fn console(&self, id: &InstanceId) -> Result<Console> {
        self.inner.console(id).await
    }
    async fn exec(&self, id: &InstanceId, request: ExecRequest) -> Result<Exec> {
        self.inner.exec(id, request).await
    }
    async fn logs(&self, id: &InstanceId, request: LogRequest) -> Result<BoxStream<'static, Result<Bytes>>> {
        self.inner.logs(id, request).await
    }
    async fn display(&self, id: &InstanceId) -> Result<Display> {
        self.inner.display(id).await
    }
}
