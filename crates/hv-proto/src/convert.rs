//! Conversions between messages and domain values.
//!
//! What foreigners send is checked on the way in, and a refusal names the field as the message spells it. Values that
//! the domain cannot hold (a negative size) are refused; nothing is clamped silently.

mod common;
mod device;
mod event;
mod instance;
mod node;
mod operation;
mod placement;

pub use common::{from_timestamp, labels_from, resources_from, resources_to, selector_from, to_timestamp};
pub use device::{inventory_from, inventory_to, needs_from, needs_to};
pub use event::{event_to, events_from_record, events_to_record};
pub use instance::{
    assignment_to, create_request_from, instance_from_record, instance_to, instance_to_record,
    instance_type_from, instance_type_to, metadata_from, metadata_to, project_from, spec_from, spec_to,
    state_from, state_to, wanted_from, wanted_to,
};
pub use node::{
    NodeView, condition_from, condition_to, driver_from, driver_to, fencing_from, image_from, image_to,
    node_from_record, node_from_registration, node_to, node_to_record, role_from, role_to, status_from,
    status_to,
};

pub use operation::{
    operation_from_record, operation_state_from, operation_state_to, operation_to, operation_to_record,
};
pub use placement::{
    failover_policy_from, failover_policy_to, overcommit_from, overcommit_to, placement_from, placement_to,
    restart_policy_from, restart_policy_to, taint_from, taint_to,
};

/// The version of the records that this code writes, and the highest that it reads.
pub const RECORD_SCHEMA: u32 = 1;

/// A record that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It was written by a newer release.
    #[error(
        "the record has schema {found}, this release reads up to {RECORD_SCHEMA}: upgrade this server first"
    )]
    Newer {
        /// The schema found.
        found: u32,
    },
    /// It is not a message of its kind.
    #[error("the record is not a valid message")]
    Malformed(#[from] prost::DecodeError),
    /// A field has a value that it can never have.
    #[error("the record contradicts itself")]
    Invalid(#[from] hv_types::Invalid),
}

fn check_schema(found: u32) -> Result<(), RecordError> {
    if found > RECORD_SCHEMA { Err(RecordError::Newer { found }) } else { Ok(()) }
}
