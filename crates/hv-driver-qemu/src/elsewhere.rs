//! The driver where it runs nothing.

use hv_machine::{Absence, Absent};
use hv_types::InstanceType;

use crate::{NAME, QemuOptions};

impl Absence for QemuOptions {
    const NAME: &'static str = NAME;
    const INSTANCE_TYPE: InstanceType = InstanceType::Vm;
}

/// The driver, which refuses everything here.
pub type QemuDriver = Absent<QemuOptions>;
