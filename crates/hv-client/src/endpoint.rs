//! Where a peer is and how it is reached.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::error::{ClientError, last_cause};

/// How long a connection may take by default.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an idle connection is tried out by default.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long the peer may take to answer that.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Calls that wait for the connection before further ones are held back.
const WAITING_CALLS: usize = 1024;
/// Expected form of an address, for messages.
const EXPECTED: &str = "expected host:port, :port (this machine), http://host:port or https://host:port";

/// What is at the other end, for messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Peer {
    /// A `hypervisor-server`.
    #[default]
    Server,
    /// A `hypervisor-server`, dialled by an agent.
    ServerOfNode,
    /// A `hypervisor-agent`.
    Agent,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Server | Self::ServerOfNode => "hypervisor-server",
            Self::Agent => "hypervisor-agent",
        }
    }

    pub(crate) fn remedy(self) -> &'static str {
        match self {
            Self::Server => "is it running? set --server or HYPERVISOR_SERVER",
            Self::ServerOfNode => "is it running? set --server-addr or agent.server_addr",
            Self::Agent => "is the agent running on that node, and its gRPC port open to this machine?",
        }
    }
}

/// Certificates of a client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// PEM file of the authority that signed the peer's certificate.
    pub ca: PathBuf,
    /// PEM file of the own certificate, where the peer asks for one.
    pub cert: Option<PathBuf>,
    /// PEM file of its key.
    pub key: Option<PathBuf>,
    /// The name in the peer's certificate, where it is not the address's host.
    pub domain: Option<String>,
}

/// Where a peer is and how to talk to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// `host:port`, `:port` (meaning 127.0.0.1), `http://…` or `https://…`.
    pub endpoint: String,
    /// What is there, for messages.
    pub peer: Peer,
    /// Certificates; `None` is plain text.
    pub tls: Option<ClientTls>,
    /// How long a connection may take.
    pub connect_timeout: Duration,
    /// How long each call may take until its first answer; `None` is as long as the peer likes.
    pub request_timeout: Option<Duration>,
    /// How often an idle connection is tried out.
    pub keep_alive: Duration,
}

impl ClientOptions {
    /// Plain text with the usual timeouts.
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            peer: Peer::Server,
            tls: None,
            connect_timeout: CONNECT_TIMEOUT,
            request_timeout: None,
            keep_alive: KEEP_ALIVE,
        }
    }

    /// The URL that is dialled.
    ///
    /// # Errors
    /// [`ClientError::Endpoint`] where the text is no address, or contradicts the TLS settings.
    pub fn url(&self) -> Result<String, ClientError> {
        let refuse = |problem| ClientError::Endpoint { endpoint: shorten(&self.endpoint), problem };
        let text = self.endpoint.trim();
        let (scheme, authority) = match text.split_once("://") {
            Some(("http", _)) if self.tls.is_some() => {
                return Err(refuse(
                    "it asks for plain text, but TLS is configured; write https:// or host:port",
                ));
            }
            Some(("https", _)) if self.tls.is_none() => {
                return Err(refuse("https needs the CA certificate; set tls.ca_file"));
            }
            Some((scheme @ ("http" | "https"), rest)) => (scheme, rest.strip_suffix('/').unwrap_or(rest)),
            Some(_) => return Err(refuse(EXPECTED)),
            None => (if self.tls.is_some() { "https" } else { "http" }, text),
        };
        let authority = match authority.strip_prefix(':') {
            Some(port) => format!("127.0.0.1:{port}"),
            None => authority.to_owned(),
        };
        let parsed: http::uri::Authority = authority.parse().map_err(|_| refuse(EXPECTED))?;
        let usable = !parsed.host().is_empty() && !authority.contains('@');
        match parsed.port_u16() {
            Some(port) if usable && port > 0 => Ok(format!("{scheme}://{authority}")),
            _ => Err(refuse(EXPECTED)),
        }
    }

    /// The address as messages show it.
    pub(crate) fn shown(&self) -> String {
        self.url().unwrap_or_else(|_| shorten(&self.endpoint))
    }
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self::new(":50051")
    }
}

/// At most the longest host name with scheme and port (RFC 1035, section 2.3.4).
fn shorten(text: &str) -> String {
    text.chars().take(280).collect()
}

/// A channel that connects when it is first used, and again after it broke. Must be called within a tokio runtime.
///
/// # Errors
/// The address or the certificates cannot be used. That nobody answers shows in the calls; see [`crate::explain`].
pub fn channel(options: &ClientOptions) -> Result<Channel, ClientError> {
    Ok(endpoint(options)?.connect_lazy())
}

/// A channel that is connected.
///
/// # Errors
/// As [`channel`], and [`ClientError::Unreachable`] where nobody answers.
pub async fn connect(options: &ClientOptions) -> Result<Channel, ClientError> {
    endpoint(options)?.connect().await.map_err(|error| ClientError::Unreachable {
        peer: options.peer,
        endpoint: options.shown(),
        problem: last_cause(&error),
    })
}

fn endpoint(options: &ClientOptions) -> Result<Endpoint, ClientError> {
    let url = options.url()?;
    let mut endpoint = Endpoint::from_shared(url.clone())
        .map_err(|_| ClientError::Endpoint { endpoint: url.clone(), problem: EXPECTED })?
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        .tcp_keepalive(Some(options.keep_alive))
        .http2_keep_alive_interval(options.keep_alive)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .buffer_size(WAITING_CALLS);
    if let Some(timeout) = options.request_timeout {
        endpoint = endpoint.timeout(timeout);
    }
    if let Some(tls) = &options.tls {
        let config = tls_config(tls)?;
        endpoint =
            endpoint.tls_config(config).map_err(|source| ClientError::Tls { endpoint: url, source })?;
    }
    Ok(endpoint)
}

fn tls_config(tls: &ClientTls) -> Result<ClientTlsConfig, ClientError> {
    let mut config =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("CA certificate", &tls.ca)?));
    if let (Some(cert), Some(key)) = (&tls.cert, &tls.key) {
        let (cert, key) = (read("client certificate", cert)?, read("client key", key)?);
        config = config.identity(Identity::from_pem(cert, key));
    }
    if let Some(domain) = &tls.domain {
        config = config.domain_name(domain);
    }
    Ok(config)
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, ClientError> {
    std::fs::read(path).map_err(|source| ClientError::TlsFile { what, path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(endpoint: &str, tls: bool) -> Result<String, String> {
        let tls = tls.then(ClientTls::default);
        ClientOptions { tls, ..ClientOptions::new(endpoint) }.url().map_err(|e| e.to_string())
    }

    #[test]
    fn every_way_of_writing_an_address_is_understood() {
        for (text, tls, expected) in [
            (":50051", false, "http://127.0.0.1:50051"),
            ("node-1:1", false, "http://node-1:1"),
            ("[::1]:50051", false, "http://[::1]:50051"),
            ("http://a:1/", false, "http://a:1"),
            ("a:1", true, "https://a:1"),
            (" https://a:1", true, "https://a:1"),
        ] {
            assert_eq!(url(text, tls).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_expected_form() {
        for bad in
            ["", "a", "a:", ":", "a:0", "a:70000", "ftp://a:1", "a b:1", "http://a:1/x", "u@a:1", "::1:5"]
        {
            let refusal = url(bad, false).unwrap_err();
            assert!(refusal.contains("expected host:port"), "{bad:?}: {refusal}");
        }
    }

    #[test]
    fn an_address_that_contradicts_the_tls_settings_is_refused() {
        assert!(url("https://a:1", false).unwrap_err().contains("tls.ca_file"));
        assert!(url("http://a:1", true).unwrap_err().contains("write https://"));
    }

    #[tokio::test]
    async fn a_port_where_nobody_listens_says_what_to_do() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let options = ClientOptions::new(format!(":{port}"));
        let expected = format!(
            "cannot reach hypervisor-server at http://127.0.0.1:{port}: connection refused; \
             is it running? set --server or HYPERVISOR_SERVER"
        );
        assert_eq!(connect(&options).await.unwrap_err().to_string(), expected);

        let mut cluster = crate::Clients::new(channel(&options).unwrap()).cluster();
        let status = cluster.get_cluster_info(pbjson_types::Empty {}).await.unwrap_err();
        let error = crate::explain(&options, &status);
        assert_eq!((error.code(), error.message()), (hv_types::ErrorCode::Unavailable, expected.as_str()));
    }

    #[tokio::test]
    async fn a_missing_certificate_is_named() {
        let tls = Some(ClientTls { ca: "/nonexistent/ca.pem".into(), ..ClientTls::default() });
        let error = connect(&ClientOptions { tls, ..ClientOptions::new(":1") }).await.unwrap_err();
        assert_eq!(error.to_string(), "cannot read the CA certificate /nonexistent/ca.pem");
    }
}
