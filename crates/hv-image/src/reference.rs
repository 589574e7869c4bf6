//! Where an image comes from, as users write it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::{ImageError, Result};

/// Longest reference, in bytes; that of `spec.image`.
const MAX_REFERENCE_BYTES: usize = 512;
/// Longest tag, in bytes (distribution-spec 1.1, "Pulling manifests").
const MAX_TAG_BYTES: usize = 128;
/// Longest repository name, in bytes (distribution-spec 1.1 recommends this bound).
const MAX_REPOSITORY_BYTES: usize = 255;

/// Where an image comes from.
///
/// - `oci://host[:port]/repository[:tag][@sha256:…]`: a registry. Without tag and digest the tag is `latest`.
/// - `https://…`, `http://…` with an optional fragment `#sha256:…`: a file on a web server. Plain HTTP only
///   with a digest, and
///   only from hosts that [`StoreOptions::allowed_plain_http`](crate::StoreOptions::allowed_plain_http)
///   names.
/// - `file:///…`: a file of the node, below
///   [`StoreOptions::allowed_file_dirs`](crate::StoreOptions::allowed_file_dirs).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference(Kind);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Registry(Registry),
    Web(Web),
    File(PathBuf),
}

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Registry {
    /// `host` or `host:port`.
    pub(crate) host: String,
    pub(crate) repository: String,
    /// Empty only where there is a digest.
    pub(crate) tag: String,
    pub(crate) digest: Option<Digest>,
}

/// A file on a web server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Web {
    /// Without fragment.
    pub(crate) url: String,
    pub(crate) digest: Option<Digest>,
}

/// `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Digest(String);

impl Digest {
    const PREFIX: &'static str = "sha256:";

    pub(crate) fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self::from_hash(sha2::Sha256::digest(bytes).as_slice())
    }

    /// From the 32 bytes of a SHA-256.
    pub(crate) fn from_hash(hash: &[u8]) -> Self {
        let mut text = Self::PREFIX.to_owned();
        text.extend(hash.iter().map(|byte| format!("{byte:02x}")));
        Self(text)
    }

    pub(crate) fn hex(&self) -> &str {
        &self.0[Self::PREFIX.len()..]
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Digest {
    type Err = hv_types::Invalid;

    fn from_str(text: &str) -> Result<Self, hv_types::Invalid> {
        let is_hex =
            |hex: &str| hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match text.strip_prefix(Self::PREFIX) {
            Some(hex) if is_hex(hex) => Ok(Self(text.to_owned())),
            _ => Err(hv_types::Invalid::new(
                "digest",
                text,
                "must be `sha256:` and 64 lower-case hexadecimal digits; other algorithms are not supported",
            )),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Reference {
    /// Reads a reference.
    ///
    /// # Errors
    /// [`ImageError::InvalidReference`] says what is wrong and what is accepted.
    pub fn parse(text: &str) -> Result<Self> {
        parse(text).map(Self).map_err(|reason| ImageError::InvalidReference {
            reference: hv_types::validate::excerpt(text),
            reason,
        })
    }

    /// The digest that it carries.
    #[must_use]
    pub fn digest(&self) -> Option<&str> {
        match &self.0 {
            Kind::Registry(registry) => registry.digest.as_ref(),
            Kind::Web(web) => web.digest.as_ref(),
            Kind::File(_) => None,
        }
        .map(Digest::as_str)
    }

    pub(crate) fn kind(&self) -> &Kind {
        &self.0
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Registry(registry) => {
                write!(f, "oci://{}/{}", registry.host, registry.repository)?;
                if !registry.tag.is_empty() {
                    write!(f, ":{}", registry.tag)?;
                }
                registry.digest.as_ref().map_or(Ok(()), |digest| write!(f, "@{digest}"))
            }
            Kind::Web(web) => {
                f.write_str(&web.url)?;
                web.digest.as_ref().map_or(Ok(()), |digest| write!(f, "#{digest}"))
            }
            Kind::File(path) => write!(f, "file://{}", path.display()),
        }
    }
}

fn parse(text: &str) -> Result<Kind, String> {
    if text.len() > MAX_REFERENCE_BYTES || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!(
            "it must have at most {MAX_REFERENCE_BYTES} printable ASCII characters without spaces"
        ));
    }
    match text.split_once("://") {
        Some(("oci", rest)) => registry(rest).map(Kind::Registry),
        Some(("https" | "http", _)) => web(text).map(Kind::Web),
        Some(("file", path)) => file(path).map(Kind::File),
        _ => Err("it must begin with `oci://`, `https://`, `http://` or `file:///`".to_owned()),
    }
}

fn registry(text: &str) -> Result<Registry, String> {
    let (text, digest) = match text.split_once('@') {
        Some((text, digest)) => (text, Some(digest.parse().map_err(|e: hv_types::Invalid| e.to_string())?)),
        None => (text, None),
    };
    let (host, rest) = text
        .split_once('/')
        .ok_or("a registry and a repository are needed: `oci://host[:port]/repository[:tag]`")?;
    authority(host)?;
    let (repository, tag) = match rest.split_once(':') {
        Some((repository, tag)) => (repository, check_tag(tag)?),
        None if digest.is_some() => (rest, ""),
        None => (rest, "latest"),
    };
    if repository.len() > MAX_REPOSITORY_BYTES || !repository.split('/').all(is_component) {
        return Err(
            "a repository is lower-case letters and digits, joined by `.`, `_`, `-` or `/`".to_owned()
        );
    }
    Ok(Registry { host: host.to_owned(), repository: repository.to_owned(), tag: tag.to_owned(), digest })
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` (distribution-spec 1.1, "Pulling manifests").
fn is_component(text: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
    let separators_hold = text
        .split(|c: char| c.is_ascii() && alphanumeric(c as u8))
        .all(|gap| matches!(gap, "" | "." | "_" | "__") || gap.bytes().all(|b| b == b'-'));
    alphanumeric(first) && alphanumeric(last) && separators_hold
}

fn check_tag(tag: &str) -> Result<&str, String> {
    let bytes = tag.as_bytes();
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let ok = bytes.len() <= MAX_TAG_BYTES
        && bytes.first().is_some_and(|b| word(*b))
        && bytes.iter().all(|b| word(*b) || matches!(b, b'.' | b'-'));
    match ok {
        true => Ok(tag),
        false => {
            Err("a tag is 1 to 128 letters, digits, `_`, `.` or `-`, and begins with none of the last two"
                .to_owned())
        }
    }
}

/// `host`, `host:port` or `[address]:port`.
fn authority(text: &str) -> Result<(), String> {
    let refused = || {
        "the host must be a name or an address, with a port from 1 to 65535 if any, and nothing before it"
            .to_owned()
    };
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, "")) => (address, None),
        Some((address, port)) => (address, Some(port.strip_prefix(':').ok_or_else(refused)?)),
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.');
    let host_ok = match text.starts_with('[') {
        true => host.parse::<std::net::Ipv6Addr>().is_ok(),
        false => {
            !host.is_empty() && host.len() <= 253 && host.bytes().all(name) && !host.starts_with(['-', '.'])
        }
    };
    let port_ok =
        |port: &str| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|p| p > 0);
    (host_ok && port.is_none_or(port_ok)).then_some(()).ok_or_else(refused)
}

fn web(text: &str) -> Result<Web, String> {
    let (url, digest) = match text.split_once('#') {
        Some((url, digest)) => (url, Some(digest.parse().map_err(|e: hv_types::Invalid| e.to_string())?)),
        None => (text, None),
    };
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    let (host, path) = rest.split_once('/').ok_or("it names no file: `https://host/path`")?;
    authority(host)?;
    if path.is_empty() {
        return Err("it names no file: `https://host/path`".to_owned());
    }
    reqwest::Url::parse(url).map_err(|e| format!("it is no URL: {e}"))?;
    Ok(Web { url: url.to_owned(), digest })
}

fn file(path: &str) -> Result<PathBuf, String> {
    let parsed = Path::new(path);
    let plain = parsed.is_absolute() && !path.split('/').any(|part| part == "." || part == "..");
    match plain && parsed.file_name().is_some() && !path.contains(['?', '#', '%']) {
        true => Ok(parsed.to_owned()),
        false => {
            Err("it must be `file://` and an absolute path without `.`, `..`, `%`, `?` and `#`".to_owned())
        }
    }
}

#[cfg(test)]
mod tests;
