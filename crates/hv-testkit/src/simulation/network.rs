//! The network between clients and servers: the messages are the real ones, below them are delays, cuts in one direction
//! or both, and servers that die in the middle of a call. HTTP/2 is not simulated.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hv_client::Wire;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service};

use super::host::Life;
use super::meddler::Meddler;

/// How many frames wait between a server and its client.
const FRAMES: usize = 16;
/// How long a connection that carries nothing is kept before it is given up.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a message that is held up looks again.
const LOOK: Duration = Duration::from_millis(100);
/// Framing of a message, in bytes.
const FRAMING: usize = 5;

/// Who sends or receives: servers and clients are numbered apart.
pub(crate) type Peer = usize;

/// A server that listens.
#[derive(Clone)]
pub(crate) struct Listener {
    pub(crate) handle: Handle,
    pub(crate) routes: Routes,
    pub(crate) life: Arc<Life>,
}

struct State {
    rng: StdRng,
    servers: Vec<Option<Listener>>,
    /// What is cut: client, server, and whether on the way to the server.
    cuts: BTreeMap<(Peer, usize, bool), ()>,
    delay_ms: u64,
    largest_frame: usize,
}

/// The network.
#[derive(Clone)]
pub(crate) struct Network(Arc<Mutex<State>>, Meddler);

/// Which server a client asks.
#[derive(Clone, Copy)]
pub(crate) enum Route {
    /// Always this one.
    To(usize),
    /// Any; another one after a failure.
    Any,
}

impl Network {
    pub(crate) fn new(servers: usize, delay_ms: u64, seed: u64, meddler: Meddler) -> Self {
        let state = State {
            rng: StdRng::seed_from_u64(seed),
            servers: vec![None; servers],
            cuts: BTreeMap::new(),
            delay_ms,
            largest_frame: 0,
        };
        Self(Arc::new(Mutex::new(state)), meddler)
    }

    pub(crate) fn listen(&self, server: usize, listener: Option<Listener>) {
        self.0.lock().servers[server] = listener;
    }

    pub(crate) fn cut(&self, client: Peer, server: usize, to_server: bool) {
        self.0.lock().cuts.insert((client, server, to_server), ());
    }

    pub(crate) fn heal(&self) {
        self.0.lock().cuts.clear();
    }

    /// The largest message that was ever sent, in bytes.
    pub(crate) fn largest_message(&self) -> usize {
        self.0.lock().largest_frame.saturating_sub(FRAMING)
    }

    /// A client's way into the network.
    pub(crate) fn wire(&self, client: Peer, route: Route) -> Wire {
        let first = match route {
            Route::To(server) => server,
            Route::Any => {
                let mut state = self.0.lock();
                let servers = state.servers.len();
                state.rng.random_range(0..servers)
            }
        };
        let dialer = Dialer { network: self.clone(), client, route, current: Arc::new(Mutex::new(first)) };
        Wire::Custom(BoxCloneSyncService::new(dialer))
    }

    async fn travel(&self, client: Peer, server: usize, to_server: bool) -> Result<(), Status> {
        let delay = {
            let mut state = self.0.lock();
            let most = state.delay_ms;
            state.rng.random_range(0..=most)
        };
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        let mut waited = Duration::ZERO;
        while self.0.lock().cuts.contains_key(&(client, server, to_server)) {
            if waited >= PATIENCE {
                return Err(Status::unavailable("the connection was given up"));
            }
            waited += LOOK;
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    fn server(&self, server: usize) -> Option<Listener> {
        self.0.lock().servers[server].clone().filter(|listener| !listener.life.is_dead())
    }

    fn likely(&self, probability: f64) -> bool {
        self.0.lock().rng.random_bool(probability)
    }
}

/// Ends the server's work on a call whose client went away.
struct Hangup(Option<AbortHandle>);

impl Drop for Hangup {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

enum Piece {
    Frame(Frame<Bytes>),
    Failed(Status),
    End,
}

#[derive(Clone)]
struct Dialer {
    network: Network,
    client: Peer,
    route: Route,
    current: Arc<Mutex<usize>>,
}

impl Dialer {
    async fn carry(self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let server = *self.current.lock();
        let answer = self.clone().carry_to(server, request).await;
        if answer.is_err()
            && let Route::Any = self.route
        {
            let mut state = self.network.0.lock();
            let servers = state.servers.len();
            *self.current.lock() = state.rng.random_range(0..servers);
        }
        answer
    }

    async fn carry_to(self, server: usize, request: Request<Body>) -> Result<Response<Body>, Status> {
        let meddler = self.network.1.clone();
        let path = request.uri().path().to_owned();
        self.network.travel(self.client, server, true).await?;
        if meddler.swallows(&path) {
            return Ok(Meddler::pretend(request).await);
        }
        let request = meddler.request(request).await;
        let Some(mut listener) = self.network.server(server) else {
            return Err(Status::unavailable("connection refused"));
        };
        let (head_sender, head) = oneshot::channel();
        let (sender, frames) = mpsc::channel(FRAMES);
        let task = listener.handle.clone().spawn(async move {
            let Ok(response) = listener.routes.call(request).await;
            let (parts, mut body) = response.into_parts();
            if head_sender.send(parts).is_err() {
                return;
            }
            while let Some(frame) = body.frame().await {
                let piece = match frame {
                    Ok(frame) => Piece::Frame(frame),
                    Err(status) => Piece::Failed(status),
                };
                if sender.send(piece).await.is_err() {
                    return;
                }
            }
            let _ = sender.send(Piece::End).await;
        });
        // A client that goes away is noticed by the server, unless its message is lost.
        let hangup = Hangup(self.network.likely(0.5).then(|| task.abort_handle()));
        let Ok(parts) = head.await else { return Err(Status::unavailable("connection reset")) };
        self.network.travel(self.client, server, false).await?;
        let body =
            Receiver { network: self.network, client: self.client, server, frames, path, _hangup: hangup };
        Ok(Response::from_parts(parts, Body::new(StreamBody::new(body.stream()))))
    }
}

impl Service<Request<Body>> for Dialer {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let dialer = self.clone();
        Box::pin(async move { dialer.carry(request).await.map_err(BoxError::from) })
    }
}

struct Receiver {
    network: Network,
    client: Peer,
    server: usize,
    frames: mpsc::Receiver<Piece>,
    path: String,
    _hangup: Hangup,
}

impl Receiver {
    fn stream(self) -> impl futures::Stream<Item = Result<Frame<Bytes>, Status>> + Send {
        stream::unfold(Some(self), |receiver| async move {
            let mut receiver = receiver?;
            match receiver.next().await {
                Ok(Some(frame)) => Some((Ok(frame), Some(receiver))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        })
    }

    async fn next(&mut self) -> Result<Option<Frame<Bytes>>, Status> {
        let loss = self.network.1.loss(&self.path);
        let mut piece = self.frames.recv().await;
        while loss > 0.0 && matches!(piece, Some(Piece::Frame(_))) && self.network.likely(loss) {
            piece = self.frames.recv().await;
        }
        match piece {
            Some(Piece::Frame(frame)) => {
                if frame.is_data() {
                    self.network.travel(self.client, self.server, false).await?;
                }
                if let Some(data) = frame.data_ref() {
                    let mut state = self.network.0.lock();
                    state.largest_frame = state.largest_frame.max(data.len());
                }
                Ok(Some(frame.map_data(|data| self.network.1.answer(&self.path, data))))
            }
            Some(Piece::Failed(status)) => Err(status),
            Some(Piece::End) => Ok(None),
            None => Err(Status::unavailable("connection reset")),
        }
    }
}
