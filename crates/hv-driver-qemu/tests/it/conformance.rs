//! The driver against the conformance suite, on real QEMU.

use crate::subject::two_nodes;

hv_driver::driver_conformance!(two_nodes);
