//! A node's image store: fetches images from registries, web servers, directories and uploads, verifies
//! them, converts
//! them to what the runtimes start from, and keeps them, content-addressed and read-only.
//!
//! # Theory of operation
//! [`Store::pull`] and [`Store::import`] bring an image under a *name* for a *type of instance*. Its bytes
//! arrive as
//! *blobs* (named by their SHA-256, `blobs/sha256/`), from which a *form* is made (`forms/`): what a driver
//! opens, as
//! [`hv_driver::ImageContent`] says:
//!
//! | for | from | becomes |
//! |---|---|---|
//! | [`Vm`](hv_types::InstanceType::Vm) | raw, qcow2 | a disk, as it is |
//! | `Vm` | vmdk, vhd, vhdx | a disk, converted to qcow2 |
//! | [`Container`](hv_types::InstanceType::Container) | an OCI image | an OCI image layout |
//! | [`Microvm`](hv_types::InstanceType::Microvm) | an OCI image | an ext4 root file system |
//! | `Microvm` | an ELF file | a kernel |
//! | `Microvm` | raw, qcow2, vmdk, vhd, vhdx | a raw disk |
//!
//! [`Store::acquire`] hands a form to an instance and writes down that it did, so that neither
//! [`Store::delete`] nor
//! [`Store::collect`] takes it away before [`Store::release`].
//!
//! # Invariants
//! - What has its final name is complete, verified, synced and read-only. Everything is written under
//!   another name first.
//! - A blob's name is the SHA-256 of its content. Nothing is parsed, unpacked or converted before it was
//!   verified.
//! - Image files are hostile: nothing of them names a file outside of the store, no tool sees a file before
//!   its header was
//!   checked here, tools run confined (`confine`), and everything is bounded by [`StoreOptions`].
//! - A name always means one form; an instance keeps the form that it acquired, also when the name gets a
//!   newer one.
//!
//! # Failure and recovery
//! A crash at any point leaves a store that opens: what is not complete is either a partial download, which
//! the next pull
//! goes on with from its last synced offset, or is swept away by [`Store::open`].

mod collect;
mod confine;
mod convert;
mod disk;
mod download;
mod error;
mod flight;
mod form;
mod header;
mod http;
mod incoming;
mod job;
mod layer;
mod layout;
mod manifest;
mod oci;
mod options;
mod progress;
mod pull;
mod record;
mod reference;
mod registry;
mod retry;
mod rootfs;
mod state;
mod store;
mod tar;
mod unpack;
mod upload;

pub use error::{ImageError, Result};
pub use options::StoreOptions;
pub use progress::{Phase, Progress};
pub use reference::Reference;
pub use store::{Collected, ImportRequest, PullRequest, Store, StoredImage};
