//! Fetches one blob: goes on where an earlier attempt stopped, tries again when the source breaks off, and
//! believes only what has the
//! right digest.

use bytes::Bytes;
use futures::StreamExt as _;
use reqwest::header::{CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH, IF_RANGE, RANGE};
use reqwest::{Response, StatusCode, Url};
use tokio::sync::mpsc;

use crate::http::{Http, HttpError};
use crate::incoming::Incoming;
use crate::job::Job;
use crate::reference::Digest;
use crate::registry::{Repository, accept, failure};
use crate::retry::Retry;
use crate::{ImageError, Result};

/// Chunks between the network and the disk.
const QUEUE_CHUNKS: usize = 16;

/// Where a blob can be had.
#[derive(Clone, Copy)]
pub(crate) enum Origin<'a> {
    Registry(&'a Repository),
    Web(&'a Http, &'a Url),
}

/// What is wanted.
pub(crate) struct Download<'a> {
    pub(crate) job: &'a Job,
    /// For messages: `layer 3`.
    pub(crate) what: String,
    /// The name of the partial file.
    pub(crate) key: String,
    pub(crate) digest: Option<Digest>,
    /// Exactly so many bytes.
    pub(crate) size: Option<u64>,
    /// What the store has already, as the server calls it; if it still is that, nothing is fetched.
    pub(crate) unless: String,
}

/// What came of it.
#[derive(Clone, Debug)]
pub(crate) enum Fetched {
    /// A blob that is in the store now, and what the server calls it.
    Blob(Digest, String),
    /// It is still what the store has.
    Unchanged,
}

/// How one attempt ended.
enum Attempt {
    Complete(String),
    Unchanged,
    /// The digest will not come out right; once more from the beginning.
    StartOver,
}

impl Download<'_> {
    /// Asks the origins one after the other.
    pub(crate) async fn run(&self, origins: &[Origin<'_>]) -> Result<Fetched> {
        let guard = tokio::select! {
            guard = self.job.inner.flights.take(&self.key) => guard,
            () = self.job.cancel.cancelled() => return Err(self.job.cancelled()),
        };
        if let Some(digest) = &self.digest
            && self.job.inner.layout.blob(digest).exists()
        {
            self.job.progress.add(self.size.unwrap_or(0));
            return Ok(Fetched::Blob(digest.clone(), String::new()));
        }
        let space = (&self.job.inner.layout, self.job.inner.options.min_free_bytes);
        let mut incoming = Some(Incoming::resume((&self.job.image, &self.key), space, guard)?);
        self.job.progress.add(incoming.as_ref().map_or(0, Incoming::length));
        let mut last = None;
        for origin in origins {
            let (back, result) =
                self.from(*origin, incoming.take().expect("every attempt gives it back")).await;
            match result {
                Ok(None) => {
                    discard(back);
                    return Ok(Fetched::Unchanged);
                }
                Ok(Some(validator)) => {
                    let digest = blocking(move || back.finish()).await?;
                    return Ok(Fetched::Blob(digest, validator));
                }
                Err(error @ ImageError::Cancelled { .. }) => return Err(error),
                Err(error) if error.condemns() => {
                    self.job.progress.take_back(back.length());
                    let mut back = back;
                    back.restart("")?;
                    last = Some(error);
                    incoming = Some(back);
                }
                Err(error) => {
                    last = Some(error);
                    incoming = Some(back);
                }
            }
        }
        let error = last.unwrap_or_else(|| self.job.cancelled());
        if let Some(incoming) = incoming.filter(|incoming| error.condemns() || incoming.length() == 0) {
            discard(incoming);
        }
        Err(error)
    }

    /// Asks one origin until it has given everything, or has failed too often. Answers with what it calls
    /// it; `None`: it
    /// is still what the store has.
    async fn from(&self, origin: Origin<'_>, mut incoming: Incoming) -> (Incoming, Result<Option<String>>) {
        let mut retry = Retry::default();
        // What this call did not see arrive may be wrong without the origin being to blame.
        let mut is_resumed = incoming.length() > 0;
        loop {
            let before = incoming.length();
            let (back, result) = self.attempt(origin, incoming).await;
            incoming = back;
            match result {
                Ok(Attempt::Complete(validator)) => match self.verify(&incoming) {
                    Ok(()) => return (incoming, Ok(Some(validator))),
                    Err(_) if is_resumed => {}
                    Err(error) => return (incoming, Err(error)),
                },
                Ok(Attempt::StartOver) if is_resumed => {}
                Ok(Attempt::StartOver) => {
                    let reason =
                        format!("{} has less bytes at its source than it should; push it again", self.what);
                    return (incoming, Err(ImageError::refused(&self.job.image, reason)));
                }
                Ok(Attempt::Unchanged) => return (incoming, Ok(None)),
                Err(error @ ImageError::Transport { .. }) => {
                    if incoming.length() > before {
                        retry.progressed();
                    }
                    let again = retry.failed(&self.job.cancel).await;
                    if self.job.cancel.is_cancelled() {
                        return (incoming, Err(self.job.cancelled()));
                    }
                    if !again {
                        return (incoming, Err(error));
                    }
                    continue;
                }
                Err(error) => return (incoming, Err(error)),
            }
            is_resumed = false;
            self.job.progress.take_back(incoming.length());
            if let Err(error) = incoming.restart("") {
                return (incoming, Err(error));
            }
        }
    }

    fn verify(&self, incoming: &Incoming) -> Result<()> {
        let actual = incoming.digest();
        match self.digest.as_ref().filter(|expected| **expected != actual) {
            None => Ok(()),
            Some(expected) => Err(ImageError::DigestMismatch {
                image: self.job.image.clone(),
                what: self.what.clone(),
                expected: expected.to_string(),
                actual: actual.to_string(),
            }),
        }
    }

    async fn attempt(&self, origin: Origin<'_>, mut incoming: Incoming) -> (Incoming, Result<Attempt>) {
        if self.size.is_some_and(|size| size == incoming.length() && size > 0) {
            return (incoming, Ok(Attempt::Complete(String::new())));
        }
        let (response, url) = match self.ask(origin, &incoming).await {
            Ok(answer) => answer,
            Err(error) => return (incoming, Err(error)),
        };
        if response.status() == StatusCode::NOT_MODIFIED {
            return (incoming, Ok(Attempt::Unchanged));
        }
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE && incoming.length() > 0 {
            return (incoming, Ok(Attempt::StartOver));
        }
        let validator = strong_validator(&response);
        let prepared = accept(&self.job.image, response, &url).and_then(|response| {
            if !continues(&response, incoming.length()) {
                self.job.progress.take_back(incoming.length());
                incoming.restart(&validator)?;
            }
            let total = response.content_length().map(|length| incoming.length().saturating_add(length));
            self.check_total(total)?;
            Ok((response, total))
        });
        match prepared {
            Err(error) => (incoming, Err(error)),
            Ok((response, total)) => {
                let (incoming, result) = self.receive(response, incoming, total, &url).await;
                (incoming, result.map(|()| Attempt::Complete(validator)))
            }
        }
    }

    fn check_total(&self, total: Option<u64>) -> Result<()> {
        let Some(total) = total else { return Ok(()) };
        let max = self.job.inner.options.max_image_bytes;
        match self.size {
            Some(size) if size != total => Err(ImageError::refused(
                &self.job.image,
                format!("{} has {total} bytes at its source instead of {size}; push it again", self.what),
            )),
            None if total > max => Err(self.too_large()),
            None => {
                self.job.progress.expect(total);
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }

    fn too_large(&self) -> ImageError {
        match self.size {
            Some(size) => ImageError::refused(
                &self.job.image,
                format!("{} has more than the {size} bytes it should", self.what),
            ),
            None => ImageError::TooLarge {
                image: self.job.image.clone(),
                what: "its size".to_owned(),
                limit: format!("{} bytes", self.job.inner.options.max_image_bytes),
                option: "max_image_bytes",
            },
        }
    }

    async fn ask(&self, origin: Origin<'_>, incoming: &Incoming) -> Result<(Response, Url)> {
        let mut headers = HeaderMap::new();
        if incoming.length() > 0 {
            if let Ok(range) = HeaderValue::from_str(&format!("bytes={}-", incoming.length())) {
                headers.insert(RANGE, range);
            }
            // Without a digest only the server can tell whether it is still the same; if not, it sends
            // everything.
            let validator = if incoming.validator().is_empty() { "\"\"" } else { incoming.validator() };
            if let Some(value) = HeaderValue::from_str(validator).ok().filter(|_| self.digest.is_none()) {
                headers.insert(IF_RANGE, value);
            }
        } else if let Some(value) =
            HeaderValue::from_str(&self.unless).ok().filter(|_| !self.unless.is_empty())
        {
            headers.insert(IF_NONE_MATCH, value);
        }
        match origin {
            Origin::Registry(repository) => {
                let digest = self.digest.as_ref().map(Digest::to_string).unwrap_or_default();
                let url = repository.url(&format!("blobs/{digest}"))?;
                Ok((repository.get(&url, &headers).await?, url))
            }
            Origin::Web(http, url) => tokio::select! {
                response = http.get(url.clone(), headers, None) => {
                    Ok((response.map_err(|e| failure(&self.job.image, e, url))?, url.clone()))
                }
                () = self.job.cancel.cancelled() => Err(self.job.cancelled()),
            },
        }
    }

    /// Writes what arrives. Hashing and writing block, so they have a thread of their own.
    async fn receive(
        &self,
        response: Response,
        mut incoming: Incoming,
        total: Option<u64>,
        url: &Url,
    ) -> (Incoming, Result<()>) {
        let (sender, mut receiver) = mpsc::channel::<Bytes>(QUEUE_CHUNKS);
        let bound = self.size.unwrap_or(self.job.inner.options.max_image_bytes);
        let mut length = incoming.length();
        let progress = self.job.progress.clone();
        let writer = tokio::task::spawn_blocking(move || {
            let mut result = Ok(());
            while let Some(chunk) = receiver.blocking_recv() {
                result = incoming.write(&chunk);
                if result.is_err() {
                    break;
                }
                progress.add(chunk.len() as u64);
            }
            let kept = incoming.keep();
            (incoming, result.and(kept))
        });
        let mut body = response.bytes_stream();
        let broken = loop {
            let chunk = tokio::select! {
                chunk = body.next() => chunk,
                () = self.job.cancel.cancelled() => break Err(self.job.cancelled()),
            };
            match chunk {
                None => break Ok(()),
                Some(Err(e)) => break Err(failure(&self.job.image, HttpError::Sent(e), url)),
                Some(Ok(chunk)) => {
                    length = length.saturating_add(chunk.len() as u64);
                    if length > bound {
                        break Err(self.too_large());
                    }
                    // The writer hangs up only when it failed, which its result tells.
                    if sender.send(chunk).await.is_err() {
                        break Ok(());
                    }
                }
            }
        };
        drop(sender);
        let (incoming, written) = writer.await.expect("the writer does not panic");
        let result = written.and(broken).and_then(|()| match self.size.or(total) {
            Some(expected) if length < expected => {
                let what = format!("it broke off after {length} of {expected} bytes");
                Err(failure(&self.job.image, HttpError::Transient(what), url))
            }
            _ => Ok(()),
        });
        (incoming, result)
    }
}

/// Whether an answer goes on at `offset`.
fn continues(response: &Response, offset: u64) -> bool {
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return offset == 0;
    }
    let range =
        response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok()).unwrap_or_default();
    let start = range.strip_prefix("bytes ").and_then(|range| range.split('-').next());
    start.and_then(|start| start.parse().ok()) == Some(offset)
}

/// An entity tag that promises the same bytes (RFC 9110, section 8.8.1).
fn strong_validator(response: &Response) -> String {
    let tag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok()).unwrap_or_default();
    if tag.starts_with('"') { tag.to_owned() } else { String::new() }
}

fn discard(incoming: Incoming) {
    if let Err(error) = incoming.discard() {
        tracing::warn!(error = %error, "a partial download could not be removed");
    }
}

/// Runs what blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
