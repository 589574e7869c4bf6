//! The driver where it runs nothing.

use hv_machine::{Absence, Absent};
use hv_types::InstanceType;

use crate::{FirecrackerOptions, NAME};

impl Absence for FirecrackerOptions {
    const NAME: &'static str = NAME;
    const INSTANCE_TYPE: InstanceType = InstanceType::Microvm;
}

/// The driver, which refuses everything here.
pub type FirecrackerDriver = Absent<FirecrackerOptions>;
