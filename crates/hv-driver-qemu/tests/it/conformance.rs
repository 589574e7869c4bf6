//! The driver against the conformance suite, on real QEMU.

use crate::subject::setup;

hv_driver::driver_conformance!(setup);
