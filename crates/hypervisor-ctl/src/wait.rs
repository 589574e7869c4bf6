//! Waits until an instance is what was asked for.
//!
//! # Theory of operation
//! A mutation's answer carries the generation G that it made. The instance is settled when its node has finished with
//! G: `observed_generation >= G`. Until then its state may still be that of an earlier wish, so it decides nothing.
//! A higher generation with another wish means that somebody else asked for something else.

use std::time::Duration;

use hv_proto::v1::{self, EventType, InstanceState, InstanceWanted};
use tokio::time::Instant;
use tonic::Code;

use crate::error::CtlError;
use crate::output::text::escape;
use crate::progress::Progress;
use crate::server::{Server, pause_before};
use crate::show::instance::state_name;

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Goal {
    Running,
    Stopped,
    Paused,
    Deleted,
}

impl Goal {
    fn state(self) -> Option<InstanceState> {
        match self {
            Self::Running => Some(InstanceState::Running),
            Self::Stopped => Some(InstanceState::Stopped),
            Self::Paused => Some(InstanceState::Paused),
            Self::Deleted => None,
        }
    }

    fn wanted(self) -> InstanceWanted {
        match self {
            Self::Running => InstanceWanted::Running,
            Self::Stopped => InstanceWanted::Stopped,
            Self::Paused => InstanceWanted::Paused,
            Self::Deleted => InstanceWanted::Deleted,
        }
    }

    /// `running`, …
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Paused => "paused",
            Self::Deleted => "deleted",
        }
    }
}

/// What an instance's condition means to somebody who waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is so.
    Reached,
    /// Not yet.
    Waiting,
    /// It will not be so by itself; the text is what became of it instead.
    Failed(String),
    /// Somebody else asked for something else.
    Overtaken(String),
}

/// Judges an instance as the server sent it.
pub(crate) fn judge(goal: Goal, generation: u64, instance: &v1::Instance) -> Verdict {
    let wanted = instance.wanted();
    if instance.generation > generation && wanted != InstanceWanted::Unspecified && wanted != goal.wanted() {
        let word = wanted.as_str_name().trim_start_matches("INSTANCE_WANTED_").to_ascii_lowercase();
        return Verdict::Overtaken(word);
    }
    if instance.observed_generation < generation {
        return Verdict::Waiting;
    }
    match instance.state() {
        state if Some(state) == goal.state() => Verdict::Reached,
        // The server goes on trying to delete.
        _ if goal == Goal::Deleted => Verdict::Waiting,
        InstanceState::Failed => Verdict::Failed("failed".to_owned()),
        state @ (InstanceState::Running | InstanceState::Stopped | InstanceState::Paused) => {
            Verdict::Failed(format!("is {}, not {}", state_name(state), goal.word().to_uppercase()))
        }
        InstanceState::Unspecified
        | InstanceState::Pending
        | InstanceState::Creating
        | InstanceState::Starting
        | InstanceState::Stopping
        | InstanceState::Deleting
        | InstanceState::Unknown => Verdict::Waiting,
    }
}

/// Waits for one instance.
#[derive(Debug)]
pub(crate) struct Wait<'a> {
    pub(crate) server: &'a Server,
    pub(crate) progress: &'a mut Progress,
    pub(crate) goal: Goal,
    /// Of the mutation's answer.
    pub(crate) generation: u64,
    /// As the mutation left it.
    pub(crate) instance: v1::Instance,
}

impl Wait<'_> {
    /// The instance once it is so; a deleted one as it was last.
    ///
    /// # Errors
    /// [`CtlError::TimedOut`] at the deadline, [`CtlError::InstanceFailed`], [`CtlError::Overtaken`], or what the
    /// server refuses. That the server does not answer is no error until the deadline.
    pub(crate) async fn until(mut self, deadline: Instant) -> Result<v1::Instance, CtlError> {
        let waited = tokio::select! {
            waited = tokio::time::timeout_at(deadline, self.follow()) => waited,
            _ = tokio::signal::ctrl_c() => return Err(CtlError::Signal(2)),
        };
        self.progress.clear();
        match waited {
            Ok(Ok(())) => Ok(self.instance),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(self.timed_out()),
        }
    }

    async fn follow(&mut self) -> Result<(), CtlError> {
        let mut attempt = 1;
        loop {
            let before = self.instance.revision;
            match self.watch_once().await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(status) => match (status.code(), self.goal) {
                    (Code::NotFound, Goal::Deleted) => return Ok(()),
                    (Code::NotFound, _) => return Err(self.gone()),
                    // The watch ends where a server restarts, or keeps no old revisions.
                    (
                        Code::Unavailable
                        | Code::OutOfRange
                        | Code::Aborted
                        | Code::Cancelled
                        | Code::Unknown,
                        _,
                    ) => {
                        self.progress.update("the server does not answer, trying again");
                    }
                    _ => return Err(self.server.error(&status)),
                },
            }
            self.settled()?;
            attempt = if self.instance.revision > before { 2 } else { attempt + 1 };
            tokio::time::sleep(pause_before(attempt)).await;
        }
    }

    /// Follows one stream; true if what was waited for is the case.
    async fn watch_once(&mut self) -> Result<bool, tonic::Status> {
        let request = v1::WatchInstanceRequest { instance_id: self.instance.id.clone(), from_revision: 0 };
        let mut events = self.server.compute().watch_instance(request).await?.into_inner();
        while let Some(event) = events.message().await? {
            match (event.r#type(), event.instance) {
                (EventType::Deleted, _) if self.goal == Goal::Deleted => return Ok(true),
                (EventType::Deleted, _) => return Err(tonic::Status::not_found("deleted")),
                (_, Some(instance)) => self.instance = instance,
                (_, None) => {}
            }
            if judge(self.goal, self.generation, &self.instance) != Verdict::Waiting {
                return Ok(self.settled().is_ok_and(|reached| reached));
            }
            self.show();
        }
        Ok(false)
    }

    /// Whether it is so; an error if it will not be.
    fn settled(&self) -> Result<bool, CtlError> {
        match judge(self.goal, self.generation, &self.instance) {
            Verdict::Reached => Ok(true),
            Verdict::Waiting => Ok(false),
            Verdict::Failed(what) => Err(CtlError::InstanceFailed {
                name: escape(&self.instance.name),
                what,
                reason: reason(&self.instance, "no reason is given; see `hypervisor-ctl instance describe`"),
            }),
            Verdict::Overtaken(word) => Err(CtlError::Overtaken(format!(
                "somebody else asked for instance {} to be {word} meanwhile",
                escape(&self.instance.name)
            ))),
        }
    }

    fn show(&mut self) {
        let instance = &self.instance;
        let mut text = format!("instance {}: {}", instance.name, state_name(instance.state()));
        if !instance.node_id.is_empty() {
            text.push_str(&format!(" on node {}", instance.node_id));
        }
        if !instance.state_reason.is_empty() {
            text.push_str(&format!(" ({})", instance.state_reason));
        }
        self.progress.update(&text);
    }

    fn gone(&self) -> CtlError {
        let name = escape(&self.instance.name);
        CtlError::Overtaken(format!("instance {name} was deleted by somebody else meanwhile"))
    }

    fn timed_out(&self) -> CtlError {
        let instance = &self.instance;
        let name = escape(&instance.name);
        let state = state_name(instance.state());
        let why = match reason(instance, "") {
            reason if reason.is_empty() => String::new(),
            reason => format!(" ({reason})"),
        };
        CtlError::TimedOut {
            what: format!("instance {name} is still {state}, not {}{why},", self.goal.word()),
            after: self.server.timeout,
            hint: format!(
                "; the request stands, follow it with `hypervisor-ctl instance get {name} --watch` or wait longer with \
                 --timeout"
            ),
        }
    }
}

fn reason(instance: &v1::Instance, none: &str) -> String {
    if instance.state_reason.is_empty() { none.to_owned() } else { escape(&instance.state_reason) }
}

/// The moment at which a command stops to wait.
pub(crate) fn deadline(timeout: Duration) -> Instant {
    Instant::now() + timeout
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(
        state: InstanceState,
        wanted: InstanceWanted,
        generation: u64,
        observed: u64,
    ) -> v1::Instance {
        v1::Instance {
            state: state as i32,
            wanted: wanted as i32,
            generation,
            observed_generation: observed,
            ..Default::default()
        }
    }

    #[test]
    fn a_state_of_an_earlier_wish_decides_nothing() {
        use {InstanceState as S, InstanceWanted as W};
        for state in [S::Running, S::Failed, S::Stopped] {
            assert_eq!(
                judge(Goal::Running, 3, &instance(state, W::Running, 3, 2)),
                Verdict::Waiting,
                "{state:?}"
            );
        }
        assert_eq!(judge(Goal::Running, 3, &instance(S::Running, W::Running, 3, 3)), Verdict::Reached);
    }

    #[test]
    fn an_instance_that_settled_elsewhere_has_failed() {
        use {InstanceState as S, InstanceWanted as W};
        let failed = judge(Goal::Running, 1, &instance(S::Failed, W::Running, 1, 1));
        assert_eq!(failed, Verdict::Failed("failed".into()));
        let stopped = judge(Goal::Running, 1, &instance(S::Stopped, W::Running, 1, 1));
        assert_eq!(stopped, Verdict::Failed("is STOPPED, not RUNNING".into()));
        for state in [S::Pending, S::Creating, S::Starting, S::Unknown] {
            assert_eq!(judge(Goal::Running, 1, &instance(state, W::Running, 1, 1)), Verdict::Waiting);
        }
    }

    #[test]
    fn another_wish_of_somebody_else_ends_the_wait() {
        use {InstanceState as S, InstanceWanted as W};
        let other = instance(S::Running, W::Stopped, 4, 3);
        assert_eq!(judge(Goal::Running, 3, &other), Verdict::Overtaken("stopped".into()));
        // The same wish again is as good.
        assert_eq!(judge(Goal::Running, 3, &instance(S::Running, W::Running, 4, 4)), Verdict::Reached);
    }

    #[test]
    fn a_deletion_is_over_only_when_the_instance_is_gone() {
        use {InstanceState as S, InstanceWanted as W};
        for state in [S::Deleting, S::Failed, S::Stopped, S::Running] {
            assert_eq!(
                judge(Goal::Deleted, 2, &instance(state, W::Deleted, 3, 3)),
                Verdict::Waiting,
                "{state:?}"
            );
        }
    }
}
