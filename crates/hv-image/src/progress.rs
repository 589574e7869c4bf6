//! How far the fetch of an image is.

/// What is being done for an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Finding out what the reference means.
    #[default]
    Resolving,
    /// Bytes arrive.
    Downloading,
    /// What arrived is checked.
    Verifying,
    /// The form that runtimes start from is made.
    Converting,
    /// It is there.
    Done,
}

impl Phase {
    /// A word for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Resolving => "resolving",
            Self::Downloading => "downloading",
            Self::Verifying => "verifying",
            Self::Converting => "converting",
            Self::Done => "done",
        }
    }
}

/// How far the fetch of an image is. Within a phase `done_bytes` grows, unless something has to be fetched
/// again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Bytes done in this phase.
    pub done_bytes: u64,
    /// Bytes in all in this phase; 0: not known.
    pub total_bytes: u64,
}

/// Tells a watcher how far things are. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Reporter(tokio::sync::watch::Sender<Progress>);

impl Reporter {
    pub(crate) fn new(sender: &tokio::sync::watch::Sender<Progress>) -> Self {
        Self(sender.clone())
    }

    /// A new phase begins, at nothing.
    pub(crate) fn begin(&self, phase: Phase, total_bytes: u64) {
        self.0.send_replace(Progress { phase, done_bytes: 0, total_bytes });
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.0.send_modify(|progress| progress.done_bytes += bytes);
    }

    /// The total becomes known.
    pub(crate) fn expect(&self, total_bytes: u64) {
        self.0.send_modify(|progress| progress.total_bytes = total_bytes);
    }

    /// What was done has to be done again.
    pub(crate) fn take_back(&self, bytes: u64) {
        self.0.send_modify(|progress| progress.done_bytes = progress.done_bytes.saturating_sub(bytes));
    }
}
