//! The real agent against a fake control plane, with the scriptable fake driver.

mod config;
mod control;
mod crashes;
mod failures;
mod lifecycle;
mod local;
mod node;
mod registration;
mod releases;
