//! The vocabulary of Hypervisor: identifiers, specifications, states and their transitions, units and error codes.
//!
//! Nothing here does I/O, knows gRPC or touches the store. A type that crosses a boundary is converted
//! in `hv-proto`; a decision about a state is made here, once, and derived everywhere else.

pub mod device;
pub mod error;
pub mod event;
pub mod id;
pub mod image;
pub mod instance;
pub mod label;
pub mod node;
pub mod operation;
pub mod placement;
pub mod resources;
pub mod validate;

pub use device::{DeviceGrant, DeviceInventory, DeviceNeeds};
pub use error::{ErrorCode, ServiceError};
pub use event::Event;
pub use id::{ClusterId, Epoch, InstanceId, NodeId, RequestKey, Revision};
pub use image::ImageInfo;
pub use instance::{
    CloneOrigin, DiskSpec, Firmware, HealthCheck, InstanceRecord, InstanceSpec, InstanceState, InstanceType,
    NetworkSpec, ResourceLimits, VolumeMount, Wanted,
};
pub use label::{Labels, Metadata, Selector};
pub use node::{DriverInfo, NodeCondition, NodeRecord, NodeRole, NodeStatus};
pub use operation::{OperationKind, OperationRecord, OperationState};
pub use placement::PlacementRules;
pub use resources::Resources;
pub use validate::Invalid;
