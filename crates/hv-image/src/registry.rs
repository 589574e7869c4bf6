//! A registry (OCI distribution-spec 1.1, pull only), and the tokens that it wants (RFC 6750; RFC 7617).

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use parking_lot::Mutex;
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};
use tokio_util::sync::CancellationToken;

use crate::http::{self, Http, HttpError};
use crate::layout;
use crate::manifest::MEDIA_TYPES;
use crate::reference::Registry as Place;
use crate::retry::Retry;
use crate::{ImageError, Result};

/// Largest manifest or index, in bytes: what the distribution-spec asks registries to take.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Largest answer of a token server, in bytes.
const MAX_TOKEN_BYTES: u64 = 64 << 10;
/// Largest file of credentials, in bytes.
const MAX_CREDENTIALS_BYTES: u64 = 1 << 20;

/// Names and passwords by registry, from docker's `config.json`.
#[derive(Default)]
pub(crate) struct Credentials(BTreeMap<String, String>);

impl Credentials {
    pub(crate) fn read(path: Option<&Path>) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Config {
            #[serde(default)]
            auths: BTreeMap<String, Auth>,
        }
        #[derive(serde::Deserialize)]
        struct Auth {
            #[serde(default)]
            auth: String,
            #[serde(default)]
            username: String,
            #[serde(default)]
            password: String,
        }
        let Some(path) = path else { return Ok(Self::default()) };
        let bytes = layout::read_bounded(path, MAX_CREDENTIALS_BYTES)?;
        // The parser's message would repeat a piece of the file.
        let malformed =
            |_| ImageError::io("decode", path)(std::io::Error::other("it is not docker's config.json"));
        let config: Config = serde_json::from_slice(&bytes).map_err(malformed)?;
        let basic = |auth: Auth| match auth.auth.is_empty() {
            true => STANDARD.encode(format!("{}:{}", auth.username, auth.password)),
            false => auth.auth,
        };
        // Docker writes some hosts as URLs.
        let host = |name: String| {
            let name = name.trim_start_matches("https://").trim_start_matches("http://");
            name.split('/').next().unwrap_or_default().to_owned()
        };
        Ok(Self(config.auths.into_iter().map(|(name, auth)| (host(name), basic(auth))).collect()))
    }

    fn basic(&self, host: &str) -> Option<HeaderValue> {
        // Docker's own registry goes by several names.
        let names = [host, if host == "registry-1.docker.io" { "index.docker.io" } else { host }];
        let encoded = names.iter().find_map(|name| self.0.get(*name))?;
        sensitive(&format!("Basic {encoded}"))
    }
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// One repository of one registry, asked by one pull.
pub(crate) struct Repository {
    http: Http,
    image: String,
    /// `host[:port]` as it is spoken to.
    host: String,
    name: String,
    basic: Option<HeaderValue>,
    token: Mutex<Option<HeaderValue>>,
    cancel: CancellationToken,
}

impl Repository {
    /// `host` is the registry of `place`, or a mirror of it.
    pub(crate) fn new(
        http: &Http,
        (image, place, host): (&str, &Place, &str),
        credentials: &Credentials,
        cancel: &CancellationToken,
    ) -> Self {
        let (host, name) = match host {
            "docker.io" if place.repository.contains('/') => {
                ("registry-1.docker.io", place.repository.clone())
            }
            "docker.io" => ("registry-1.docker.io", format!("library/{}", place.repository)),
            host => (host, place.repository.clone()),
        };
        Self {
            http: http.clone(),
            image: image.to_owned(),
            host: host.to_owned(),
            name,
            basic: credentials.basic(host),
            token: Mutex::new(None),
            cancel: cancel.clone(),
        }
    }

    pub(crate) fn url(&self, path: &str) -> Result<Url> {
        let scheme = if self.http.is_plain(&self.host) { "http" } else { "https" };
        let url = format!("{scheme}://{}/v2/{}/{path}", self.host, self.name);
        Url::parse(&url).map_err(|e| ImageError::InvalidReference {
            reference: self.image.clone(),
            reason: e.to_string(),
        })
    }

    /// A manifest or index by tag or digest, unverified.
    pub(crate) async fn manifest(&self, reference: &str) -> Result<Bytes> {
        let url = self.url(&format!("manifests/{reference}"))?;
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(MEDIA_TYPES));
        let mut retry = Retry::default();
        loop {
            let error = match self.get(&url, &headers).await {
                Err(error) => error,
                Ok(response) => match self.accept(response, &url) {
                    Err(error) => error,
                    Ok(response) => match http::read_bounded(response, MAX_MANIFEST_BYTES).await {
                        Ok(bytes) => return Ok(bytes),
                        Err(error) => self.error(error, &url),
                    },
                },
            };
            let is_transport = matches!(error, ImageError::Transport { .. });
            if !is_transport || !retry.failed(&self.cancel).await {
                return Err(error);
            }
        }
    }

    /// Turns an answer that is none into the error that it is.
    pub(crate) fn accept(&self, response: Response, url: &Url) -> Result<Response> {
        accept(&self.image, response, url)
    }

    pub(crate) fn error(&self, error: HttpError, url: &Url) -> ImageError {
        failure(&self.image, error, url)
    }

    /// Asks, and asks again with a token or password if the registry wants one.
    pub(crate) async fn get(&self, url: &Url, headers: &HeaderMap) -> Result<Response> {
        let send = async |authorization: Option<HeaderValue>| {
            let response = self.http.get(url.clone(), headers.clone(), authorization.as_ref());
            tokio::select! {
                response = response => response.map_err(|e| self.error(e, url)),
                () = self.cancel.cancelled() => Err(ImageError::Cancelled { image: self.image.clone() }),
            }
        };
        let known = self.token.lock().clone();
        let response = send(known).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let authorization = self.authorize(&response).await?;
        *self.token.lock() = Some(authorization.clone());
        send(Some(authorization)).await
    }

    async fn authorize(&self, response: &Response) -> Result<HeaderValue> {
        let denied = || ImageError::Denied { image: self.image.clone(), host: self.host.clone() };
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        for challenge in challenges.iter().filter_map(|value| value.to_str().ok()) {
            let (scheme, parameters) = challenge.split_once(' ').unwrap_or((challenge, ""));
            if scheme.eq_ignore_ascii_case("basic") {
                return self.basic.clone().ok_or_else(denied);
            }
            if scheme.eq_ignore_ascii_case("bearer") {
                return self.token(&parameters_of(parameters)).await;
            }
        }
        Err(denied())
    }

    /// Fetches a token. What it is asked for is what is needed here, not what the registry says.
    async fn token(&self, parameters: &BTreeMap<String, String>) -> Result<HeaderValue> {
        #[derive(serde::Deserialize)]
        struct Answer {
            #[serde(default)]
            token: String,
            #[serde(default)]
            access_token: String,
        }
        let realm = parameters.get("realm").map(String::as_str).unwrap_or_default();
        let refused =
            |what: &str| ImageError::refused(&self.image, format!("the registry {} {what}", self.host));
        let mut url = Url::parse(realm).map_err(|_| refused("names no server for its tokens"))?;
        let scope = format!("repository:{}:pull", self.name);
        let asked = [("service", parameters.get("service").map(String::as_str)), ("scope", Some(&scope))];
        let asked: Vec<String> = asked
            .iter()
            .filter_map(|(key, value)| Some(format!("{key}={}", query_escape((*value)?))))
            .collect();
        let query = url.query().map(|query| format!("{query}&")).unwrap_or_default();
        url.set_query(Some(&format!("{query}{}", asked.join("&"))));
        let response = self.http.get(url.clone(), HeaderMap::new(), self.basic.as_ref()).await;
        let response = response.map_err(|e| self.error(e, &url))?;
        if matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Err(ImageError::Denied { image: self.image.clone(), host: http::authority(&url) });
        }
        let response = self.accept(response, &url)?;
        let bytes = http::read_bounded(response, MAX_TOKEN_BYTES).await.map_err(|e| self.error(e, &url))?;
        let answer: Answer = serde_json::from_slice(&bytes).map_err(|_| refused("gave no token"))?;
        let token = if answer.token.is_empty() { answer.access_token } else { answer.token };
        sensitive(&format!("Bearer {token}"))
            .filter(|_| !token.is_empty())
            .ok_or_else(|| refused("gave no token"))
    }
}

/// Turns an answer that is none into the error that it is.
pub(crate) fn accept(image: &str, response: Response, url: &Url) -> Result<Response> {
    let status = response.status();
    match status {
        status if status.is_success() => Ok(response),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Err(ImageError::Denied { image: image.to_owned(), host: http::authority(url) })
        }
        StatusCode::NOT_FOUND | StatusCode::GONE => Err(ImageError::NotAtSource {
            image: image.to_owned(),
            source_says: format!("{} answers {status}", http::shown(url)),
        }),
        status if http::is_worth_retrying(status) => {
            Err(failure(image, HttpError::Transient(format!("the server answers {status}")), url))
        }
        status => Err(ImageError::refused(image, format!("{} answers {status}", http::shown(url)))),
    }
}

pub(crate) fn failure(image: &str, error: HttpError, url: &Url) -> ImageError {
    let image = image.to_owned();
    match error {
        HttpError::NotAllowed(reason) => ImageError::NotAllowed { image, reason },
        HttpError::Refused(what) => {
            ImageError::Refused { image, reason: format!("{}: {what}", http::shown(url)) }
        }
        error @ (HttpError::Transient(_) | HttpError::Sent(_)) => {
            ImageError::Transport { image, url: http::shown(url), source: Box::new(error) }
        }
    }
}

/// `key="value",…` (RFC 9110, section 11.2), as far as registries use it.
fn parameters_of(text: &str) -> BTreeMap<String, String> {
    let mut parameters = BTreeMap::new();
    let mut rest = text;
    while let Some((key, after)) = rest.split_once('=') {
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        parameters.insert(key.trim_matches([' ', ',']).to_ascii_lowercase(), value.to_owned());
        rest = next;
    }
    parameters
}

fn query_escape(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~' | b'/' | b':');
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_read_with_commas_in_its_values() {
        let parameters =
            parameters_of(r#"realm="https://auth.example/token",service="r",scope="repository:a:pull,push""#);
        assert_eq!(parameters["realm"], "https://auth.example/token");
        assert_eq!(parameters["service"], "r");
        assert_eq!(parameters["scope"], "repository:a:pull,push");
        assert!(parameters_of("nonsense").is_empty());
    }

    #[test]
    fn what_goes_into_a_query_cannot_end_it() {
        assert_eq!(query_escape("a b&c=d#e"), "a%20b%26c%3Dd%23e");
    }
}
