//! What can go wrong with images. Every message names the image, what is wrong with it and what to do about
//! it.

use std::io;
use std::path::PathBuf;

/// The result of an operation on images.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;

/// Why an image could not be fetched, kept, handed out or removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A text that names no image.
    #[error("{reference} is no image reference: {reason}")]
    InvalidReference {
        /// The text, shortened.
        reference: String,
        /// What is wrong and what is accepted.
        reason: String,
    },
    /// A name or digest that cannot be used.
    #[error("{0}")]
    Invalid(hv_types::Invalid),
    /// The node's configuration does not let it be fetched.
    #[error("image {image} is not allowed on this node: {reason}")]
    NotAllowed {
        /// The reference.
        image: String,
        /// The rule, and the option that changes it.
        reason: String,
    },
    /// Nothing of this name is in the store.
    #[error("image {image} is not in this node's store for a {instance_type}; pull it first")]
    NotFound {
        /// The name.
        image: String,
        /// The type that was asked for.
        instance_type: hv_types::InstanceType,
    },
    /// Its source does not have it.
    #[error("image {image} does not exist: {source_says}")]
    NotAtSource {
        /// The reference.
        image: String,
        /// Who says so, and how.
        source_says: String,
    },
    /// Its source wants credentials, or other ones.
    #[error("image {image}: {host} denies access; check the credentials of this node for it")]
    Denied {
        /// The reference.
        image: String,
        /// The registry or web server.
        host: String,
    },
    /// It is dangerous or malformed. Nothing of it stays.
    #[error("image {image} is refused: {reason}")]
    Refused {
        /// The reference.
        image: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// Its bytes are not those that its digest promises.
    #[error(
        "image {image} is refused: {what} has the digest {actual} instead of {expected}; its source is damaged or not what it claims to be"
    )]
    DigestMismatch {
        /// The reference.
        image: String,
        /// Which part.
        what: String,
        /// What was promised.
        expected: String,
        /// What came.
        actual: String,
    },
    /// It exceeds a bound of the store.
    #[error(
        "image {image} is refused: {what} exceeds {limit}; raise `{option}` if it is meant to be so large"
    )]
    TooLarge {
        /// The reference.
        image: String,
        /// What is too large.
        what: String,
        /// The bound, with its unit.
        limit: String,
        /// The option that sets it.
        option: &'static str,
    },
    /// Fetching it would fill the disk.
    #[error(
        "image {image}: {free_bytes} bytes are free in the store and {min_free_bytes} must stay free; remove images or make the disk larger"
    )]
    NoSpace {
        /// The reference.
        image: String,
        /// What is free now.
        free_bytes: u64,
        /// What must stay free.
        min_free_bytes: u64,
    },
    /// It cannot be what it is meant for.
    #[error("image {image} cannot be used: {reason}")]
    Unsupported {
        /// The reference.
        image: String,
        /// Why, and what can.
        reason: String,
    },
    /// Instances use it.
    #[error("image {image} is in use by {users}; delete them first")]
    InUse {
        /// The name.
        image: String,
        /// The instances, some of them.
        users: String,
    },
    /// Its source could not be reached, or broke off, too often. A later pull goes on where this one stopped.
    #[error("image {image} could not be fetched from {url}")]
    Transport {
        /// The reference.
        image: String,
        /// What was asked for, without its query.
        url: String,
        /// The last failure.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A program that converts images failed.
    #[error("image {image}: {program} failed: {reason}")]
    Tool {
        /// The reference.
        image: String,
        /// The program.
        program: &'static str,
        /// What it said, or how it ended.
        reason: String,
    },
    /// The caller gave up. What has arrived is kept for a while.
    #[error("the fetch of image {image} was cancelled")]
    Cancelled {
        /// The reference.
        image: String,
    },
    /// A file that the store holds is not what it was when it was stored.
    #[error("image {image} is damaged on this node: {path} {reason}; delete it and pull it again")]
    Damaged {
        /// The name.
        image: String,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Another process has the store open.
    #[error("the image store {dir} is open in another process; only one agent may use it")]
    Locked {
        /// The store.
        dir: PathBuf,
    },
    /// The store was written by a newer version.
    #[error(
        "{path} has the format {version}, which this version does not know; use the version that wrote it"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        version: u32,
    },
    /// A file of the store, of the configuration or of a source could not be used.
    #[error("cannot {what} {path}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl ImageError {
    /// Whether the same call may succeed later without anybody changing anything.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Transport { .. } | Self::Cancelled { .. } | Self::NoSpace { .. } | Self::Locked { .. } => {
                true
            }
            Self::InvalidReference { .. }
            | Self::Invalid(_)
            | Self::NotAllowed { .. }
            | Self::NotFound { .. }
            | Self::NotAtSource { .. }
            | Self::Denied { .. }
            | Self::Refused { .. }
            | Self::DigestMismatch { .. }
            | Self::TooLarge { .. }
            | Self::Unsupported { .. }
            | Self::InUse { .. }
            | Self::Tool { .. }
            | Self::Damaged { .. }
            | Self::Newer { .. }
            | Self::Io { .. } => false,
        }
    }

    /// For `map_err`: `what` was attempted on `path`.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }

    pub(crate) fn refused(image: impl ToString, reason: impl Into<String>) -> Self {
        Self::Refused { image: image.to_string(), reason: reason.into() }
    }

    /// Whether what was fetched is of no use to a later pull of the same image.
    pub(crate) fn condemns(&self) -> bool {
        matches!(
            self,
            Self::Refused { .. }
                | Self::DigestMismatch { .. }
                | Self::TooLarge { .. }
                | Self::Unsupported { .. }
                | Self::Tool { .. }
        )
    }
}

impl From<hv_types::Invalid> for ImageError {
    fn from(invalid: hv_types::Invalid) -> Self {
        Self::Invalid(invalid)
    }
}
