//! The wire contract, generated from `api/proto`, and the only conversions between it and the domain.
//!
//! - [`v1`] is the API: messages, clients and servers. Messages serialise to canonical protobuf JSON.
//! - [`store`] holds the messages that are the store's values.
//! - [`convert`] turns messages into domain values (checking what foreigners send) and back.
//! - [`status`] turns a [`hv_types::ServiceError`] into a gRPC status and back.

pub mod convert;
pub mod status;

/// Generated code, in the module tree that it expects: one module per part of the package name.
mod generated {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::wildcard_imports, reason = "generated")]
    #![allow(clippy::cloned_instead_of_copied, clippy::uninlined_format_args, reason = "generated")]

    pub mod v1 {
        tonic::include_proto!("hypervisor.v1");
        include!(concat!(env!("OUT_DIR"), "/hypervisor.v1.serde.rs"));
    }

    pub mod store {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/hypervisor.store.v1.rs"));
            include!(concat!(env!("OUT_DIR"), "/hypervisor.store.v1.serde.rs"));
        }
    }
}

pub use generated::store::v1 as store;
pub use generated::v1;
/// `google.protobuf.Empty`.
pub use pbjson_types::Empty;

/// The descriptors of every contract, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Largest message that any of our services takes or sends, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
