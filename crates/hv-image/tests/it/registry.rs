//! A real registry: Debian's `docker-registry` in a private directory, filled over its own API.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use reqwest::{Client, Method, StatusCode};
use tokio::process::{Child, Command};

use crate::fixture::{Image, MANIFEST, digest, run};

/// A running registry. Ends when it is dropped.
pub(crate) struct Registry {
    pub(crate) authority: String,
    login: Option<(String, String)>,
    client: Client,
    _child: Child,
    _dir: tempfile::TempDir,
}

impl Registry {
    pub(crate) async fn start() -> Self {
        Self::with(None).await
    }

    pub(crate) async fn with_login(user: &str, password: &str) -> Self {
        Self::with(Some((user.to_owned(), password.to_owned()))).await
    }

    async fn with(login: Option<(String, String)>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let auth = login.as_ref().map_or_else(String::new, |(user, password)| {
            let file = dir.path().join("htpasswd");
            fs::write(&file, run("htpasswd", &["-Bbn", user, password])).unwrap();
            format!("auth:\n  htpasswd:\n    realm: tests\n    path: {}\n", file.display())
        });
        let authority = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let config = dir.path().join("config.yml");
        let storage = dir.path().join("data");
        let text = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {authority}\n{auth}",
            storage.display()
        );
        fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("docker-registry is needed (hack/setup.sh installs it)");
        let deadline = Instant::now() + Duration::from_secs(30);
        while tokio::net::TcpStream::connect(&authority).await.is_err() {
            assert!(Instant::now() < deadline, "docker-registry did not come up");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let client = Client::builder().tls_backend_preconfigured(no_tls()).no_proxy().build().unwrap();
        Self { authority, login, client, _child: child, _dir: dir }
    }

    async fn send(
        &self,
        method: Method,
        url: String,
        kind: &str,
        body: Vec<u8>,
        expected: StatusCode,
    ) -> String {
        let mut request = self.client.request(method, &url).header("Content-Type", kind).body(body);
        if let Some((user, password)) = &self.login {
            request = request.basic_auth(user, Some(password));
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), expected, "{url}");
        let location = response.headers().get("Location").map(|value| value.to_str().unwrap().to_owned());
        location.unwrap_or_default()
    }

    /// Pushes an image and gives its reference.
    pub(crate) async fn push(&self, repository: &str, tag: &str, image: &Image) -> String {
        let base = format!("http://{}/v2/{repository}", self.authority);
        for blob in &image.blobs {
            let start = format!("{base}/blobs/uploads/");
            let location = self.send(Method::POST, start, "", Vec::new(), StatusCode::ACCEPTED).await;
            let separator = if location.contains('?') { '&' } else { '?' };
            let put = format!("{location}{separator}digest={}", digest(blob));
            self.send(Method::PUT, put, "application/octet-stream", blob.clone(), StatusCode::CREATED).await;
        }
        self.push_manifest(repository, tag, MANIFEST, &image.manifest).await
    }

    pub(crate) async fn push_manifest(
        &self,
        repository: &str,
        tag: &str,
        kind: &str,
        bytes: &[u8],
    ) -> String {
        let url = format!("http://{}/v2/{repository}/manifests/{tag}", self.authority);
        self.send(Method::PUT, url, kind, bytes.to_vec(), StatusCode::CREATED).await;
        format!("oci://{}/{repository}:{tag}", self.authority)
    }
}

/// The client is for plain HTTP only, and wants to know how it would speak TLS all the same.
fn no_tls() -> rustls::ClientConfig {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth()
}
