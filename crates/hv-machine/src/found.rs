//! What is there of an instance.

use std::sync::Arc;

use hv_driver::{DriverError, Result};
use hv_types::InstanceId;

/// What is there of an instance, which is an `M` where it is whole.
pub enum Found<M> {
    /// Nothing.
    Nothing,
    /// Half created, or half deleted.
    Part,
    /// It was completely created.
    Whole(Arc<M>),
}

impl<M> Found<M> {
    /// The instance for an operation that needs a whole one.
    ///
    /// # Errors
    /// [`DriverError::NotFound`], and [`DriverError::WrongState`] of a part.
    pub fn whole(self, id: &InstanceId, operation: &'static str) -> Result<Arc<M>> {
        match self {
            Self::Nothing => Err(DriverError::NotFound(id.clone())),
            Self::Part => {
                Err(DriverError::wrong_state(id, operation, "it was not completely created; create it again"))
            }
            Self::Whole(machine) => Ok(machine),
        }
    }
}

/// Refuses a record of an instance that is of a version above the one that is known.
///
/// # Errors
/// [`DriverError::InvalidConfig`], with the remedy.
pub fn check_version(id: &InstanceId, version: u32, known: u32) -> Result<()> {
    if version > known {
        let reason = format!("it was made by a newer version of the agent ({version}); run that one");
        return Err(DriverError::invalid(id, reason));
    }
    Ok(())
}
