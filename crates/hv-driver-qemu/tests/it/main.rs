//! The QEMU driver on real QEMU: the conformance suite, what only QEMU can show, and a real Linux guest.

mod conformance;
mod crash;
mod linux_guest;
mod real_qemu;
mod subject;
