//! HTTP as the store speaks it: TLS unless an operator allows otherwise, redirects followed one by one,
//! credentials never taken to another
//! host, every answer bounded.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Response, StatusCode, Url};

use crate::layout;
use crate::{ImageError, Result, StoreOptions};

/// Most redirects of one request.
const MAX_REDIRECTS: usize = 5;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A server that sends nothing for so long is given up.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest file of certificates, in bytes.
const MAX_CA_BYTES: u64 = 4 << 20;

/// Why a request had no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    /// Trying again may help.
    #[error("{0}")]
    Transient(String),
    /// The request failed on its way.
    #[error("the request failed")]
    Sent(#[source] reqwest::Error),
    /// The configuration does not let it be asked.
    #[error("{0}")]
    NotAllowed(String),
    /// The server misbehaves; it would again.
    #[error("{0}")]
    Refused(String),
}

/// A client for one pull.
#[derive(Clone)]
pub(crate) struct Http {
    client: reqwest::Client,
    plain: Vec<String>,
}

impl Http {
    pub(crate) fn new(options: &StoreOptions) -> Result<Self> {
        let setup = |reason: String| {
            ImageError::io("set up TLS with", options.ca_file.clone().unwrap_or_default())(
                std::io::Error::other(reason),
            )
        };
        let mut roots = rustls::RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(path) = &options.ca_file {
            use rustls::pki_types::CertificateDer;
            use rustls::pki_types::pem::PemObject as _;
            let pem = layout::read_bounded(path, MAX_CA_BYTES)?;
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                let certificate = certificate.map_err(|e| setup(e.to_string()))?;
                roots.add(certificate).map_err(|e| setup(e.to_string()))?;
            }
        }
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| setup(e.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .no_proxy()
            .user_agent(concat!("hypervisor/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build()
            .map_err(|e| setup(e.to_string()))?;
        Ok(Self { client, plain: options.allowed_plain_http.clone() })
    }

    /// Whether plain HTTP is spoken to `host[:port]`.
    pub(crate) fn is_plain(&self, authority: &str) -> bool {
        let host = match authority.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
            _ => authority,
        };
        self.plain.iter().any(|allowed| allowed == authority || allowed == host)
    }

    fn check(&self, url: &Url) -> Result<(), HttpError> {
        let authority = authority(url);
        match url.scheme() {
            "https" => Ok(()),
            "http" if self.is_plain(&authority) => Ok(()),
            "http" => Err(HttpError::NotAllowed(format!(
                "plain HTTP to {authority} is not allowed; use `https://`, or add the host to `allowed_plain_http`"
            ))),
            scheme => Err(HttpError::Refused(format!("it leads to a URL with the scheme {scheme}"))),
        }
    }

    /// Asks for `url`, and for what it leads to. `authorization` goes to the first host only.
    pub(crate) async fn get(
        &self,
        mut url: Url,
        headers: HeaderMap,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, HttpError> {
        let first = url.origin();
        for _ in 0..=MAX_REDIRECTS {
            self.check(&url)?;
            let mut request = self.client.get(url.clone()).headers(headers.clone());
            if let Some(authorization) = authorization.filter(|_| url.origin() == first) {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = request.send().await.map_err(|e| HttpError::Sent(e.without_url()))?;
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            let target = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            let target = target.ok_or_else(|| HttpError::Refused("it redirects to nowhere".to_owned()))?;
            let next =
                url.join(target).map_err(|e| HttpError::Refused(format!("it redirects to no URL: {e}")))?;
            if url.scheme() == "https" && next.scheme() != "https" {
                return Err(HttpError::Refused(format!("it redirects from TLS to {}", next.scheme())));
            }
            url = next;
        }
        Err(HttpError::Refused(format!("it redirects more than {MAX_REDIRECTS} times")))
    }
}

/// Reads an answer of at most `max_bytes`.
pub(crate) async fn read_bounded(response: Response, max_bytes: u64) -> Result<Bytes, HttpError> {
    let too_large = || HttpError::Refused(format!("its answer has more than {max_bytes} bytes"));
    if response.content_length().is_some_and(|length| length > max_bytes) {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    let mut body = response.bytes_stream();
    while let Some(chunk) = body.next().await {
        bytes.extend_from_slice(&chunk.map_err(HttpError::Sent)?);
        if bytes.len() as u64 > max_bytes {
            return Err(too_large());
        }
    }
    Ok(bytes.into())
}

/// Whether another attempt may have another answer.
pub(crate) fn is_worth_retrying(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::SEE_OTHER
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT
    )
}

/// `host` or `host:port`.
pub(crate) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// A URL for messages: without its query, which may hold a signature.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}
