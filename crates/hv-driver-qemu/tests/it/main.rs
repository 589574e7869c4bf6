//! The QEMU driver on real QEMU: the conformance suite, what only QEMU can show, and a real Linux guest.

mod changes;
mod conformance;
mod crash;
mod linux_guest;
mod migration;
mod real_qemu;
mod subject;
