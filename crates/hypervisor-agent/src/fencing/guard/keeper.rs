//! The task behind the guard: it alone talks to the fencer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hv_driver::FenceTarget;
use hv_driver::fence::{self, Outcome, Zeal};
use hv_proto::v1::FencingStatus;
use hv_types::InstanceId;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Gate, Lease, Renewal, Request, Shared, WAITS};
use crate::backoff::Backoff;
use crate::fencing::core::{Action, Message, Reply, Standing};
use crate::fencing::marks::Marks;
use crate::fencing::{DIRECTORY, LOCK, Link};

/// Longest time between two looks at the clock: timers stand still while the machine is suspended, the clock does not.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// First pause before a fencer that died is replaced once more.
const REOPEN_BASE: Duration = Duration::from_millis(50);
/// Longest such pause.
const REOPEN_MAX: Duration = Duration::from_secs(2);
/// How often what an earlier agent left is tried to be killed at the start; then it goes on beside other work.
const LEFTOVER_TRIES: usize = 5;

/// The guard's task.
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    requests: mpsc::Receiver<Request>,
    gate: watch::Sender<Gate>,
    status: watch::Sender<FencingStatus>,
    link: Option<Box<dyn Link>>,
    opening: Option<BoxFuture<'static, Opened>>,
    backoff: Backoff,
    agent: String,
    /// Why there is no link; or what the fencer says of itself.
    message: String,
    session: u64,
    sessions: u64,
    held: bool,
    /// The control plane says that failover is held; this node does not say any more that it fences.
    yields: bool,
    /// What runs and is to be watched as soon as a lease lives.
    unwatched: BTreeMap<InstanceId, FenceTarget>,
    marks: Marks,
    boot_id: String,
    /// What the control plane may believe, as it is on disk; `None`: nothing was written yet.
    believed: Option<bool>,
}

type Opened = Result<(Box<dyn Link>, Standing), String>;

impl Keeper {
    /// Finds the fencer or starts one, and sees to what an earlier agent left.
    pub(super) async fn begin(
        shared: Arc<Shared>,
        requests: mpsc::Receiver<Request>,
        gate: watch::Sender<Gate>,
        status: watch::Sender<FencingStatus>,
        state_dir: &Path,
        leftovers: Vec<(InstanceId, FenceTarget)>,
    ) -> Self {
        let marks = Marks::of(state_dir);
        let boot_id = shared.machine.boot_id();
        let is_believed = marks.is_believed(&boot_id);
        let mut keeper = Self {
            shared,
            requests,
            gate,
            status,
            link: None,
            opening: None,
            backoff: Backoff::new(REOPEN_BASE, REOPEN_MAX),
            agent: format!("{}-{:08x}", std::process::id(), rand::random::<u32>()),
            message: "no fencer: it is switched off (agent.fencing.enabled), or this system has none".into(),
            session: 0,
            sessions: 0,
            held: false,
            yields: false,
            unwatched: BTreeMap::new(),
            marks,
            boot_id,
            believed: is_believed.then_some(true),
        };
        keeper.take_over(leftovers, is_believed).await;
        if keeper.shared.port.is_none() && is_believed {
            keeper.end_fencer(state_dir.join(DIRECTORY).join(LOCK)).await;
        }
        keeper.show();
        keeper
    }

    /// Fencing was switched off, and what an earlier agent's fencer watched is stopped: that fencer must not act any
    /// more on what is started from now on.
    async fn end_fencer(&mut self, lock: PathBuf) {
        let target = FenceTarget::LockHolder { path: lock };
        let ended = self.shared.machine.block_on(move || fence::kill(&target, Zeal::Instance)).await;
        tracing::info!(outcome = ?ended, "fencing is switched off, the fencer is ended");
    }

    /// Keeps watch until the agent stops.
    pub(crate) async fn run(mut self, stopping: CancellationToken) {
        stopping.clone().run_until_cancelled(self.keep()).await;
    }

    async fn keep(&mut self) {
        loop {
            self.act().await;
            self.show();
            if self.link.is_none() && self.opening.is_none() && self.shared.port.is_some() {
                self.opening = Some(self.open_after(self.backoff.clone().pause()));
                // Counted, so that the next pause is longer.
                let _ = self.backoff.pause();
            }
            let now = self.shared.clock.now();
            let wake = self.shared.mind.lock().next_wake();
            let pause = wake.map_or(LOOK_EVERY, |at| at.since(now).min(LOOK_EVERY));
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(request) => self.serve(request).await,
                    None => return,
                },
                opened = async {
                    match &mut self.opening {
                        Some(opening) => opening.await,
                        None => std::future::pending().await,
                    }
                } => {
                    self.opening = None;
                    match opened {
                        Ok((link, standing)) => self.hand_over(link, standing).await,
                        Err(error) => {
                            tracing::warn!(error, "there is no fencer");
                            self.message = error;
                        }
                    }
                }
                () = async {
                    match &mut self.link {
                        Some(link) => link.closed().await,
                        None => std::future::pending().await,
                    }
                } => self.lose("the fencer died and is started again"),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn open_after(&self, pause: Duration) -> BoxFuture<'static, Opened> {
        let (shared, agent) = (Arc::clone(&self.shared), self.agent.clone());
        Box::pin(async move {
            tokio::time::sleep(pause).await;
            match &shared.port {
                Some(port) => port.open(&agent).await,
                None => std::future::pending().await,
            }
        })
    }

    fn lose(&mut self, why: &str) {
        tracing::error!(
            why,
            "the fencer is lost: nothing that may run elsewhere is started until there is one"
        );
        metrics::counter!("hypervisor_agent_fencer_losses_total").increment(1);
        self.link = None;
        self.message = why.to_owned();
    }

    /// Tells the fencer something. `None`: it is lost.
    async fn tell(&mut self, message: Message) -> Option<Reply> {
        let told = self.link.as_mut()?.tell(message).await;
        match told {
            Ok(reply) => Some(reply),
            Err(why) => {
                self.lose(&why);
                None
            }
        }
    }

    /// At the start: what the fencer vouches for is left alone; what nobody vouches for is killed, if the control plane
    /// may have believed that it would be.
    async fn take_over(&mut self, leftovers: Vec<(InstanceId, FenceTarget)>, is_believed: bool) {
        let opened = match &self.shared.port {
            Some(port) => Some(port.open(&self.agent).await),
            None => None,
        };
        let standing = match opened {
            Some(Ok((link, standing))) => {
                self.link = Some(link);
                self.backoff.reset();
                self.message.clone_from(&standing.message);
                standing
            }
            Some(Err(error)) => {
                tracing::error!(error, "there is no fencer");
                self.message = error;
                Standing::default()
            }
            None => Standing::default(),
        };
        let now = self.shared.clock.now();
        self.held = standing.held;
        self.shared.mind.lock().hear(now, Message::Lease { until: standing.until, held: standing.held });
        let mut unvouched = Vec::new();
        for (id, target) in leftovers {
            if standing.watched.contains(&id) {
                let message = Message::Watch { id, target, starting: false };
                self.shared.mind.lock().hear(now, message);
            } else if is_believed && !standing.doomed.contains(&id) {
                unvouched.push((id, target));
            }
        }
        self.kill_leftovers(unvouched).await;
    }

    async fn kill_leftovers(&mut self, mut leftovers: Vec<(InstanceId, FenceTarget)>) {
        for _ in 0..LEFTOVER_TRIES {
            if leftovers.is_empty() {
                return;
            }
            let targets = std::mem::take(&mut leftovers);
            let tried = self.shared.machine.block_on(move || {
                let ran: Vec<_> = targets.iter().map(|(_, target)| fence::may_run(target)).collect();
                let all: Vec<_> = targets.iter().map(|(_, target)| (target, Zeal::Instance)).collect();
                let outcomes = fence::kill_all(&all);
                targets.into_iter().zip(ran).zip(outcomes).collect::<Vec<_>>()
            });
            for (((id, target), ran), outcome) in tried.await {
                if outcome != Outcome::Gone {
                    leftovers.push((id, target));
                } else if ran != Some(false) {
                    tracing::warn!(instance = %id, "no fencer vouches for it: it may run elsewhere, and was stopped");
                    self.shared.mark(&id);
                }
            }
        }
        // Without a lease the guard's own mind dooms them and goes on trying.
        let now = self.shared.clock.now();
        for (id, target) in leftovers {
            tracing::error!(instance = %id, "no fencer vouches for it, and it cannot be stopped; trying on");
            self.shared.mind.lock().hear(now, Message::Watch { id, target, starting: false });
        }
    }

    /// A new link: the fencer is told everything.
    async fn hand_over(&mut self, link: Box<dyn Link>, standing: Standing) {
        self.link = Some(link);
        self.message.clone_from(&standing.message);
        let (until, watched) = {
            let mind = self.shared.mind.lock();
            (mind.until(), mind.watched())
        };
        if self.tell(Message::Lease { until, held: self.held }).await.is_none() {
            return;
        }
        for (id, target, starting) in watched {
            let message = Message::Watch { id, target, starting };
            match self.tell(message).await {
                Some(Reply::Done | Reply::Standing(_)) => {}
                Some(Reply::Refused { reason }) => {
                    tracing::warn!(reason, "the fencer refused to watch an instance");
                }
                None => return,
            }
        }
        self.backoff.reset();
        tracing::info!(fencer = self.message, "the fencer knows everything");
    }

    async fn serve(&mut self, request: Request) {
        match request {
            Request::Renew { lease, answer } => {
                let session = self.renew(lease).await;
                self.show();
                // Whoever asked may be gone.
                let _ = answer.send(session);
            }
            Request::Start { id, target, answer } => {
                let allowed = self.start(id.clone(), target).await;
                if let Err(Ok(())) = answer.send(allowed) {
                    self.hear(Message::Settled { id }).await;
                }
            }
            Request::Guard { id, target } => {
                self.unwatched.insert(id, target);
                self.watch_all().await;
            }
            Request::Settled { id } => self.hear(Message::Settled { id }).await,
            Request::Forget { id } => {
                self.unwatched.remove(&id);
                self.hear(Message::Forget { id }).await;
            }
        }
    }

    /// Both minds hear it.
    async fn hear(&mut self, message: Message) {
        let now = self.shared.clock.now();
        self.shared.mind.lock().hear(now, message.clone());
        if let Some(Reply::Refused { reason }) = self.tell(message).await {
            tracing::debug!(reason, "the fencer refuses");
        }
    }

    async fn renew(&mut self, lease: Lease) -> Option<u64> {
        self.lapse();
        if let Renewal::Heartbeat(session) = lease.what
            && session != self.session
        {
            return None;
        }
        // That failover is held may be said by a server that has not yet heard of its end. So the control plane must
        // first have recorded that this node does not fence any more; only then it does not.
        self.yields = lease.held;
        let held = lease.held && (self.held || !lease.said_armed);
        if held && !self.held {
            tracing::warn!(
                "the operator holds failover: nothing is stopped when the control plane is out of reach"
            );
        }
        self.held = held;
        self.hear(Message::Lease { until: Some(lease.until), held }).await;
        let now = self.shared.clock.now();
        if self.shared.port.is_some() && !self.shared.mind.lock().is_alive(now) {
            self.lapse();
            return None;
        }
        if lease.what == Renewal::Registration {
            self.sessions += 1;
            self.session = self.sessions;
        }
        self.watch_all().await;
        if self.held || self.shared.port.is_none() {
            self.believe(false).await;
        } else if self.link.is_some() && !self.yields {
            self.believe(true).await;
        }
        Some(self.session)
    }

    /// Writes down what the control plane may believe from now on, before it is told so.
    async fn believe(&mut self, armed: bool) {
        if self.believed == Some(armed) || (self.believed.is_none() && !armed) {
            return;
        }
        let (marks, boot_id) = (self.marks.clone(), self.boot_id.clone());
        match self.shared.machine.block_on(move || marks.believe(&boot_id, armed)).await {
            Ok(()) => self.believed = Some(armed),
            Err(error) => {
                tracing::error!(%error, "what the control plane believes of the fencer cannot be written down");
                self.message = format!("the fencer's directory cannot be written: {error}");
            }
        }
    }

    async fn start(&mut self, id: InstanceId, target: FenceTarget) -> Result<(), String> {
        if self.shared.port.is_none() {
            return Ok(());
        }
        let now = self.shared.clock.now();
        let message = Message::Watch { id: id.clone(), target, starting: true };
        if let Reply::Refused { reason } = self.shared.mind.lock().hear(now, message.clone()) {
            return Err(format!("{WAITS} ({reason})"));
        }
        self.unwatched.remove(&id);
        let told = match self.tell(message).await {
            Some(Reply::Done | Reply::Standing(_)) => Ok(()),
            Some(Reply::Refused { reason }) => Err(format!("{WAITS} ({reason})")),
            None => Err(format!("waits for the fencer: {}", self.message)),
        };
        if told.is_err() {
            let now = self.shared.clock.now();
            self.shared.mind.lock().hear(now, Message::Settled { id });
        }
        told
    }

    /// What runs is watched from the moment that a lease lives; before, watching it would end it.
    async fn watch_all(&mut self) {
        let now = self.shared.clock.now();
        if self.shared.port.is_none() || !self.shared.mind.lock().is_alive(now) {
            return;
        }
        for (id, target) in std::mem::take(&mut self.unwatched) {
            self.hear(Message::Watch { id, target, starting: false }).await;
        }
    }

    /// Ends the session if its lease has.
    fn lapse(&mut self) {
        let now = self.shared.clock.now();
        let ended = self.shared.port.is_some() && !self.shared.mind.lock().is_alive(now);
        if ended && self.session != 0 {
            tracing::error!(
                "the control plane was out of reach for too long: what may be started elsewhere is stopped"
            );
            metrics::counter!("hypervisor_agent_lapses_total").increment(1);
            self.session = 0;
        }
    }

    /// Does itself what the fencer does too.
    async fn act(&mut self) {
        self.lapse();
        if self.session == 0 {
            // Before the killing: starts under way are given up meanwhile.
            self.show();
        }
        let now = self.shared.clock.now();
        let actions = self.shared.mind.lock().tick(now);
        let mut kills: Vec<_> = actions
            .into_iter()
            .filter_map(|action| match action {
                // Never with more zeal: whoever else holds on to an instance may be the fencer.
                Action::Kill { id, target, .. } => Some((id, target)),
                Action::EndAgent => None,
            })
            .collect();
        if kills.is_empty() {
            return;
        }
        let targets: Vec<_> = kills.iter().map(|(_, target)| target.clone()).collect();
        let killing = self.shared.machine.block_on(move || {
            let all: Vec<_> = targets.iter().map(|target| (target, Zeal::Instance)).collect();
            fence::kill_all(&all)
        });
        for ((id, _), outcome) in kills.drain(..).zip(killing.await) {
            let is_over = self.shared.mind.lock().tried(&id, &outcome);
            if is_over {
                tracing::warn!(instance = %id, "stopped: the control plane was out of reach");
                self.shared.mark(&id);
            } else {
                tracing::debug!(instance = %id, ?outcome, "being stopped");
            }
        }
    }

    /// Publishes whether instances may start, and what is told of this node.
    fn show(&self) {
        let is_off = self.shared.port.is_none();
        let is_linked = is_off || self.link.is_some();
        let open = match (self.session, is_linked) {
            (0, _) => Err(WAITS.to_owned()),
            (_, true) => Ok(()),
            (_, false) => Err(format!("waits for the fencer: {}", self.message)),
        };
        let gate = Gate { session: self.session, open };
        self.gate.send_if_modified(|old| {
            let differs = *old != gate;
            *old = gate;
            differs
        });
        let (armed, message) = match () {
            () if is_off => (false, self.message.clone()),
            () if self.held => (false, "failover of this node is held".to_owned()),
            () if self.yields => (false, "failover of this node is about to be held".to_owned()),
            () if self.link.is_none() => (false, self.message.clone()),
            // Told only once it is on disk that the control plane may believe it.
            () if self.believed != Some(true) => {
                (false, "the fencer waits for the node's first lease".to_owned())
            }
            () => (true, self.message.clone()),
        };
        let status = FencingStatus { armed, message };
        self.status.send_if_modified(|old| {
            let differs = *old != status;
            *old = status;
            differs
        });
        metrics::gauge!("hypervisor_agent_fencing_armed").set(f64::from(u8::from(armed)));
    }
}
