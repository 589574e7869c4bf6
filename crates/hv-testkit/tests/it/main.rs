//! End to end: the real programs as processes of their own, against real stores and real QEMU.

mod capacity;
mod crash;
mod life;
mod nodes;
mod readme;
mod stores;
