//! What can go wrong in a driver.

use hv_types::InstanceId;

/// What a driver operation returns.
pub type Result<T> = std::result::Result<T, DriverError>;

/// Why a driver operation failed.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// This node can never do it: the same request will fail again.
    #[error("instance {id} cannot be made: {reason}")]
    InvalidConfig {
        /// Which instance.
        id: InstanceId,
        /// What is wrong with which field, and what to do.
        reason: String,
    },
    /// There is no such instance here.
    #[error("instance {0} is not on this node")]
    NotFound(InstanceId),
    /// Its state does not allow it.
    #[error("instance {id} cannot {operation}: {reason}")]
    WrongState {
        /// Which instance.
        id: InstanceId,
        /// What was attempted.
        operation: &'static str,
        /// Why not, and what to do.
        reason: String,
    },
    /// The runtime cannot do this at all.
    #[error("the {driver} driver cannot {operation}: {reason}")]
    Unsupported {
        /// Which driver.
        driver: &'static str,
        /// What was attempted.
        operation: &'static str,
        /// Why not.
        reason: String,
    },
    /// The runtime is missing or broken; the text has the remedy.
    #[error("the {driver} driver is not available: {reason}")]
    Unavailable {
        /// Which driver.
        driver: &'static str,
        /// Why, and what to do.
        reason: String,
    },
    /// It failed this time; trying again may help.
    #[error("{operation} of instance {id} failed")]
    Failed {
        /// Which instance.
        id: InstanceId,
        /// What was attempted.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It took longer than its bound.
    #[error("{operation} of instance {id} was not done within {timeout_ms} ms")]
    Timeout {
        /// Which instance.
        id: InstanceId,
        /// What was attempted.
        operation: &'static str,
        /// How long was waited.
        timeout_ms: u64,
    },
}

impl DriverError {
    /// What failed this time.
    pub fn failed(
        id: &InstanceId,
        operation: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Failed { id: id.clone(), operation, source: source.into() }
    }

    /// What the instance's state does not allow.
    pub fn wrong_state(id: &InstanceId, operation: &'static str, reason: impl Into<String>) -> Self {
        Self::WrongState { id: id.clone(), operation, reason: reason.into() }
    }

    /// What this node can never run.
    pub fn invalid(id: &InstanceId, reason: impl Into<String>) -> Self {
        Self::InvalidConfig { id: id.clone(), reason: reason.into() }
    }

    /// Whether the same request may succeed later.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Failed { .. } | Self::Timeout { .. } => true,
            Self::InvalidConfig { .. }
            | Self::NotFound(_)
            | Self::WrongState { .. }
            | Self::Unsupported { .. } => false,
        }
    }
}
