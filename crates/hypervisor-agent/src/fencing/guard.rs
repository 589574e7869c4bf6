//! The agent's half of fencing: keeps the fencer informed, says what may start, and stops itself what must not run.
//!
//! # Theory of operation
//! One task owns the conversation with the fencer. Beside it the guard keeps a fencer's mind of its own, which hears
//! the same messages and kills at the same moment: if the fencer dies and cannot be brought back in time, the agent
//! does its work, and if the agent hangs the fencer does. Neither waits for the other.
//!
//! # Failure and recovery
//! A fencer that dies or hangs is replaced with growing pauses and told everything again; until then nothing that may
//! be started elsewhere is started, and the node says that it is not armed. After a start of the agent, what runs is
//! left alone where a fencer that lived on vouches for it. Where none does, and the control plane may have believed that
//! this node fences, it may run elsewhere by now: it is killed before anything else happens.

mod keeper;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use hv_driver::FenceTarget;
use hv_proto::v1::FencingStatus;
use hv_types::InstanceId;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

use super::clock::{Moment, SharedClock};
use super::core::FencerCore;
use super::{Fencers, Port, Seam};
use crate::context::Machine;

pub(crate) use keeper::Keeper;

/// Requests that wait for the guard.
const QUEUE: usize = 1024;
/// What people see of an instance that may not start yet.
pub(crate) const WAITS: &str = "waits for the control plane: it may have been started elsewhere";

/// Whether what may be started elsewhere may be started here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gate {
    /// The number of the registration whose lease lives; 0: none does.
    pub(crate) session: u64,
    /// `Err`: nothing may start, and why.
    pub(crate) open: Result<(), String>,
}

/// What renewed the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Renewal {
    /// A registration, which begins a session.
    Registration,
    /// A heartbeat of this session.
    Heartbeat(u64),
}

/// What an accepted answer of the control plane says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lease {
    /// What was answered.
    pub(crate) what: Renewal,
    /// Until when the lease lives at least.
    pub(crate) until: Moment,
    /// The operator holds failover.
    pub(crate) held: bool,
    /// The question said that this node fences.
    pub(crate) said_armed: bool,
}

enum Request {
    Renew { lease: Lease, answer: oneshot::Sender<Option<u64>> },
    Start { id: InstanceId, target: FenceTarget, answer: oneshot::Sender<Result<(), String>> },
    Guard { id: InstanceId, target: FenceTarget },
    Settled { id: InstanceId },
    Forget { id: InstanceId },
}

/// What the agent's parts ask the guard.
pub(crate) struct Guard {
    requests: mpsc::Sender<Request>,
    gate: watch::Receiver<Gate>,
    status: watch::Receiver<FencingStatus>,
    shared: Arc<Shared>,
    /// Those that the guard was told of.
    told: Mutex<BTreeSet<InstanceId>>,
}

struct Shared {
    clock: SharedClock,
    machine: Machine,
    mind: Mutex<FencerCore>,
    port: Option<Box<dyn Port>>,
}

impl Shared {
    fn mark(&self, id: &InstanceId) {
        if let Some(port) = &self.port {
            port.mark(id);
        }
    }
}

impl Guard {
    /// Finds the fencer or starts one, and sees to what an earlier agent left: `leftovers` are the instances that may
    /// have been started elsewhere meanwhile. Returns before any instance is touched otherwise.
    pub(crate) async fn begin(
        seam: &Seam,
        state_dir: &Path,
        machine: &Machine,
        leftovers: Vec<(InstanceId, FenceTarget)>,
    ) -> (Arc<Self>, Keeper) {
        let port: Option<Box<dyn Port>> = match &seam.fencers {
            Fencers::None => None,
            #[cfg(target_os = "linux")]
            Fencers::Process { program } => Some(Box::new(super::link::ProcessPort::new(program, state_dir))),
            #[cfg(not(target_os = "linux"))]
            Fencers::Process { .. } => None,
            Fencers::Local(fencer) => Some(Box::new(Arc::clone(fencer))),
        };
        let (sender, requests) = mpsc::channel(QUEUE);
        let closed = Gate { session: 0, open: Err(WAITS.to_owned()) };
        let (gate_sender, gate) = watch::channel(closed);
        let (status_sender, status) = watch::channel(FencingStatus::default());
        let shared = Arc::new(Shared {
            clock: Arc::clone(&seam.clock),
            machine: machine.clone(),
            mind: Mutex::default(),
            port,
        });
        let keeper =
            Keeper::begin(Arc::clone(&shared), requests, gate_sender, status_sender, state_dir, leftovers);
        let keeper = keeper.await;
        let told = Mutex::default();
        (Arc::new(Self { requests: sender, gate, status, shared, told }), keeper)
    }

    /// Follows whether instances may start.
    pub(crate) fn gate(&self) -> watch::Receiver<Gate> {
        self.gate.clone()
    }

    /// Whether anything is ever fenced here.
    pub(crate) fn is_on(&self) -> bool {
        self.shared.port.is_some()
    }

    /// Follows what is to be told of this node's fencing.
    pub(crate) fn status(&self) -> watch::Receiver<FencingStatus> {
        self.status.clone()
    }

    /// The time that deadlines count by.
    pub(crate) fn now(&self) -> Moment {
        self.shared.clock.now()
    }

    /// Whether an instance that the control plane named in this session may start.
    ///
    /// # Errors
    /// The text says why not.
    pub(crate) fn permits(&self, session: u64) -> Result<(), String> {
        let gate = self.gate.borrow();
        if gate.session == 0 || gate.session != session {
            return Err(WAITS.to_owned());
        }
        gate.open.clone()?;
        let alive = self.shared.port.is_none() || self.shared.mind.lock().is_alive(self.now());
        if alive { Ok(()) } else { Err(WAITS.to_owned()) }
    }

    /// The lease was renewed. The session's number; `None`: it has ended, and the node must register.
    pub(crate) async fn renewed(&self, lease: Lease) -> Option<u64> {
        let (answer, answered) = oneshot::channel();
        self.requests.send(Request::Renew { lease, answer }).await.ok()?;
        answered.await.ok()?
    }

    /// An instance is about to be started; [`Guard::settled`] must follow.
    ///
    /// # Errors
    /// It must not be. The text says why.
    pub(crate) async fn starting(&self, id: &InstanceId, target: FenceTarget) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        let stopping = || "the agent is stopping".to_owned();
        self.told.lock().insert(id.clone());
        let request = Request::Start { id: id.clone(), target, answer };
        self.requests.send(request).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())?
    }

    /// The start is over, whatever became of it.
    pub(crate) async fn settled(&self, id: &InstanceId) {
        // Without a keeper the agent is stopping.
        let _ = self.requests.send(Request::Settled { id: id.clone() }).await;
    }

    /// An instance runs and must be stopped if the lease ends. Cheap where that is known.
    pub(crate) async fn guard(&self, id: &InstanceId, target: FenceTarget) {
        if self.told.lock().insert(id.clone()) {
            let _ = self.requests.send(Request::Guard { id: id.clone(), target }).await;
        }
    }

    /// An instance does not run, or may run whatever happens. Cheap where that is known.
    pub(crate) async fn forget(&self, id: &InstanceId) {
        if self.told.lock().remove(id) {
            let _ = self.requests.send(Request::Forget { id: id.clone() }).await;
        }
    }

    /// Whether an instance that does not run was, or is being, stopped because the lease had ended.
    pub(crate) fn was_fenced(&self, id: &InstanceId) -> bool {
        let Some(port) = &self.shared.port else { return false };
        if port.is_marked(id) {
            return true;
        }
        let mut mind = self.shared.mind.lock();
        mind.doom(self.now());
        mind.is_doomed(id)
    }

    /// That it was fenced is remembered elsewhere.
    pub(crate) fn note_fenced(&self, id: &InstanceId) {
        if let Some(port) = &self.shared.port {
            port.unmark(id);
        }
    }
}
