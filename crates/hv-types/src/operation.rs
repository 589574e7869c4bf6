//! Operations: work that takes long, recorded so that it survives whoever works on it.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use crate::id::Revision;
use crate::validate::Invalid;

/// Most blockers that a record names; the message says how many there are.
pub const MAX_BLOCKERS: usize = 20;

/// How an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperationState {
    /// It waits for its turn.
    Pending,
    /// It is under way.
    Running,
    /// It is being undone.
    Cancelling,
    /// It reached its end.
    Succeeded,
    /// It cannot reach its end.
    Failed,
    /// It was given up.
    Cancelled,
}

impl OperationState {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Pending, Self::Running, Self::Cancelling, Self::Succeeded, Self::Failed, Self::Cancelled];

    /// As people and scripts see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Running => "RUNNING",
            Self::Cancelling => "CANCELLING",
            Self::Succeeded => "SUCCEEDED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
        }
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_final(self) -> bool {
        match self {
            Self::Succeeded | Self::Failed | Self::Cancelled => true,
            Self::Pending | Self::Running | Self::Cancelling => false,
        }
    }
}

impl fmt::Display for OperationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OperationKind {
    /// A node is emptied.
    DrainNode,
    /// An instance moves to another node while it runs.
    MigrateInstance,
    /// What an instance is is kept under a name.
    SnapshotInstance,
    /// A snapshot is forgotten.
    DeleteSnapshot,
    /// An instance returns to a snapshot.
    RevertInstance,
    /// Nodes fetch an image.
    PullImage,
}

impl OperationKind {
    /// Every kind.
    pub const ALL: [Self; 6] = [
        Self::DrainNode,
        Self::MigrateInstance,
        Self::SnapshotInstance,
        Self::DeleteSnapshot,
        Self::RevertInstance,
        Self::PullImage,
    ];

    /// As the wire and people spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::DrainNode => "drain-node",
            Self::MigrateInstance => "migrate-instance",
            Self::SnapshotInstance => "snapshot-instance",
            Self::DeleteSnapshot => "delete-snapshot",
            Self::RevertInstance => "revert-instance",
            Self::PullImage => "pull-image",
        }
    }
}

impl FromStr for OperationKind {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| Invalid::new("kind", text, "must be a kind of operation"))
    }
}

/// Something that keeps an operation from going on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// Which object.
    pub object_id: String,
    /// Its name.
    pub object_name: String,
    /// Why, and what to do.
    pub reason: String,
}

/// An operation as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct OperationRecord {
    /// Sortable by time.
    pub id: String,
    /// What is done.
    pub kind: OperationKind,
    /// `node`, `instance` or `image`.
    pub object_kind: String,
    /// What it works on.
    pub object_id: String,
    /// Its name at that time.
    pub object_name: String,
    /// How it stands.
    pub state: OperationState,
    /// What it does now, one word.
    pub phase: String,
    /// How it stands, for people.
    pub message: String,
    /// How much is done.
    pub done: u64,
    /// Of how much; 0 where it is not known.
    pub total: u64,
    /// What keeps it from going on; at most [`MAX_BLOCKERS`].
    pub blockers: Vec<Blocker>,
    /// What it was asked with.
    pub parameters: BTreeMap<String, String>,
    /// Whether somebody asked to give it up.
    pub cancel_requested: bool,
    /// When it was asked for.
    pub created_at: SystemTime,
    /// When it last changed.
    pub updated_at: SystemTime,
    /// When it ended.
    pub finished_at: Option<SystemTime>,
    /// Who asked for it; may be empty.
    pub actor: String,
    /// The request that led to it; may be empty.
    pub request_id: String,
    /// The revision this was read at; not part of the value.
    pub revision: Revision,
}
