//! The driver against the conformance suite, on a real containerd.

use crate::subject::setup;

hv_driver::driver_conformance!(setup);
