//! What the worker of an instance does so that it never runs here while it may run elsewhere.

use std::sync::Arc;

use hv_driver::{Driver, Exit, Observed};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Worker;
use crate::entry::Origin;
use crate::fencing::Gate;
use crate::plan::Step;

/// What people see where it cannot be stopped for certain.
const NO_TARGET: &str = "its failover policy is restart, and its driver on this node cannot stop it while the agent \
                         is dead; use another driver, or the failover policy never";

/// Returns when the session has ended; never where there is none to be watched.
pub(super) async fn lapse(mut gate: watch::Receiver<Gate>, session: Option<u64>) {
    if let Some(session) = session
        && gate.wait_for(|gate| gate.session != session).await.is_ok()
    {
        return;
    }
    std::future::pending::<()>().await;
}

impl Worker {
    /// Whether it may be started elsewhere when this node is lost.
    fn is_guarded(&self) -> bool {
        self.entry.fence && self.entry.origin == Origin::Assigned
    }

    /// The session that must last while this step is done; `None` if it does not matter.
    pub(super) fn session_of(&self, step: Step) -> Option<u64> {
        let runs_then = match step {
            Step::Start | Step::Resume | Step::TakeBack => true,
            Step::Create | Step::Stop | Step::Pause | Step::Delete | Step::Update => false,
        };
        (runs_then && self.is_guarded()).then_some(self.named)
    }

    /// Whether a step may be done now. If not, it was said why, and waited for something to change.
    pub(super) async fn may_do(&mut self, step: Step, seen: &Observed) -> bool {
        let needs_lease = match step {
            Step::Create | Step::Start | Step::Resume | Step::TakeBack => self.is_guarded(),
            Step::Stop | Step::Pause | Step::Delete | Step::Update => false,
        };
        if !needs_lease {
            return true;
        }
        // Before the question, so that no change of the answer is missed.
        self.gate.mark_unchanged();
        let Err(reason) = self.context.guard.permits(self.named) else { return true };
        self.publish(step.state(seen), &reason);
        self.wait().await;
        false
    }

    /// Tells the fencer of a start before it begins. False: it must not begin.
    pub(super) async fn announce(&mut self, step: Step, seen: &Observed, driver: &Arc<dyn Driver>) -> bool {
        if !self.context.guard.is_on() {
            return true;
        }
        let Some(target) = driver.fence_target(self.entry.id()) else {
            self.entry.fail(NO_TARGET.to_owned());
            self.unsaved = true;
            return false;
        };
        let guard = &self.context.guard;
        let Err(reason) = guard.starting(self.entry.id(), target).await else { return true };
        self.not_before = Some(Instant::now() + self.context.tuning.retry_base);
        self.publish(step.state(seen), &reason);
        false
    }

    /// What was seen, with what the driver cannot know: that it was the node that stopped it.
    pub(super) fn judge(&self, seen: Observed) -> Observed {
        let Observed::Stopped(Exit::Lost | Exit::Failed(_)) = &seen else { return seen };
        let was_fenced = match &self.entry.last_exit {
            Some(Exit::Fenced) => true,
            Some(_) => false,
            None => self.is_guarded() && self.context.guard.was_fenced(self.entry.id()),
        };
        if was_fenced { Observed::Stopped(Exit::Fenced) } else { seen }
    }

    /// What runs is watched, and what does not is not.
    pub(super) async fn see_to_guard(&self, seen: &Observed) {
        // What was handed over may be taken back at any moment.
        let runs = matches!(seen, Observed::Running(_) | Observed::Paused(_) | Observed::HandedOver);
        let target = self.driver.as_ref().and_then(|driver| driver.fence_target(self.entry.id()));
        match target {
            Some(target) if runs && self.is_guarded() => {
                self.context.guard.guard(self.entry.id(), target).await;
            }
            _ => self.context.guard.forget(self.entry.id()).await,
        }
    }
}
