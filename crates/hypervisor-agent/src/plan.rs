//! What to do next with an instance: a pure function of what is wanted, what is seen and what is remembered.
//!
//! # Invariants (each is a property test below)
//! - Nothing is started that runs, and nothing is created that the journal knows to be there.
//! - Whatever is wanted, and wherever a crash left things, the steps come to an end, and there what is wanted holds.
//! - What was deleted by somebody else is never made again behind the user's back.

use std::time::SystemTime;

use hv_driver::{Exit, Handle, Observed};
use hv_types::{InstanceState, Wanted};

use crate::entry::{Entry, Origin};

/// What a driver is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Create,
    Start,
    Stop,
    Pause,
    Resume,
    Delete,
}

impl Step {
    /// As metrics and messages name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Delete => "delete",
        }
    }

    /// As it begins a sentence.
    pub(crate) fn doing(self) -> &'static str {
        match self {
            Self::Create => "creating",
            Self::Start => "starting",
            Self::Stop => "stopping",
            Self::Pause => "pausing",
            Self::Resume => "resuming",
            Self::Delete => "deleting",
        }
    }

    /// What people see while it is done.
    pub(crate) fn state(self, seen: &Observed) -> InstanceState {
        match self {
            Self::Create => InstanceState::Creating,
            Self::Start => InstanceState::Starting,
            Self::Stop => InstanceState::Stopping,
            Self::Delete => InstanceState::Deleting,
            Self::Pause | Self::Resume => match seen {
                Observed::Paused(_) => InstanceState::Paused,
                Observed::Running(_) | Observed::Stopped(_) | Observed::Absent => InstanceState::Running,
            },
        }
    }
}

/// What is to be remembered before going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Note {
    /// The earlier life is gone.
    Discarded,
    /// The stop of a restart is done.
    Restarted,
    /// What is wanted is reached.
    Finished,
    /// The node was booted since: what ran is to run again.
    Revive,
    /// Nothing is left.
    Gone,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Ask the driver.
    Do(Step),
    /// Remember, then ask again.
    Note(Note),
    /// What is wanted cannot be reached.
    Fail(&'static str),
    /// Nothing to do; people see this.
    Rest(InstanceState, String),
}

/// What comes next for an instance that is remembered as `entry` and was `seen` so, during the node's boot `boot_id`.
pub(crate) fn next_step(entry: &Entry, seen: &Observed, boot_id: &str) -> Next {
    if entry.gone {
        return Next::Rest(InstanceState::Deleting, "removed from its node".into());
    }
    if entry.discard {
        return match seen {
            Observed::Absent => Next::Note(Note::Discarded),
            Observed::Stopped(_) | Observed::Running(_) | Observed::Paused(_) => Next::Do(Step::Delete),
        };
    }
    if entry.pending { pursue(entry, seen) } else { rest(entry, seen, boot_id) }
}

fn pursue(entry: &Entry, seen: &Observed) -> Next {
    let finished = Next::Note(Note::Finished);
    match (entry.wanted, seen) {
        (Wanted::Deleted, Observed::Absent) => Next::Note(Note::Gone),
        (Wanted::Deleted, _) => Next::Do(Step::Delete),

        (Wanted::Running | Wanted::Paused, Observed::Absent) if entry.created => {
            Next::Fail("what belonged to it on this node is gone; delete it and create it again")
        }
        (Wanted::Stopped, Observed::Absent) if entry.created => finished,
        (_, Observed::Absent | Observed::Stopped(_)) if !entry.created => Next::Do(Step::Create),

        (Wanted::Running, Observed::Running(_) | Observed::Paused(_)) if entry.restart_pending => {
            Next::Do(Step::Stop)
        }
        (Wanted::Running, Observed::Stopped(_)) if entry.restart_pending => Next::Note(Note::Restarted),
        (Wanted::Running, Observed::Running(_)) => finished,
        (Wanted::Running, Observed::Paused(_)) => Next::Do(Step::Resume),
        (Wanted::Running, Observed::Stopped(_)) => Next::Do(Step::Start),

        (Wanted::Stopped, Observed::Running(_) | Observed::Paused(_)) => Next::Do(Step::Stop),
        (Wanted::Stopped, Observed::Stopped(_)) => finished,

        (Wanted::Paused, Observed::Paused(_)) => finished,
        (Wanted::Paused, Observed::Running(_)) => Next::Do(Step::Pause),
        (Wanted::Paused, Observed::Stopped(Exit::NeverStarted)) => Next::Do(Step::Start),
        // Its memory is gone: there is nothing to hold still.
        (Wanted::Paused, Observed::Stopped(_)) => finished,
        (Wanted::Running | Wanted::Stopped | Wanted::Paused, Observed::Absent) => Next::Do(Step::Create),
    }
}

fn rest(entry: &Entry, seen: &Observed, boot_id: &str) -> Next {
    use InstanceState::{Failed, Paused, Running, Stopped};
    let show = |state, reason: &str| Next::Rest(state, reason.to_owned());
    let is_reached = match (entry.wanted, seen) {
        (Wanted::Running, Observed::Running(_)) => true,
        (Wanted::Paused, Observed::Paused(_)) => true,
        (Wanted::Stopped, Observed::Stopped(_)) => true,
        (Wanted::Running | Wanted::Paused | Wanted::Stopped | Wanted::Deleted, _) => false,
    };
    if let Some(reason) = entry.failure.as_ref().filter(|_| !is_reached) {
        return show(Failed, reason);
    }
    match seen {
        Observed::Running(_) => show(Running, ""),
        Observed::Paused(_) => show(Paused, ""),
        Observed::Absent if entry.origin == Origin::Found => show(Stopped, "found on the node"),
        Observed::Absent => {
            show(Failed, "what belonged to it on this node is gone; delete it and create it again")
        }
        Observed::Stopped(_) if entry.wanted == Wanted::Stopped => show(Stopped, ""),
        Observed::Stopped(Exit::NeverStarted) => show(Stopped, "it was never started"),
        Observed::Stopped(Exit::Stopped) => show(Stopped, "it was stopped on its node"),
        Observed::Stopped(Exit::Finished) => show(Stopped, "the guest powered off"),
        Observed::Stopped(Exit::Failed(reason)) => show(Failed, reason),
        Observed::Stopped(Exit::Lost) => {
            let is_news = entry.last_exit.is_none() && entry.origin != Origin::Found;
            let was_booted = entry.boot_id != boot_id;
            match entry.wanted {
                Wanted::Running if is_news && was_booted => Next::Note(Note::Revive),
                Wanted::Paused if was_booted => {
                    show(Failed, "its memory was lost when the node was restarted; start it again")
                }
                Wanted::Running | Wanted::Paused | Wanted::Stopped | Wanted::Deleted => show(
                    Failed,
                    "its process is gone, and nobody knows how it ended; see the node's log, then start it again",
                ),
            }
        }
    }
}

/// What is remembered after a driver did a step that was begun for what `serial` numbers.
pub(crate) fn done(entry: &mut Entry, step: Step, serial: u64, handle: Option<Handle>, boot_id: &str) {
    let is_current = entry.serial == serial && entry.wanted == Wanted::Running && !entry.discard;
    if handle.is_some() {
        entry.handle = handle;
    }
    match step {
        Step::Create => entry.created = true,
        Step::Start => {
            entry.boot_id = boot_id.to_owned();
            entry.last_exit = None;
            entry.started_at = Some(SystemTime::now());
            // At once, not when it is seen running: a guest that ends right away is not to be started for ever.
            if is_current {
                entry.finish();
            }
        }
        Step::Stop if entry.serial == serial => entry.restart_pending = false,
        Step::Resume if is_current && !entry.restart_pending => entry.finish(),
        Step::Stop | Step::Resume | Step::Pause | Step::Delete => {}
    }
}

/// What is remembered when the plan notes something.
pub(crate) fn remember(entry: &mut Entry, note: Note, seen: &Observed, boot_id: &str) {
    match note {
        Note::Discarded => {
            entry.discard = false;
            entry.created = false;
            entry.handle = None;
            entry.last_exit = None;
            entry.started_at = None;
        }
        Note::Restarted => entry.restart_pending = false,
        Note::Finished => {
            entry.created |= *seen != Observed::Absent;
            if let Observed::Running(running) | Observed::Paused(running) = seen {
                entry.boot_id = boot_id.to_owned();
                entry.started_at = running.since.or(entry.started_at);
                entry.last_exit = None;
            }
            entry.finish();
        }
        Note::Revive => {
            entry.pending = true;
            entry.serial += 1;
        }
        Note::Gone => {
            entry.gone = true;
            entry.handle = None;
            entry.finish();
        }
    }
}

#[cfg(test)]
mod tests;
