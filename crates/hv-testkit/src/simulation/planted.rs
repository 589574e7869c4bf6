//! Bugs planted on purpose, one at a time, to show that a history with it is noticed. All of them are at the seams
//! between the processes and the world: nothing of them is in the programs.

use std::str::FromStr;

macro_rules! bugs {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),* $(,)?) => {
        /// A planted bug.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Bug {
            $($(#[$doc])* $variant),*
        }

        impl Bug {
            /// Every one.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Its name.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),*
                }
            }
        }
    };
}

bugs! {
    /// A leader's transactions do not compare the leader key.
    NoLeaderGuard = "no-leader-guard",
    /// Writes do not compare the revision of what they read.
    NoCompare = "no-compare",
    /// The request key is recorded in a transaction of its own, after the change.
    RequestKeyApart = "request-key-apart",
    /// A watch delivers deletions one batch late.
    LateDelete = "late-delete",
    /// A server's cache says that it shows a revision before it does.
    EarlyProgress = "early-progress",
    /// Of ten changes one is acknowledged and lost.
    LostCommit = "lost-commit",
    /// A node says that an instance is gone when it only begins to remove it.
    GoneTooEarly = "gone-too-early",
    /// A server that does not know tells the node to give the instance up.
    ReleaseOnDoubt = "release-on-doubt",
    /// A drain takes an instance off its node without waiting for the node.
    DrainDropsBinding = "drain-drops-binding",
    /// Some nodes are told what is bound to another one.
    Misrouted = "misrouted",
    /// Of the messages about what is bound to a node one of four is lost without a trace.
    LostMessage = "lost-message",
    /// A node's report is answered and not written.
    UnwrittenReport = "unwritten-report",
    /// The store ends leases after three eighths of their time: a node counts as lost while it believes in its lease.
    HastyLease = "hasty-lease",
    /// The fencer acknowledges everything and kills nothing.
    IdleFencer = "idle-fencer",
    /// The clock by which nodes count their leases runs at a third of its rate.
    SlowClock = "slow-clock",
}

impl FromStr for Bug {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.iter().map(|bug| bug.name()).collect::<Vec<_>>().join(", ");
        Self::ALL
            .iter()
            .copied()
            .find(|bug| bug.name() == text)
            .ok_or_else(|| format!("bugs are: {}", names()))
    }
}

/// Which bug is there, if any.
#[derive(Clone, Debug, Default)]
pub(crate) struct Planted(pub(crate) Option<Bug>);

impl Planted {
    pub(crate) fn is(&self, bug: Bug) -> bool {
        self.0 == Some(bug)
    }
}
