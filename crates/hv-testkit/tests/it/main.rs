//! End to end: the real programs as processes of their own, against real stores and real QEMU.

mod capacity;
mod chaos;
mod crash;
mod disks;
mod life;
mod links;
mod nodes;
mod readme;
mod simulation;
mod stores;
