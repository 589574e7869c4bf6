//! End to end: the real programs as processes of their own, against real stores and real QEMU.

mod capacity;
mod chaos;
mod clones;
mod crash;
mod devices;
mod disks;
mod images;
mod life;
mod links;
mod migrate;
mod moves;
mod nodes;
mod readme;
mod runtimes;
mod simulation;
mod stores;
mod supervision;
mod survival;
mod updates;
