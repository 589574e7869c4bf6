//! A web server of the tests: serves files with ranges, and misbehaves as it is told. What it serves below
//! `/v2/` is a registry.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use futures::stream;
use parking_lot::Mutex;

use crate::fixture::{Image, digest};

/// How an answer goes wrong.
#[derive(Clone, Default)]
pub(crate) struct Manner {
    /// The connection breaks after so many bytes of an answer, as many times.
    pub(crate) cut_after: usize,
    pub(crate) cuts: usize,
    /// Ranges are not understood.
    pub(crate) no_ranges: bool,
    /// A pause before each piece of 64 KiB.
    pub(crate) pause: Option<Duration>,
    pub(crate) redirect: Option<String>,
    /// So many answers are this status.
    pub(crate) statuses: Vec<u16>,
    pub(crate) no_tag: bool,
}

/// What was asked.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
}

#[derive(Default)]
struct Served {
    files: HashMap<String, (Bytes, Manner)>,
    asked: Vec<Asked>,
    demands_basic: bool,
}

/// A server on a port of its own. Ends when it is dropped.
pub(crate) struct Server {
    pub(crate) authority: String,
    served: Arc<Mutex<Served>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        let served = Arc::new(Mutex::new(Served::default()));
        let app = axum::Router::new().fallback(answer).with_state(Arc::clone(&served));
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { authority, served, task }
    }

    pub(crate) fn serve(&self, path: &str, bytes: impl Into<Bytes>, manner: Manner) {
        self.served.lock().files.insert(path.to_owned(), (bytes.into(), manner));
    }

    /// Serves a file and gives its reference.
    pub(crate) fn file(&self, path: &str, bytes: &[u8], manner: Manner) -> String {
        self.serve(path, bytes.to_vec(), manner);
        format!("http://{}{path}#{}", self.authority, digest(bytes))
    }

    /// Serves an image as a registry would and gives its reference.
    pub(crate) fn image(&self, repository: &str, image: &Image) -> String {
        for blob in &image.blobs {
            self.serve(&format!("/v2/{repository}/blobs/{}", digest(blob)), blob.clone(), Manner::default());
        }
        self.manifest(repository, "v1", &image.manifest);
        format!("oci://{}/{repository}:v1", self.authority)
    }

    pub(crate) fn manifest(&self, repository: &str, tag: &str, bytes: &[u8]) {
        for reference in [tag, &digest(bytes)] {
            self.serve(&format!("/v2/{repository}/manifests/{reference}"), bytes.to_vec(), Manner::default());
        }
    }

    /// From now on nothing is answered without a password.
    pub(crate) fn demand_basic(&self) {
        self.served.lock().demands_basic = true;
    }

    /// What was asked of a path that contains this.
    pub(crate) fn asked(&self, part: &str) -> Vec<Asked> {
        self.served.lock().asked.iter().filter(|asked| asked.path.contains(part)).cloned().collect()
    }
}

async fn answer(State(served): State<Arc<Mutex<Served>>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let text = |name: header::HeaderName| {
        request.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
    };
    let range = text(header::RANGE);
    let authorization = text(header::AUTHORIZATION);
    let found = {
        let mut served = served.lock();
        served.asked.push(Asked {
            path: path.clone(),
            range: range.clone(),
            authorization: authorization.clone(),
        });
        if served.demands_basic && authorization.is_none() {
            let challenge = "Basic realm=\"tests\"";
            return Response::builder()
                .status(401)
                .header(header::WWW_AUTHENTICATE, challenge)
                .body(Body::empty())
                .unwrap();
        }
        served.files.get_mut(&path).map(|(bytes, manner)| {
            let now = manner.clone();
            manner.cuts = manner.cuts.saturating_sub(1);
            if !manner.statuses.is_empty() {
                manner.statuses.remove(0);
            }
            (bytes.clone(), now)
        })
    };
    let status = |status: u16| Response::builder().status(status).body(Body::empty()).unwrap();
    let Some((bytes, manner)) = found else { return status(404) };
    if let Some(first) = manner.statuses.first() {
        return status(*first);
    }
    if let Some(target) = &manner.redirect {
        return Response::builder().status(307).header(header::LOCATION, target).body(Body::empty()).unwrap();
    }
    let tag = format!("\"{}\"", digest(&bytes));
    if text(header::IF_NONE_MATCH).as_deref() == Some(&tag) {
        return status(304);
    }
    let same = text(header::IF_RANGE).is_none_or(|expected| expected == tag);
    let start = range
        .as_deref()
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let start = start.filter(|_| same && !manner.no_ranges);
    if start.is_some_and(|start| start >= bytes.len()) {
        return status(416);
    }
    let part = bytes.slice(start.unwrap_or(0)..);
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(part.len()));
    if !manner.no_tag {
        headers.insert(header::ETAG, HeaderValue::from_str(&tag).unwrap());
    }
    if let Some(start) = start {
        let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
        headers.insert(header::CONTENT_RANGE, HeaderValue::from_str(&range).unwrap());
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    *response.body_mut() = body(part, &manner);
    response
}

fn body(part: Bytes, manner: &Manner) -> Body {
    const PIECE: usize = 64 << 10;
    let end = if manner.cuts > 0 { manner.cut_after.min(part.len()) } else { part.len() };
    let mut pieces: Vec<std::io::Result<Bytes>> =
        (0..end).step_by(PIECE).map(|at| Ok(part.slice(at..end.min(at + PIECE)))).collect();
    if end < part.len() {
        pieces.push(Err(std::io::Error::other("cut on purpose")));
    }
    let pause = manner.pause;
    Body::from_stream(stream::unfold(pieces.into_iter(), move |mut pieces| async move {
        if let Some(pause) = pause {
            tokio::time::sleep(pause).await;
        }
        pieces.next().map(|piece| (piece, pieces))
    }))
}
