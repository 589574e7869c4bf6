//! The integration tests of hv-config: what a program and its user see.

mod example;
mod files;
mod layers;
mod settings;
