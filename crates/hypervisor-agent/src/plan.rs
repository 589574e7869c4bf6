//! What to do next with an instance: a pure function of what is wanted, what is seen and what is remembered.
//!
//! # Invariants (each is a property test below)
//! - Nothing is started that runs, and nothing is created that the journal knows to be there.
//! - Whatever is wanted, and wherever a crash left things, the steps come to an end, and there what is wanted holds.
//! - What was deleted by somebody else is never made again behind the user's back.
//! - What ends by itself is started again only as its policy says, with pauses that grow; what was fenced always is,
//!   because nobody wanted it to end.

use std::time::{Duration, SystemTime};

use hv_driver::{Exit, Handle, Observed};
use hv_types::instance::RestartPolicy;
use hv_types::{InstanceState, Wanted};

use crate::entry::{BootMoment, Entry, Origin, Outgoing};
use crate::fencing::clock::Moment;

/// What people see of an instance that was fenced.
const FENCED: &str = "stopped: the control plane was out of reach";

/// First pause before an instance that ended by itself is started again; it doubles.
const RESTART_BASE: Duration = Duration::from_secs(1);
/// Longest such pause.
const RESTART_MAX: Duration = Duration::from_mins(5);
/// After so long a run the pauses begin anew.
const RESTART_RESET: Duration = Duration::from_mins(10);

/// When it is: a moment of a boot of the node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At<'a> {
    pub(crate) boot_id: &'a str,
    pub(crate) at: Moment,
}

impl At<'_> {
    fn remembered(&self, at: Moment) -> BootMoment {
        BootMoment { boot_id: self.boot_id.to_owned(), at }
    }

    /// The moment, if it is one of this boot.
    fn of_this_boot(&self, moment: Option<&BootMoment>) -> Option<Moment> {
        moment.filter(|moment| moment.boot_id == self.boot_id).map(|moment| moment.at)
    }
}

/// What a driver is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Create,
    Start,
    Stop,
    Pause,
    Resume,
    Delete,
    /// What was, or was to be, handed over goes on here.
    TakeBack,
    Update,
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
            Self::TakeBack => "abort_migration",
            Self::Update => "update",
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
            Self::TakeBack => "aborting the migration",
            Self::Update => "updating",
        }
    }

    /// What people see while it is done.
    pub(crate) fn state(self, seen: &Observed) -> InstanceState {
        match self {
            Self::Create => InstanceState::Creating,
            Self::Start => InstanceState::Starting,
            Self::Stop => InstanceState::Stopping,
            Self::Delete => InstanceState::Deleting,
            Self::TakeBack => InstanceState::Running,
            Self::Update if matches!(seen, Observed::Stopped(_)) => InstanceState::Stopped,
            Self::Update | Self::Pause | Self::Resume => match seen {
                Observed::Paused(_) => InstanceState::Paused,
                Observed::Running(_) | Observed::HandedOver | Observed::Stopped(_) | Observed::Absent => {
                    InstanceState::Running
                }
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
    /// It is to be started again by itself, after a pause.
    Planned,
    /// It is started again now.
    Again,
    /// Nothing is left.
    Gone,
    /// There is nothing to be taken back of what was to be handed over: it ended.
    TakenBack,
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
    /// Nothing to do before then; people see this.
    Later(InstanceState, String, Moment),
}

/// What comes next for an instance that is remembered as `entry` and was `seen` so, `now`.
pub(crate) fn next_step(entry: &Entry, seen: &Observed, now: &At<'_>) -> Next {
    if entry.gone {
        return Next::Rest(InstanceState::Deleting, "removed from its node".into());
    }
    if entry.origin == Origin::Incoming && entry.wanted != Wanted::Deleted {
        return Next::Rest(InstanceState::Paused, "waits for another node to hand it over".to_owned());
    }
    if let Some(outgoing) = entry.outgoing.as_ref().filter(|_| entry.wanted != Wanted::Deleted) {
        return hand_over(outgoing, seen);
    }
    if entry.discard {
        return match seen {
            Observed::Absent => Next::Note(Note::Discarded),
            Observed::Stopped(_) | Observed::Running(_) | Observed::Paused(_) | Observed::HandedOver => {
                Next::Do(Step::Delete)
            }
        };
    }
    let is_there = match seen {
        Observed::Stopped(_) | Observed::Running(_) | Observed::Paused(_) => entry.created,
        Observed::Absent | Observed::HandedOver => false,
    };
    if is_there && entry.told.is_some() && entry.wanted != Wanted::Deleted {
        return Next::Do(Step::Update);
    }
    let next = if entry.pending { pursue(entry, seen) } else { rest(entry, seen, now) };
    match next {
        Next::Do(Step::Start) if entry.tell_again => Next::Do(Step::Update),
        next => next,
    }
}

fn pursue(entry: &Entry, seen: &Observed) -> Next {
    let finished = Next::Note(Note::Finished);
    match (entry.wanted, seen) {
        (Wanted::Deleted, Observed::Absent) => Next::Note(Note::Gone),
        (Wanted::Deleted, _) => Next::Do(Step::Delete),
        (_, Observed::HandedOver) => handed_over(),

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

fn rest(entry: &Entry, seen: &Observed, now: &At<'_>) -> Next {
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
    if let Observed::Stopped(exit) = seen
        && entry.wanted == Wanted::Running
        && entry.origin != Origin::Found
        && let Some(next) = again(entry, exit, now)
    {
        return next;
    }
    match seen {
        Observed::Running(_) => show(Running, ""),
        Observed::Paused(_) => show(Paused, ""),
        Observed::HandedOver => handed_over(),
        Observed::Absent if entry.origin == Origin::Found => show(Stopped, "found on the node"),
        Observed::Absent => {
            show(Failed, "what belonged to it on this node is gone; delete it and create it again")
        }
        Observed::Stopped(_) if entry.wanted == Wanted::Stopped => show(Stopped, ""),
        Observed::Stopped(Exit::NeverStarted) => show(Stopped, "it was never started"),
        Observed::Stopped(Exit::Stopped) => show(Stopped, "it was stopped on its node"),
        Observed::Stopped(Exit::Finished) => show(Stopped, "the guest powered off"),
        Observed::Stopped(Exit::Failed(reason)) => show(Failed, reason),
        Observed::Stopped(Exit::Fenced) => {
            show(Failed, &format!("{FENCED}; what it had in memory is lost: start it again"))
        }
        Observed::Stopped(Exit::Lost) => {
            let is_news = entry.last_exit.is_none() && entry.origin != Origin::Found;
            let was_booted = entry.boot_id != now.boot_id;
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

/// What comes next for what is being handed over: nothing of it runs again here unless it was aborted, as it may run
/// elsewhere by now.
fn hand_over(outgoing: &Outgoing, seen: &Observed) -> Next {
    let rest = |state, reason: &str| Next::Rest(state, reason.to_owned());
    match seen {
        Observed::Running(_) | Observed::Paused(_) | Observed::HandedOver if outgoing.aborting => {
            Next::Do(Step::TakeBack)
        }
        Observed::Stopped(_) | Observed::Absent if outgoing.aborting => Next::Note(Note::TakenBack),
        Observed::Running(_) | Observed::Paused(_) | Observed::HandedOver => {
            rest(InstanceState::Running, "is being moved to another node")
        }
        Observed::Stopped(_) | Observed::Absent => rest(
            InstanceState::Failed,
            "it ended while it was being moved; the control plane decides where it goes on",
        ),
    }
}

/// Where it runs from now on is the control plane's to say: it binds it to the other node, or has the migration aborted.
fn handed_over() -> Next {
    let reason = "it was handed over to another node and waits for the control plane";
    Next::Rest(InstanceState::Running, reason.to_owned())
}

/// What comes next for an instance that is to run and ended without having been asked to; `None`: it stays as it is.
fn again(entry: &Entry, exit: &Exit, now: &At<'_>) -> Option<Next> {
    let is_failure = match exit {
        Exit::Fenced => return Some(Next::Note(Note::Again)),
        // After a boot of the node it is revived, or has failed, whatever its policy says.
        Exit::Lost => {
            if entry.boot_id != now.boot_id {
                return None;
            }
            true
        }
        Exit::Failed(_) => true,
        Exit::Finished => false,
        Exit::NeverStarted | Exit::Stopped => return None,
    };
    match entry.restart_policy {
        RestartPolicy::Always => {}
        RestartPolicy::OnFailure if is_failure => {}
        RestartPolicy::OnFailure | RestartPolicy::Never => return None,
    }
    let restarts = &entry.restarts;
    let Some(due) = now.of_this_boot(restarts.due.as_ref()) else {
        return Some(Next::Note(Note::Planned));
    };
    if due <= now.at {
        return Some(Next::Note(Note::Again));
    }
    let state = if is_failure { InstanceState::Failed } else { InstanceState::Stopped };
    let what = match exit {
        Exit::Failed(reason) => format!("failed with {reason}"),
        Exit::Lost => "its process is gone".to_owned(),
        _ => "the guest powered off".to_owned(),
    };
    let pause = pause(restarts.streak.saturating_sub(1)).as_secs();
    let times = ordinal(restarts.count.saturating_add(1));
    Some(Next::Later(state, format!("{what}; started again after {pause} s ({times} time)"), due))
}

/// The pause before the start that follows so many in a row.
fn pause(streak: u32) -> Duration {
    const MOST_DOUBLINGS: u32 = 16;
    (RESTART_BASE * (1 << streak.min(MOST_DOUBLINGS))).min(RESTART_MAX)
}

fn ordinal(number: u32) -> String {
    let ending = match (number % 10, number % 100) {
        (_, 11..=13) => "th",
        (1, _) => "st",
        (2, _) => "nd",
        (3, _) => "rd",
        _ => "th",
    };
    format!("{number}{ending}")
}

/// What is remembered after a driver did a step that was begun for what `serial` numbers.
pub(crate) fn done(entry: &mut Entry, step: Step, serial: u64, handle: Option<Handle>, now: &At<'_>) {
    let is_current = entry.serial == serial && entry.wanted == Wanted::Running && !entry.discard;
    if handle.is_some() {
        entry.handle = handle;
    }
    match step {
        Step::Create => entry.created = true,
        Step::Start => {
            entry.boot_id = now.boot_id.to_owned();
            entry.last_exit = None;
            // What still waits is tried at every start.
            entry.tell_again = !entry.update_note.is_empty();
            entry.started_at = Some(SystemTime::now());
            entry.restarts.started = Some(now.remembered(now.at));
            // At once, not when it is seen running: a guest that ends right away is not to be started for ever.
            if is_current {
                entry.finish();
            }
        }
        Step::Stop if entry.serial == serial => entry.restart_pending = false,
        Step::Resume if is_current && !entry.restart_pending => entry.finish(),
        Step::TakeBack => entry.outgoing = None,
        Step::Stop | Step::Resume | Step::Pause | Step::Delete | Step::Update => {}
    }
}

/// What is remembered when the plan notes something.
pub(crate) fn remember(entry: &mut Entry, note: Note, seen: &Observed, now: &At<'_>) {
    match note {
        Note::Discarded => {
            entry.discard = false;
            entry.created = false;
            entry.handle = None;
            entry.last_exit = None;
            entry.started_at = None;
            entry.forget_updates();
        }
        Note::Restarted => entry.restart_pending = false,
        Note::Finished => {
            entry.created |= *seen != Observed::Absent;
            if let Observed::Running(running) | Observed::Paused(running) = seen {
                entry.boot_id = now.boot_id.to_owned();
                entry.started_at = running.since.or(entry.started_at);
                entry.last_exit = None;
            }
            entry.finish();
        }
        Note::Revive => {
            entry.pending = true;
            entry.serial += 1;
        }
        Note::Planned => {
            let started = now.of_this_boot(entry.restarts.started.as_ref());
            if started.is_none_or(|started| now.at.since(started) >= RESTART_RESET) {
                entry.restarts.streak = 0;
            }
            let due = now.at.after(pause(entry.restarts.streak));
            entry.restarts.streak = entry.restarts.streak.saturating_add(1);
            entry.restarts.due = Some(now.remembered(due));
        }
        Note::Again => {
            entry.restarts.count = entry.restarts.count.saturating_add(1);
            entry.restarts.due = None;
            entry.pending = true;
            entry.serial += 1;
        }
        Note::Gone => {
            entry.gone = true;
            entry.handle = None;
            entry.finish();
        }
        Note::TakenBack => entry.outgoing = None,
    }
}

#[cfg(test)]
mod tests;
