//! Instances: what is wanted, where it is bound, what was last observed.
//!
//! # Theory of operation
//! A user changes what is [`Wanted`], which raises the record's `generation`. The scheduler binds the record to a node,
//! which raises its [`Epoch`]. The node's agent makes it so and reports an [`InstanceState`] together with the epoch
//! and generation it worked on. [`InstanceState`] is what people see; every rule about it is in this file.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::id::{Epoch, InstanceId, NodeId, Revision};
use crate::label::Metadata;
use crate::placement::PlacementRules;
use crate::resources::Resources;
use crate::validate::{self, Invalid};

pub mod spec;

pub use spec::{
    CloneOrigin, DiskSpec, Firmware, HealthCheck, InstanceSpec, NetworkSpec, ResourceLimits, VolumeMount,
};

/// The project of everything that names none.
pub const DEFAULT_PROJECT: &str = "default";

/// What kind of workload it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstanceType {
    /// A virtual machine.
    Vm,
    /// A container.
    Container,
    /// A microVM.
    Microvm,
}

impl InstanceType {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::Vm, Self::Container, Self::Microvm];

    /// As configuration and the command line spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Container => "container",
            Self::Microvm => "microvm",
        }
    }
}

impl fmt::Display for InstanceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for InstanceType {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        Self::ALL
            .into_iter()
            .find(|t| t.name() == text)
            .ok_or_else(|| Invalid::new("type", text, "must be `vm`, `container` or `microvm`"))
    }
}

/// What was last observed of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum InstanceState {
    /// Waits for a node.
    Pending,
    /// Bound; its node prepares it.
    Creating,
    /// Being started.
    Starting,
    /// Runs.
    Running,
    /// Stands still in memory.
    Paused,
    /// Being stopped.
    Stopping,
    /// Does not run; its disks are kept.
    Stopped,
    /// Could not be brought to what is wanted; the reason says why.
    Failed,
    /// Being removed.
    Deleting,
    /// Its node does not answer.
    Unknown,
}

impl InstanceState {
    /// Every state.
    pub const ALL: [Self; 10] = [
        Self::Pending,
        Self::Creating,
        Self::Starting,
        Self::Running,
        Self::Paused,
        Self::Stopping,
        Self::Stopped,
        Self::Failed,
        Self::Deleting,
        Self::Unknown,
    ];

    /// As people and scripts see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Creating => "CREATING",
            Self::Starting => "STARTING",
            Self::Running => "RUNNING",
            Self::Paused => "PAUSED",
            Self::Stopping => "STOPPING",
            Self::Stopped => "STOPPED",
            Self::Failed => "FAILED",
            Self::Deleting => "DELETING",
            Self::Unknown => "UNKNOWN",
        }
    }

    /// Whether the instance stays so until somebody asks for something else.
    #[must_use]
    pub fn is_settled(self) -> bool {
        match self {
            Self::Running | Self::Paused | Self::Stopped | Self::Failed => true,
            Self::Pending
            | Self::Creating
            | Self::Starting
            | Self::Stopping
            | Self::Deleting
            | Self::Unknown => false,
        }
    }
}

impl fmt::Display for InstanceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for InstanceState {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wanted = text.to_ascii_uppercase();
        Self::ALL.into_iter().find(|s| s.name() == wanted).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|s| s.name().to_ascii_lowercase()).collect();
            Invalid::new("state", text, format!("must be one of {}", names.join(", ")))
        })
    }
}

/// What a user wants an instance to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// It runs.
    #[default]
    Running,
    /// It does not run; its disks are kept.
    Stopped,
    /// It stands still in memory.
    Paused,
    /// It is gone, with its disks.
    Deleted,
}

/// What a user can ask of an instance that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// Run it.
    Start,
    /// Stop it.
    Stop,
    /// Stop and run it again.
    Restart,
    /// Hold it still.
    Pause,
    /// Let it go on.
    Resume,
    /// Remove it.
    Delete,
}

impl Request {
    /// Every request.
    pub const ALL: [Self; 6] =
        [Self::Start, Self::Stop, Self::Restart, Self::Pause, Self::Resume, Self::Delete];

    /// As people see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Delete => "delete",
        }
    }
}

/// What a request comes to, given what is wanted and observed now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Change what is wanted to this.
    Change(Wanted),
    /// It is so already; the request has no effect.
    Already,
    /// It cannot be asked now; the text says why and what to do.
    Refused(&'static str),
}

/// The one transition function: what `request` does to an instance that is to be `wanted` and was seen as `state`.
#[must_use]
pub fn decide(request: Request, wanted: Wanted, state: InstanceState) -> Verdict {
    use InstanceState as S;
    if wanted == Wanted::Deleted {
        return match request {
            Request::Delete => Verdict::Already,
            Request::Start | Request::Stop | Request::Restart | Request::Pause | Request::Resume => {
                Verdict::Refused("it is being deleted")
            }
        };
    }
    match request {
        Request::Delete => Verdict::Change(Wanted::Deleted),
        Request::Start => match (wanted, state) {
            (Wanted::Paused, _) => Verdict::Refused("it is paused; resume it instead"),
            (Wanted::Running, S::Failed | S::Stopped) => Verdict::Change(Wanted::Running),
            (Wanted::Running, _) => Verdict::Already,
            (Wanted::Stopped | Wanted::Deleted, _) => Verdict::Change(Wanted::Running),
        },
        Request::Stop => match wanted {
            Wanted::Stopped => Verdict::Already,
            Wanted::Running | Wanted::Paused | Wanted::Deleted => Verdict::Change(Wanted::Stopped),
        },
        Request::Restart => match (wanted, state) {
            (Wanted::Paused, _) => Verdict::Refused("it is paused; resume it first"),
            (_, S::Pending | S::Creating) => {
                Verdict::Refused("it has not been created yet; wait until it runs")
            }
            (Wanted::Running | Wanted::Stopped | Wanted::Deleted, _) => Verdict::Change(Wanted::Running),
        },
        Request::Pause => match (wanted, state) {
            (Wanted::Paused, _) => Verdict::Already,
            (Wanted::Running, S::Running) => Verdict::Change(Wanted::Paused),
            (Wanted::Running | Wanted::Stopped | Wanted::Deleted, _) => {
                Verdict::Refused("only a running instance can be paused")
            }
        },
        Request::Resume => match (wanted, state) {
            (Wanted::Paused, _) => Verdict::Change(Wanted::Running),
            (Wanted::Running, S::Running | S::Paused) => Verdict::Already,
            (Wanted::Running | Wanted::Stopped | Wanted::Deleted, _) => {
                Verdict::Refused("it is not paused; start it instead")
            }
        },
    }
}

/// How a stop is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopOptions {
    /// Do not ask the guest, pull the plug.
    pub force: bool,
    /// How long the guest may take before the plug is pulled, in seconds.
    pub timeout_seconds: u32,
}

impl StopOptions {
    /// What a guest gets when the caller does not say.
    pub const DEFAULT_TIMEOUT_SECONDS: u32 = 30;
    /// The longest that a caller may ask for.
    pub const MAX_TIMEOUT_SECONDS: u32 = 3600;
}

impl Default for StopOptions {
    fn default() -> Self {
        Self { force: false, timeout_seconds: Self::DEFAULT_TIMEOUT_SECONDS }
    }
}

/// What happens when an instance ends without being asked to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// It stays as it is.
    #[default]
    Never,
    /// Its node starts it again if it failed.
    OnFailure,
    /// Its node starts it again however it ended.
    Always,
}

impl RestartPolicy {
    /// Every policy.
    pub const ALL: [Self; 3] = [Self::Never, Self::OnFailure, Self::Always];

    /// As configuration and the command line spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::OnFailure => "on-failure",
            Self::Always => "always",
        }
    }
}

impl std::str::FromStr for RestartPolicy {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.name() == text)
            .ok_or_else(|| Invalid::new("restart_policy", text, "must be `never`, `on-failure` or `always`"))
    }
}

/// What happens when the node of an instance is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailoverPolicy {
    /// It waits for its node.
    #[default]
    Never,
    /// It is started afresh elsewhere, once it is certain that it does not run on the lost node.
    Restart,
}

impl FailoverPolicy {
    /// Every policy.
    pub const ALL: [Self; 2] = [Self::Never, Self::Restart];

    /// As configuration and the command line spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Restart => "restart",
        }
    }
}

impl std::str::FromStr for FailoverPolicy {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.name() == text)
            .ok_or_else(|| Invalid::new("failover_policy", text, "must be `never` or `restart`"))
    }
}

/// The node that an instance belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Which node.
    pub node_id: NodeId,
    /// The node is to give it up, so that it can be bound elsewhere.
    pub release: bool,
}

/// A move to another node while the instance runs. Its resources count on both nodes. Once it is bound to the target it
/// arrives there: it goes on from what was handed over, and this stays until it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// Where to.
    pub target: NodeId,
    /// The operation that does it.
    pub operation: String,
}

/// An instance as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct InstanceRecord {
    /// Which instance.
    pub id: InstanceId,
    /// Its name, unique in its project.
    pub name: String,
    /// Whose it is.
    pub project: String,
    /// What kind.
    pub instance_type: InstanceType,
    /// What it is made of. Shared: a fleet has few shapes.
    pub spec: Arc<InstanceSpec>,
    /// Labels and annotations.
    pub metadata: Arc<Metadata>,
    /// Where it may go.
    pub placement: Arc<PlacementRules>,
    /// What happens when it ends without being asked to.
    pub restart_policy: RestartPolicy,
    /// What happens when its node is lost.
    pub failover_policy: FailoverPolicy,
    /// The set it was created in; empty for none.
    pub set: String,

    /// What it is to be.
    pub wanted: Wanted,
    /// Raised with every change of what is wanted.
    pub generation: u64,
    /// The generation of the last restart asked for; 0 if none was.
    pub restart_generation: u64,
    /// How to stop it.
    pub stop: StopOptions,

    /// Where it belongs, once placed.
    pub binding: Option<Binding>,
    /// Counts the bindings.
    pub epoch: Epoch,

    /// What was seen last.
    pub state: InstanceState,
    /// Why it is so, for people; may be empty.
    pub state_reason: String,
    /// The generation that the node had finished with when it said so.
    pub observed_generation: u64,
    /// The guest's address, once known.
    pub ip_address: String,
    /// When it was asked for.
    pub created_at: SystemTime,
    /// When it last began to run.
    pub started_at: Option<SystemTime>,
    /// How often its node has started it again by itself since it was bound there.
    pub restart_count: u32,
    /// Where its node is lost: why it was not started elsewhere, or when it will be. Empty otherwise.
    pub recovery_note: String,
    /// What of its specification takes effect at the next start only, and why; empty for nothing.
    pub update_note: String,
    /// What its node still gives it, where it was made smaller and its node has not done that yet; nothing otherwise.
    pub holds: Resources,
    /// It is being moved to another node while it runs. Nothing else can be asked of it meanwhile but its deletion.
    pub migration: Option<Box<Migration>>,
    /// The revision this was read at; not part of the value.
    pub revision: Revision,
}

impl InstanceRecord {
    /// An instance of the default project that nobody has placed yet, to run, with the default policies.
    #[must_use]
    pub fn pending(id: InstanceId, name: &str, instance_type: InstanceType, spec: Arc<InstanceSpec>) -> Self {
        Self {
            id,
            name: name.to_owned(),
            project: DEFAULT_PROJECT.to_owned(),
            instance_type,
            spec,
            metadata: Arc::default(),
            placement: Arc::default(),
            restart_policy: RestartPolicy::default(),
            failover_policy: FailoverPolicy::default(),
            set: String::new(),
            wanted: Wanted::Running,
            generation: 1,
            restart_generation: 0,
            stop: StopOptions::default(),
            binding: None,
            epoch: Epoch::default(),
            state: InstanceState::Pending,
            state_reason: "waits for a node".to_owned(),
            observed_generation: 0,
            ip_address: String::new(),
            created_at: SystemTime::now(),
            started_at: None,
            restart_count: 0,
            recovery_note: String::new(),
            update_note: String::new(),
            holds: Resources::default(),
            migration: None,
            revision: Revision::default(),
        }
    }

    /// The migration by which it comes to the node that it is bound to, until it has arrived there.
    #[must_use]
    pub fn arrives_by(&self) -> Option<&Migration> {
        self.migration.as_deref().filter(|migration| self.node_id() == Some(&migration.target))
    }

    /// The node that it is moved to while it runs, where it takes room beside its own.
    #[must_use]
    pub fn moves_to(&self) -> Option<&NodeId> {
        let target = self.migration.as_deref().map(|migration| &migration.target);
        target.filter(|target| self.node_id() != Some(*target))
    }

    /// What it takes on its node: what it is to have, and what it had while it is not smaller yet.
    #[must_use]
    pub fn resources(&self) -> Resources {
        self.spec.resources().most(self.holds)
    }

    /// Keeps no more than `holds` beyond what it is to have.
    pub fn hold(&mut self, holds: Resources) {
        self.holds = if holds.fits_in(self.spec.resources()) { Resources::default() } else { holds };
    }

    /// The node it is bound to.
    #[must_use]
    pub fn node_id(&self) -> Option<&NodeId> {
        self.binding.as_ref().map(|binding| &binding.node_id)
    }

    /// Whether its node has done all that was asked.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.state.is_settled() && self.observed_generation >= self.generation
    }

    /// Checks what a user sends of it.
    ///
    /// # Errors
    /// Names the field that is refused.
    pub fn validate(&self) -> Result<(), Invalid> {
        validate::name("name", &self.name)?;
        self.metadata.validate()?;
        self.placement.validate()?;
        self.spec.validate(self.instance_type)
    }
}

/// Environment variables by name.
pub type Environment = BTreeMap<String, String>;

#[cfg(test)]
mod tests;
