//! The driver where it runs nothing.

use hv_machine::{Absence, Absent};
use hv_types::InstanceType;

use crate::{ContainerdOptions, NAME};

impl Absence for ContainerdOptions {
    const NAME: &'static str = NAME;
    const INSTANCE_TYPE: InstanceType = InstanceType::Container;
}

/// The driver, which refuses everything here.
pub type ContainerdDriver = Absent<ContainerdOptions>;
