//! The image store against a real registry, a web server that misbehaves on purpose, and hostile images.

mod crash;
mod disks;
mod fixture;
mod hostile;
mod layers;
mod oci;
mod registry;
mod server;
mod upkeep;
mod web;
