//! Crash points: named places where a test can make the process die at once, as if by `kill -9`.
//!
//! `HYPERVISOR_CRASH_AT=<point>` kills the process when it reaches the point, `HYPERVISOR_CRASH_AT=<point>:<n>` when it
//! reaches it for the n-th time. Nothing is flushed and nothing is cleaned up. Only builds with debug assertions look
//! at the variable; in others [`reach`] is empty.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

/// The variable that names the point.
pub const VARIABLE: &str = "HYPERVISOR_CRASH_AT";

macro_rules! points {
    ($($(#[$group:meta])* $variant:ident = $name:literal),* $(,)?) => {
        /// A place where the process can be made to die. The name's first part is the component, the second the
        /// step, the third the moment in it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[expect(missing_docs, reason = "the names say it all")]
        pub enum Point {
            $($(#[$group])* $variant),*
        }

        impl Point {
            /// Every point.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name by which [`VARIABLE`] calls it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),*
                }
            }
        }
    };
}

points! {
    ServerCreateBeforeTxn = "server.create.before_txn",
    ServerCreateAfterTxn = "server.create.after_txn",
    ServerScheduleBeforeBind = "server.schedule.before_bind",
    ServerScheduleAfterBind = "server.schedule.after_bind",
    ServerReportBeforeTxn = "server.report.before_txn",
    ServerReportAfterTxn = "server.report.after_txn",
    ServerChangeBeforeTxn = "server.change.before_txn",
    ServerChangeAfterTxn = "server.change.after_txn",
    ServerRemoveBeforeTxn = "server.remove.before_txn",
    ServerRemoveAfterTxn = "server.remove.after_txn",
    AgentAssignmentBeforeJournal = "agent.assignment.before_journal",
    AgentAssignmentAfterJournal = "agent.assignment.after_journal",
    AgentCreateBefore = "agent.create.before",
    AgentCreateAfter = "agent.create.after",
    AgentStartBefore = "agent.start.before",
    AgentStartAfter = "agent.start.after",
    AgentStopBefore = "agent.stop.before",
    AgentStopAfter = "agent.stop.after",
    AgentDeleteBefore = "agent.delete.before",
    AgentDeleteAfter = "agent.delete.after",
    AgentUpdateBefore = "agent.update.before",
    AgentUpdateAfter = "agent.update.after",
    AgentJournalBeforeFinish = "agent.journal.before_finish",
    AgentReportBefore = "agent.report.before",
    AgentReportAfter = "agent.report.after",
    QemuCreateAfterDir = "qemu.create.after_dir",
    QemuCreateAfterDisk = "qemu.create.after_disk",
    QemuStartBeforeSpawn = "qemu.start.before_spawn",
    QemuStartAfterSpawn = "qemu.start.after_spawn",
    QemuStartAfterQmp = "qemu.start.after_qmp",
    QemuStopAfterPowerdown = "qemu.stop.after_powerdown",
    QemuStopAfterKill = "qemu.stop.after_kill",
    QemuDeleteBeforeRmdir = "qemu.delete.before_rmdir",
    MovePrepareAfter = "move.prepare.after",
    MoveBeginAfterJournal = "move.begin.after_journal",
    MoveCommitBeforeTxn = "move.commit.before_txn",
    MoveCommitAfterTxn = "move.commit.after_txn",
    MoveAbortAfterTxn = "move.abort.after_txn",
    MoveResumeBefore = "move.resume.before",
    MoveResumeAfter = "move.resume.after",
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where to die, as [`VARIABLE`] says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// The point.
    pub point: Point,
    /// At which time of reaching it, counted from 1.
    pub nth: NonZeroU32,
}

/// A text that is no [`Plan`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{VARIABLE}: found {found:?}, expected a crash point, or <point>:<n> with n from 1")]
pub struct InvalidPlan {
    found: String,
}

impl FromStr for Plan {
    type Err = InvalidPlan;

    fn from_str(text: &str) -> Result<Self, InvalidPlan> {
        let (name, nth) = match text.split_once(':') {
            Some((name, nth)) => (name, nth.parse().ok()),
            None => (text, Some(NonZeroU32::MIN)),
        };
        let point = Point::ALL.iter().copied().find(|point| point.name() == name);
        point
            .zip(nth)
            .map(|(point, nth)| Self { point, nth })
            .ok_or_else(|| InvalidPlan { found: text.chars().take(80).collect() })
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.point, self.nth)
    }
}

#[cfg(debug_assertions)]
thread_local! {
    static WATCHER: std::cell::Cell<Option<fn(Point)>> = const { std::cell::Cell::new(None) };
}

/// From now on every point that this thread reaches is told to `watcher`, for simulations, which have several processes
/// in one; `None` ends it. Without debug assertions it is nothing.
pub fn watch(watcher: Option<fn(Point)>) {
    #[cfg(debug_assertions)]
    WATCHER.set(watcher);
    #[cfg(not(debug_assertions))]
    let _ = watcher;
}

/// Marks a point. With debug assertions, and if [`VARIABLE`] names this point, the process dies here; a variable that
/// names no point kills it at the first point of all, because a test that misspells one would otherwise pass unseen.
#[cfg(debug_assertions)]
pub fn reach(point: Point) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    static PLAN: OnceLock<Option<Result<Plan, InvalidPlan>>> = OnceLock::new();
    static REACHED: AtomicU32 = AtomicU32::new(0);

    if let Some(watcher) = WATCHER.get() {
        return watcher(point);
    }
    let plan = PLAN.get_or_init(|| std::env::var_os(VARIABLE).map(|text| text.to_string_lossy().parse()));
    let last_words = match plan {
        None => return,
        Some(Err(error)) => error.to_string(),
        Some(Ok(plan)) => {
            let is_time = plan.point == point && REACHED.fetch_add(1, Ordering::SeqCst) + 1 == plan.nth.get();
            if !is_time {
                return;
            }
            format!("crash point {plan} reached, dying")
        }
    };
    eprintln!("{last_words}");
    std::process::abort();
}

/// Marks a point; without debug assertions it is nothing.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn reach(_point: Point) {}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_point_has_a_name_of_its_own_that_reads_back() {
        let names: HashSet<&str> = Point::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
        for point in Point::ALL {
            let plan: Plan = point.name().parse().unwrap();
            assert_eq!((plan.point, plan.nth.get()), (*point, 1));
            assert_eq!(format!("{point}:3").parse::<Plan>().unwrap().to_string(), format!("{point}:3"));
        }
    }

    #[test]
    fn a_variable_that_names_no_point_or_time_is_refused() {
        for text in
            ["", "server.create", "agent.start.before:0", "agent.start.before:", "agent.start.before:-1"]
        {
            assert!(text.parse::<Plan>().is_err(), "{text}");
        }
    }
}
