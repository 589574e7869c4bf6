//! An address to listen on: `:50051`, `0.0.0.0:50051`, `[::1]:50051`, `localhost:50051`.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use super::{ValueError, text_serde};

const EXPECTED: &str = "an address as :50051 (all interfaces), 127.0.0.1:50051, [::1]:50051 or localhost:50051, with a port up to 65535";

/// The longest host name (RFC 1035, section 2.3.4).
const MAX_NAME_BYTES: usize = 253;

/// Where to listen. `Display` keeps the form in which it was written; port 0 lets the system choose.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ListenAddress {
    host: ListenHost,
    port: u16,
}

/// The part before the port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ListenHost {
    /// Nothing is written: all interfaces, IPv6 and IPv4.
    All,
    /// An IP address.
    Ip(IpAddr),
    /// A host name.
    Name(String),
}

/// A host name that stands for no address.
#[derive(Debug, thiserror::Error)]
#[error("cannot resolve the address {address:?} to listen on")]
pub struct ResolveError {
    /// The address as written.
    address: String,
    /// What the resolver said.
    source: io::Error,
}

impl ListenAddress {
    /// All interfaces.
    pub const fn all(port: u16) -> Self {
        Self { host: ListenHost::All, port }
    }

    /// One IP address.
    pub const fn ip(ip: IpAddr, port: u16) -> Self {
        Self { host: ListenHost::Ip(ip), port }
    }

    /// `127.0.0.1`.
    pub const fn loopback(port: u16) -> Self {
        Self::ip(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
    }

    /// The part before the port.
    pub const fn host(&self) -> &ListenHost {
        &self.host
    }

    /// The port; 0 lets the system choose.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Whether only programs on this machine can reach it, as far as the text tells.
    pub fn is_loopback(&self) -> bool {
        match &self.host {
            ListenHost::All => false,
            ListenHost::Ip(ip) => ip.is_loopback(),
            ListenHost::Name(name) => name.eq_ignore_ascii_case("localhost"),
        }
    }

    /// The socket addresses to try in this order until one can be bound, as `TcpListener::bind(&addresses[..])`
    /// does; never empty. All interfaces means `[::]` (which takes IPv4 too on a usual system), then `0.0.0.0` for
    /// systems without IPv6. A host name asks the system's resolver and may block.
    ///
    /// # Errors
    /// [`ResolveError`] for a host name without an address.
    pub fn resolve(&self) -> Result<Vec<SocketAddr>, ResolveError> {
        let failed = |source| ResolveError { address: self.to_string(), source };
        match &self.host {
            ListenHost::All => {
                let hosts = [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)];
                Ok(hosts.map(|host| SocketAddr::new(host, self.port)).to_vec())
            }
            ListenHost::Ip(ip) => Ok(vec![SocketAddr::new(*ip, self.port)]),
            ListenHost::Name(name) => {
                let addresses: Vec<SocketAddr> =
                    (name.as_str(), self.port).to_socket_addrs().map_err(failed)?.collect();
                if addresses.is_empty() {
                    return Err(failed(io::Error::new(io::ErrorKind::NotFound, "the name has no address")));
                }
                Ok(addresses)
            }
        }
    }
}

impl From<SocketAddr> for ListenAddress {
    fn from(address: SocketAddr) -> Self {
        Self::ip(address.ip(), address.port())
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = self.port;
        match &self.host {
            ListenHost::All => write!(f, ":{port}"),
            ListenHost::Ip(IpAddr::V4(ip)) => write!(f, "{ip}:{port}"),
            ListenHost::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:{port}"),
            ListenHost::Name(name) => write!(f, "{name}:{port}"),
        }
    }
}

impl FromStr for ListenAddress {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        parse(text.trim()).ok_or_else(|| ValueError::new(text, EXPECTED))
    }
}

fn parse(text: &str) -> Option<ListenAddress> {
    let (host, port) = text.rsplit_once(':')?;
    // `u16::from_str` alone would take `+80`.
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let port = port.parse().ok()?;
    let host = if host.is_empty() {
        ListenHost::All
    } else if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        ListenHost::Ip(IpAddr::V6(inner.parse().ok()?))
    } else if let Ok(ip) = host.parse::<Ipv4Addr>() {
        ListenHost::Ip(IpAddr::V4(ip))
    } else if is_host_name(host) {
        ListenHost::Name(host.to_owned())
    } else {
        return None;
    };
    Some(ListenAddress { host, port })
}

/// RFC 1123, section 2.1. A name whose last label is digits is a mistyped IPv4 address.
fn is_host_name(name: &str) -> bool {
    let is_label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last_is_number =
        name.rsplit('.').next().is_some_and(|label| label.bytes().all(|byte| byte.is_ascii_digit()));
    name.len() <= MAX_NAME_BYTES && name.split('.').all(is_label) && !last_is_number
}

text_serde!(ListenAddress, EXPECTED);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_address_keeps_the_form_in_which_it_was_written() {
        for text in
            [":50051", ":0", "0.0.0.0:50051", "[::1]:1", "[::]:65535", "localhost:80", "node-1.example:8080"]
        {
            assert_eq!(text.parse::<ListenAddress>().map(|address| address.to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn a_malformed_address_is_refused_with_an_example() {
        for text in [
            "",
            "50051",
            "localhost",
            ":",
            ":x",
            ":65536",
            ":-1",
            ":+80",
            "::1:80",
            "[::1]",
            "[x]:1",
            "1.2.3:80",
            "256.0.0.1:80",
            "a b:80",
            "-a:80",
            "http://a:80",
            "ä:80",
        ] {
            let message = text.parse::<ListenAddress>().map_err(|error| error.to_string()).expect_err(text);
            assert!(message.contains("[::1]:50051") && message.contains(&format!("{text:?}")), "{message}");
        }
    }

    #[test]
    fn no_host_means_all_interfaces() {
        let addresses = ListenAddress::all(80).resolve().unwrap();
        let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["[::]:80", "0.0.0.0:80"]);
        assert!(!ListenAddress::all(80).is_loopback());
    }

    #[test]
    fn an_ip_resolves_to_itself_and_localhost_to_loopback() {
        assert_eq!(ListenAddress::loopback(7).resolve().unwrap(), ["127.0.0.1:7".parse().unwrap()]);
        let localhost: ListenAddress = "localhost:7".parse().unwrap();
        assert!(localhost.is_loopback());
        assert!(localhost.resolve().unwrap().iter().all(|address| address.ip().is_loopback()));
    }

    #[test]
    fn a_name_without_an_address_is_named_in_the_error() {
        let error = "no-such-host.invalid:80".parse::<ListenAddress>().unwrap().resolve().unwrap_err();
        assert!(error.to_string().contains("no-such-host.invalid:80"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused_and_what_is_read_reads_back(text in "\\PC*") {
            if let Ok(address) = text.parse::<ListenAddress>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }

        #[test]
        fn every_socket_address_is_an_address(ip: IpAddr, port: u16) {
            let address = SocketAddr::new(ip, port);
            let read: ListenAddress = address.to_string().parse().unwrap();
            prop_assert_eq!(read.resolve().unwrap(), vec![address]);
        }
    }
}
