//! The driver where it runs nothing.

use hv_machine::{Absence, Absent};
use hv_types::InstanceType;

use crate::{LibvirtOptions, NAME};

impl Absence for LibvirtOptions {
    const NAME: &'static str = NAME;
    const INSTANCE_TYPE: InstanceType = InstanceType::Vm;
    const REASON: &'static str =
        "this program was built without libvirt; build it with `make all-with-libvirt`, on Linux";
}

/// The driver, which refuses everything here.
pub type LibvirtDriver = Absent<LibvirtOptions>;
