//! The instances of this node: one worker each, found by id.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use hv_driver::{Driver, InstanceConfig};
use hv_telemetry::Shutdown;
use hv_types::instance::{self, StopOptions};
use hv_types::{Epoch, ErrorCode, InstanceId, InstanceState, InstanceType, ServiceError};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

use crate::context::Context;
use crate::entry::{Entry, Order, Origin};
use crate::view::{Shown, View};
use crate::worker::{
    Answered, Asked, Command, Refusal, SnapshotOrder, SnapshotWish, Snapshots, Wish, Worker,
};

/// Commands that wait for one worker.
const COMMAND_QUEUE: usize = 32;
/// How long to wait before trying again where a worker's queue is full.
const FULL_PAUSE: Duration = Duration::from_millis(20);
/// Most instances of one node.
const MAX_INSTANCES: usize = 16_384;

struct Known {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<Arc<View>>,
}

/// The instances of this node.
pub(crate) struct Instances {
    context: Arc<Context>,
    shutdown: Shutdown,
    known: Mutex<HashMap<InstanceId, Known>>,
    /// Held while drivers are asked what they have.
    search: tokio::sync::Mutex<()>,
}

impl Instances {
    /// For tasks that must end before the agent does.
    pub(crate) fn shutdown(&self) -> &Shutdown {
        &self.shutdown
    }

    /// None yet.
    pub(crate) fn new(context: Arc<Context>, shutdown: Shutdown) -> Arc<Self> {
        Arc::new(Self { context, shutdown, known: Mutex::default(), search: tokio::sync::Mutex::default() })
    }

    /// What every task shares.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Starts the worker of an entry that is in the journal or need not be, unless there is one.
    pub(crate) fn adopt(self: &Arc<Self>, entry: Entry) {
        self.known.lock().entry(entry.id().clone()).or_insert_with(|| self.spawn(entry, false, 0));
    }

    fn spawn(self: &Arc<Self>, entry: Entry, unsaved: bool, named: u64) -> Known {
        let (commands, queue) = mpsc::channel(COMMAND_QUEUE);
        let state = if entry.created { InstanceState::Unknown } else { InstanceState::Creating };
        let shown = Shown { state, reason: "", seen: None, is_over: false };
        let view = View::of(&entry, &shown, &self.context.node_id);
        let (sender, receiver) = watch::channel(Arc::new(View { is_settled: false, ..view }));
        let name = format!("instance {}", entry.id());
        let worker =
            Worker::new(Arc::clone(self), entry, queue, sender, self.shutdown.token(), unsaved, named);
        self.shutdown.spawn(name, Box::pin(worker.run()));
        Known { commands, view: receiver }
    }

    /// A worker is about to end. False if a command came in between.
    pub(crate) fn retire(&self, id: &InstanceId, queue: &mpsc::Receiver<Command>) -> bool {
        let mut known = self.known.lock();
        let is_idle = queue.is_empty();
        if is_idle {
            known.remove(id);
        }
        is_idle
    }

    /// Hands a command to a worker; where there is none, to that of the entry that `missing` makes. False: there is
    /// none, and none was made.
    async fn deliver(
        self: &Arc<Self>,
        id: &InstanceId,
        mut command: Command,
        missing: impl Fn(&Command) -> Option<(Entry, u64)>,
    ) -> bool {
        loop {
            {
                let mut known = self.known.lock();
                let Some(worker) = known.get(id) else {
                    let Some((entry, named)) = missing(&command) else { return false };
                    let worker = self.spawn(entry, true, named);
                    known.insert(id.clone(), worker);
                    return true;
                };
                match worker.commands.try_send(command) {
                    Ok(()) => return true,
                    Err(mpsc::error::TrySendError::Full(back)) => command = back,
                    Err(mpsc::error::TrySendError::Closed(back)) => {
                        command = back;
                        known.remove(id);
                        continue;
                    }
                }
            }
            if self.shutdown.token().is_cancelled() {
                return false;
            }
            // The worker empties its queue even while its driver hangs; only a slow disk lets it fill up.
            tokio::time::sleep(FULL_PAUSE).await;
        }
    }

    /// The control plane wants something of an instance, and said so in this session. A new one's worker saves it
    /// before it acts.
    pub(crate) async fn order(self: &Arc<Self>, order: Order, session: u64) {
        let id = order.config.id.clone();
        self.deliver(&id, Command::Order(Box::new(order), session), |command| match command {
            Command::Order(order, session) => Some((Entry::assigned((**order).clone()), *session)),
            _ => None,
        })
        .await;
    }

    /// Makes room for an instance that another node is about to hand over, unless it is here already.
    pub(crate) fn expect(self: &Arc<Self>, entry: Entry) {
        let id = entry.id().clone();
        self.known.lock().entry(id).or_insert_with(|| self.spawn(entry, true, 0));
    }

    /// Has an instance's worker do something about a migration; what the driver says of its target.
    ///
    /// # Errors
    /// There is no such instance, or it cannot be.
    pub(crate) async fn migrate(
        self: &Arc<Self>,
        id: &InstanceId,
        wish: Wish,
    ) -> Result<Answered, ServiceError> {
        let (answer, answered) = oneshot::channel();
        let command = Command::Migration(Box::new(Asked { wish, answer }));
        if !self.deliver(id, command, |_| None).await {
            self.follow(id)?;
        }
        answered.await.unwrap_or_else(|_| {
            Err(ServiceError::unavailable(format!(
                "instance {id} went away, or the agent is stopping; try again"
            )))
        })
    }

    /// The control plane told the node to forget an instance. One that only a driver knows is removed as well.
    pub(crate) async fn release(self: &Arc<Self>, id: &InstanceId, epoch: Option<Epoch>) {
        if !self.deliver(id, Command::Release(epoch), |_| None).await {
            tracing::debug!(instance = %id, "released, and not here");
        }
    }

    /// The control plane knows that nothing is left.
    pub(crate) async fn gone_is_known(self: &Arc<Self>, id: &InstanceId, epoch: Epoch, generation: u64) {
        self.deliver(id, Command::GoneKnown(epoch, generation), |_| None).await;
    }

    /// A driver says that something changed.
    pub(crate) fn look(&self, id: &InstanceId) {
        if let Some(known) = self.known.lock().get(id) {
            // A full queue wakes the worker anyway.
            let _ = known.commands.try_send(Command::Look);
        }
    }

    /// Every instance with a record is reported again: the control plane may have missed something, and it is to
    /// decide about those that are not in its full set.
    pub(crate) async fn report_all(self: &Arc<Self>) {
        self.report(|view| view.origin != Origin::Found).await;
    }

    /// What was found without a record is reported too, now that the control plane has named what it knows.
    pub(crate) async fn report_found(self: &Arc<Self>) {
        self.report(|view| view.origin == Origin::Found).await;
    }

    async fn report(self: &Arc<Self>, which: impl Fn(&View) -> bool) {
        let chosen = |(id, known): (&InstanceId, &Known)| which(&known.view.borrow()).then(|| id.clone());
        let ids: Vec<InstanceId> = self.known.lock().iter().filter_map(chosen).collect();
        for id in ids {
            self.deliver(&id, Command::Report, |_| None).await;
        }
    }

    /// Takes up what drivers have and the journal does not know. What a damaged journal may know is left alone.
    pub(crate) async fn find(self: &Arc<Self>) {
        let Ok(_alone) = self.search.try_lock() else { return };
        let searches = self.context.drivers.all().iter().map(|driver| self.find_in(Arc::clone(driver)));
        futures::future::join_all(searches).await;
    }

    async fn find_in(self: &Arc<Self>, driver: Arc<dyn Driver>) {
        let name = driver.name();
        let ids = match tokio::time::timeout(self.context.tuning.look_deadline, driver.list()).await {
            Ok(Ok(ids)) => ids,
            Ok(Err(error)) => {
                let error = hv_telemetry::error_chain(&error);
                tracing::warn!(driver = name, error, "the driver cannot list its instances");
                return;
            }
            Err(_) => {
                tracing::warn!(driver = name, "the driver does not list its instances in time");
                return;
            }
        };
        let known: BTreeSet<InstanceId> = self.known.lock().keys().cloned().collect();
        for id in ids.into_iter().filter(|id| !known.contains(id)) {
            if let Some(why) = self.context.damaged.get(&id) {
                tracing::warn!(instance = %id, driver = name, why, "left alone: its journal is damaged");
                continue;
            }
            tracing::warn!(instance = %id, driver = name, "found without a record");
            self.adopt(Entry::found(id, driver.instance_type(), name));
        }
    }

    /// What is shown of every instance, by id.
    pub(crate) fn views(&self) -> Vec<Arc<View>> {
        let known = self.known.lock();
        let mut views: Vec<_> = known.values().map(|known| known.view.borrow().clone()).collect();
        views.sort_by(|a, b| a.record.id.cmp(&b.record.id));
        views
    }

    /// Follows what is shown of an instance.
    ///
    /// # Errors
    /// There is no such instance.
    pub(crate) fn follow(&self, id: &InstanceId) -> Result<watch::Receiver<Arc<View>>, ServiceError> {
        let known = self.known.lock();
        known.get(id).map(|known| known.view.clone()).ok_or_else(|| {
            ServiceError::not_found(format!(
                "instance {id} is not on this node; see `hypervisor-ctl instance list`"
            ))
        })
    }

    /// Makes an instance that only this node knows.
    ///
    /// # Errors
    /// The id or the name is taken, or the node has as many instances as it can.
    pub(crate) fn create_local(
        self: &Arc<Self>,
        config: InstanceConfig,
        instance_type: InstanceType,
    ) -> Result<watch::Receiver<Arc<View>>, ServiceError> {
        let mut known = self.known.lock();
        let taken = |what: String| Err(ServiceError::new(ErrorCode::AlreadyExists, what));
        if known.contains_key(&config.id) {
            return taken(format!("instance {} exists on this node already", config.id));
        }
        if known.values().any(|known| known.view.borrow().record.name == config.name) {
            return taken(format!("an instance named {} exists on this node already", config.name));
        }
        if known.len() >= MAX_INSTANCES {
            let text = format!("this node has {MAX_INSTANCES} instances already; delete some");
            return Err(ServiceError::new(ErrorCode::ResourceExhausted, text));
        }
        let id = config.id.clone();
        let worker = self.spawn(Entry::local(config, instance_type), true, 0);
        let view = worker.view.clone();
        known.insert(id, worker);
        Ok(view)
    }

    /// Does something with the snapshots of an instance, when nothing else is done with it.
    ///
    /// # Errors
    /// There is no such instance, its state does not allow it, or the driver refuses it.
    pub(crate) async fn snapshots(
        self: &Arc<Self>,
        id: &InstanceId,
        epoch: Option<Epoch>,
        wish: SnapshotWish,
    ) -> Result<Snapshots, Refusal> {
        let (answer, answered) = oneshot::channel();
        let order = Box::new(SnapshotOrder { wish, epoch, answer });
        if !self.deliver(id, Command::Snapshot(order), |_| None).await {
            self.follow(id).map_err(Refusal::Agent)?;
        }
        answered.await.unwrap_or_else(|_| {
            let text = format!("instance {id} went away, or the agent is stopping; try again");
            Err(Refusal::Agent(ServiceError::unavailable(text)))
        })
    }

    /// A user of this node wants something of an instance. Answers when it is remembered, with its serial number.
    ///
    /// # Errors
    /// There is no such instance, or its state does not allow it.
    pub(crate) async fn want(
        self: &Arc<Self>,
        id: &InstanceId,
        request: instance::Request,
        stop: StopOptions,
    ) -> Result<u64, ServiceError> {
        let (answer, answered) = oneshot::channel();
        if !self.deliver(id, Command::Local(request, stop, answer), |_| None).await {
            self.follow(id)?;
        }
        answered.await.unwrap_or_else(|_| {
            Err(ServiceError::unavailable(format!(
                "instance {id} went away, or the agent is stopping; try again"
            )))
        })
    }
}
