//! Layered configuration: flag over environment over file over default, each value with its origin.
//!
//! A program writes its settings as plain serde structs with a `Default`, collects the [`Sources`], and gets its
//! [`Loaded`] settings or a [`ConfigError`] that names the place, the key, what was found and what was expected.
//!
//! # Theory of operation
//! The default value is serialized into a tree whose structs are sections and whose other values are leaves. The set
//! of leaves is the set of known keys, and from it follow the names of the environment variables
//! (`server.grpc_address` is `HYPERVISOR_SERVER_GRPC_ADDRESS`), so an underscore is never ambiguous. File,
//! environment and flags are laid over that tree, and the result is deserialized. A value stays text until its type
//! asks for it, hence `HYPERVISOR_NODE_ID=007` is a name where the type is text and 7 where it is a number.
//!
//! # How values are written
//! - The file: YAML without anchors and tags, at most [`MAX_FILE_BYTES`]. An empty value leaves an option unset.
//! - Environment and flags: lists `a,b` or `[a,b]`, maps `k=v,k2=v2`; an empty text leaves an option unset and a list
//!   or map empty.
//!
//! # Example
//! ```
//! use std::collections::BTreeMap;
//!
//! use hv_config::{HumanDuration, ListenAddress, Sources};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Debug, Default, Serialize, Deserialize)]
//! #[serde(deny_unknown_fields, default)]
//! struct Settings {
//!     server: Server,
//!     labels: BTreeMap<String, String>,
//!     node_id: Option<String>,
//! }
//!
//! #[derive(Debug, Serialize, Deserialize)]
//! #[serde(deny_unknown_fields, default)]
//! struct Server {
//!     grpc_address: ListenAddress,
//!     drain: HumanDuration,
//! }
//!
//! impl Default for Server {
//!     fn default() -> Self {
//!         Self { grpc_address: ListenAddress::all(50051), drain: HumanDuration::from_secs(30) }
//!     }
//! }
//!
//! let grpc_address: Option<&str> = Some("127.0.0.1:0"); // as clap parsed it
//! let loaded = Sources::new()
//!     .text("server.yaml", "server:\n  drain: 5s\n") // or .file(args.config)
//!     .environment([("HYPERVISOR_LABELS", "rack=r7,disk=ssd")]) // or std::env::vars_os()
//!     .flag("server.grpc_address", "--grpc-address", grpc_address)
//!     .load::<Settings>()?;
//!
//! assert_eq!(loaded.value.server.drain, HumanDuration::from_secs(5));
//! assert_eq!(loaded.value.labels["rack"], "r7");
//! assert_eq!(loaded.origin("server.grpc_address").to_string(), "flag --grpc-address");
//! assert_eq!(loaded.origin("server.drain").to_string(), "file server.yaml:2");
//! println!("{}", loaded.to_table());
//! # Ok::<(), hv_config::ConfigError>(())
//! ```

mod error;
mod example;
mod read;
mod shape;
mod sources;
mod tree;
mod value;
mod yaml;

pub use error::ConfigError;
pub use example::{example_differences, keys_of_yaml};
pub use sources::{ENVIRONMENT_PREFIX, Loaded, MAX_FILE_BYTES, Row, Sources};
pub use tree::Origin;
pub use value::{ByteSize, HumanDuration, ListenAddress, ListenHost, ResolveError, Secret, ValueError};
