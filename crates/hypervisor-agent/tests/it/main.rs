//! The real agent against a fake control plane, with the scriptable fake driver.

mod config;
mod control;
mod crashes;
mod failures;
#[cfg(target_os = "linux")]
mod fencing;
mod lifecycle;
mod local;
mod migration;
mod node;
mod policies;
mod registration;
mod releases;
mod snapshots;
mod updates;
