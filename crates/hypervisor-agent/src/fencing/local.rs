//! A fencer as a task: for tests and simulations, with the logic of the real one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hv_driver::fence;
use hv_types::InstanceId;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::clock::SharedClock;
use super::core::{Action, FencerCore, Message, PROTOCOL, Reply, Standing};
use super::{Link, Port};

/// Longest time between two looks at the clock, which a test may wind.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A fencer that lives as long as the value, whatever becomes of the agent.
pub struct LocalFencer {
    clock: SharedClock,
    core: Mutex<FencerCore>,
    marked: Mutex<BTreeSet<InstanceId>>,
    wake: Notify,
    /// Raised with every death; links of an earlier life are closed.
    life: watch::Sender<u64>,
    frozen: watch::Sender<bool>,
    end_agent: Box<dyn Fn() + Send + Sync>,
}

impl LocalFencer {
    /// A fencer; `end_agent` kills the agent's process, or what stands for it, before it returns.
    pub fn new(clock: SharedClock, end_agent: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            clock,
            core: Mutex::default(),
            marked: Mutex::default(),
            wake: Notify::new(),
            life: watch::channel(0).0,
            frozen: watch::channel(false).0,
            end_agent: Box::new(end_agent),
        })
    }

    /// Does its work, for ever; on a runtime that outlives the agent's.
    pub async fn run(self: Arc<Self>) {
        loop {
            let mut frozen = self.frozen.subscribe();
            // The sender lives as long as `self`.
            let _ = frozen.wait_for(|frozen| !frozen).await;
            let now = self.clock.now();
            let actions = self.core.lock().tick(now);
            self.act(actions);
            let wake = self.core.lock().next_wake();
            let pause = wake.map_or(LOOK_EVERY, |at| at.since(self.clock.now()).min(LOOK_EVERY));
            let _ = tokio::time::timeout(pause, self.wake.notified()).await;
        }
    }

    fn act(&self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Kill { id, target, zeal } => {
                    let outcome = fence::kill(&target, zeal);
                    if self.core.lock().tried(&id, &outcome) {
                        self.marked.lock().insert(id);
                    }
                }
                Action::EndAgent => {
                    (self.end_agent)();
                    self.core.lock().agent_ended();
                }
            }
        }
    }

    /// It dies and forgets everything; the agent finds a new one.
    pub fn crash(&self) {
        *self.core.lock() = FencerCore::new();
        self.life.send_modify(|life| *life += 1);
    }

    /// It stands still, or goes on.
    pub fn freeze(&self, frozen: bool) {
        self.frozen.send_replace(frozen);
        self.wake.notify_one();
    }

    /// What it knows.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.core.lock().standing()
    }
}

/// A link to a local fencer.
struct LocalLink {
    fencer: Arc<LocalFencer>,
    life: watch::Receiver<u64>,
    began: u64,
}

#[async_trait]
impl Link for LocalLink {
    async fn tell(&mut self, message: Message) -> Result<Reply, String> {
        if *self.life.borrow() != self.began {
            return Err("the fencer died".into());
        }
        if *self.fencer.frozen.borrow() {
            return Err("the fencer does not answer".into());
        }
        let reply = self.fencer.core.lock().hear(self.fencer.clock.now(), message);
        self.fencer.wake.notify_one();
        Ok(reply)
    }

    async fn closed(&mut self) {
        let began = self.began;
        // The sender lives as long as the fencer, which this link holds.
        let _ = self.life.wait_for(|life| *life != began).await;
    }
}

#[async_trait]
impl Port for Arc<LocalFencer> {
    async fn open(&self, agent: &str) -> Result<(Box<dyn Link>, Standing), String> {
        let life = self.life.subscribe();
        let began = *life.borrow();
        let mut link = LocalLink { fencer: Arc::clone(self), life, began };
        match link.tell(Message::Hello { protocol: PROTOCOL, agent: agent.to_owned() }).await? {
            Reply::Standing(standing) => Ok((Box::new(link), standing)),
            Reply::Done | Reply::Refused { .. } => Err("the fencer gave no account of itself".into()),
        }
    }

    fn is_marked(&self, id: &InstanceId) -> bool {
        self.marked.lock().contains(id)
    }

    fn mark(&self, id: &InstanceId) {
        self.marked.lock().insert(id.clone());
    }

    fn unmark(&self, id: &InstanceId) {
        self.marked.lock().remove(id);
    }
}
