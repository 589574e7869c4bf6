//! Fencing: what may be started elsewhere runs here only while the node's lease lives.
//!
//! # Theory of operation
//! A process of its own, the *fencer* ([`process`]), knows until when the lease lives and how each instance is killed;
//! it acts when that moment passes, whatever has become of the agent. The agent's `guard` keeps it informed, decides
//! with it what may start, starts it again if it dies, and stops the same instances itself at the same moment. Both run
//! the same pure logic ([`core`]).
//!
//! # What must hold
//! - The end of the lease is counted from before its renewal was sent, by a clock that nobody sets ([`clock`]).
//! - An instance that may be started elsewhere is started here only with a lease that the fencer has acknowledged, and
//!   only after the control plane has named it as bound here since that lease began (a *session*).

pub mod clock;
pub mod core;
mod guard;
#[cfg(target_os = "linux")]
mod link;
pub mod local;
mod marks;
#[cfg(target_os = "linux")]
pub mod process;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use hv_types::InstanceId;

use self::clock::{BootClock, SharedClock};
use self::core::{Message, Reply, Standing};
use self::local::LocalFencer;

pub(crate) use guard::{Gate, Guard, Keeper, Lease, Renewal};

/// The directory of the fencer's files, in the agent's state directory.
pub const DIRECTORY: &str = "fencing";
/// The file in it that the fencer has as its standard input and holds locked while it lives.
pub const LOCK: &str = "lock";

/// What the fencing part takes from outside; tests and simulations put their own in its place.
#[derive(Clone)]
pub struct Seam {
    /// Tells the time.
    pub clock: SharedClock,
    /// Where fencers come from.
    pub fencers: Fencers,
}

/// Where fencers come from.
#[derive(Clone)]
pub enum Fencers {
    /// There is none: the node says that it is not armed.
    None,
    /// A process of its own.
    Process {
        /// The agent's program.
        program: PathBuf,
    },
    /// A task of this process, which outlives the agent there.
    Local(Arc<LocalFencer>),
}

impl Default for Seam {
    fn default() -> Self {
        Self { clock: Arc::new(BootClock), fencers: Fencers::None }
    }
}

impl std::fmt::Debug for Seam {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let fencers = match &self.fencers {
            Fencers::None => "none",
            Fencers::Process { .. } => "process",
            Fencers::Local(_) => "local",
        };
        out.debug_struct("Seam").field("fencers", &fencers).finish_non_exhaustive()
    }
}

/// Finds or starts a fencer, and knows what fencers have killed.
#[async_trait]
pub(crate) trait Port: Send + Sync + 'static {
    /// Talks to the fencer that lives, or to a new one, in the name of this process. Bounded in time. The text of an
    /// error is for people.
    async fn open(&self, agent: &str) -> Result<(Box<dyn Link>, Standing), String>;

    /// Whether a fencer killed this instance, as far as it is not [unmarked](Port::unmark).
    fn is_marked(&self, id: &InstanceId) -> bool;

    /// This instance was killed.
    fn mark(&self, id: &InstanceId);

    /// That it was killed is remembered elsewhere.
    fn unmark(&self, id: &InstanceId);
}

/// A conversation with a fencer.
#[async_trait]
pub(crate) trait Link: Send {
    /// Says something and waits for the answer, for a bounded time. After an error the link is of no use.
    async fn tell(&mut self, message: Message) -> Result<Reply, String>;

    /// Returns when the fencer is gone.
    async fn closed(&mut self);
}
