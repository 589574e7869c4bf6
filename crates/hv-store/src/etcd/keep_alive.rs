//! Renewing leases: all renewals share a few streams, however many leases there are.
//!
//! Renewals are sent without waiting for the answers to those before them. A lease always takes the same stream, as etcd
//! answers by lease and in the order of a stream's requests.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Error, LeaseKeepAliveStream, LeaseKeeper};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::error::store_error;
use super::members::Members;
use crate::{LeaseId, Result, StoreError};

/// How many streams there are.
const STREAMS: usize = 4;
/// Most renewals that wait to be sent, in each stream.
const MAX_QUEUED: usize = 4096;
/// Most that are taken from there at once.
const MAX_AT_ONCE: usize = 256;

type Reply = oneshot::Sender<Result<()>>;

/// Hands renewals to the task that owns the stream.
pub(super) struct KeepAlive {
    members: Arc<Members>,
    streams: Vec<mpsc::Sender<(LeaseId, Reply)>>,
}

impl KeepAlive {
    /// Starts the tasks. They end when this handle is gone.
    pub(super) fn start(members: Arc<Members>) -> Self {
        let start = |_| {
            let (renewals, queue) = mpsc::channel(MAX_QUEUED);
            tokio::spawn(Renewer { members: Arc::clone(&members), queue }.run());
            renewals
        };
        Self { streams: (0..STREAMS).map(start).collect(), members }
    }

    pub(super) async fn renew(&self, lease: LeaseId) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        // etcd's lease ids count up in their lowest bits.
        let stream = &self.streams[usize::try_from(lease.0.unsigned_abs() % STREAMS as u64).unwrap_or(0)];
        let renewed = async {
            stream.send((lease, reply)).await.map_err(|_| StoreError::Closed)?;
            answer.await.map_err(|_| StoreError::Closed)?
        };
        timeout(self.members.request_timeout, renewed).await.unwrap_or_else(|_| Err(self.members.timeout()))
    }
}

struct Renewer {
    members: Arc<Members>,
    queue: mpsc::Receiver<(LeaseId, Reply)>,
}

/// An open stream.
struct Open {
    keeper: LeaseKeeper,
    stream: LeaseKeepAliveStream,
}

impl Renewer {
    async fn run(mut self) {
        while let Some((lease, reply)) = self.queue.recv().await {
            let index = self.members.preferred();
            // The first renewal opens the stream.
            match timeout(self.members.request_timeout, self.open(index, lease)).await {
                Ok(Ok(open)) => {
                    answer(reply, Ok(()));
                    self.serve(open, index).await;
                }
                Ok(Err(error)) => {
                    let error = match store_error(error, self.members.endpoint(index)) {
                        StoreError::LeaseNotFound(_) => StoreError::LeaseNotFound(lease),
                        error => {
                            self.members.failed(index);
                            error
                        }
                    };
                    answer(reply, Err(error));
                }
                Err(_) => {
                    self.members.failed(index);
                    answer(reply, Err(self.members.timeout()));
                }
            }
        }
    }

    async fn open(&self, index: usize, lease: LeaseId) -> std::result::Result<Open, Error> {
        let (keeper, stream) = self.members.member(index).await?.lease.keep_alive(lease.0).await?;
        Ok(Open { keeper, stream })
    }

    /// Sends renewals and hands out answers until the stream fails; whoever waits then is told.
    async fn serve(&mut self, open: Open, index: usize) {
        let Open { mut keeper, mut stream } = open;
        let waiting = Mutex::new(Waiting::new());
        let patience = self.members.request_timeout;
        // Both directions at once: etcd may have to send before it reads on.
        let over = tokio::select! {
            over = send(&mut self.queue, &mut keeper, &waiting) => over,
            () = receive(&mut stream, &waiting) => Over::Broken,
            () = silence(&waiting, patience) => Over::Broken,
        };
        if over == Over::Unused {
            return;
        }
        self.members.failed(index);
        for reply in waiting.into_inner().by_lease.into_values().flatten() {
            let source = "the stream of renewals broke".into();
            answer(
                reply,
                Err(StoreError::Unavailable { endpoint: self.members.endpoint(index).to_owned(), source }),
            );
        }
    }
}

/// Why a stream is no longer served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Broken,
    /// Nobody will renew anything any more.
    Unused,
}

async fn send(
    queue: &mut mpsc::Receiver<(LeaseId, Reply)>,
    keeper: &mut LeaseKeeper,
    waiting: &Mutex<Waiting>,
) -> Over {
    let mut renewals = Vec::with_capacity(MAX_AT_ONCE);
    loop {
        if queue.recv_many(&mut renewals, MAX_AT_ONCE).await == 0 {
            return Over::Unused;
        }
        let leases: Vec<LeaseId> = renewals.iter().map(|(lease, _)| *lease).collect();
        waiting.lock().add(renewals.drain(..));
        for lease in leases {
            keeper.id = lease.0;
            if keeper.keep_alive().await.is_err() {
                return Over::Broken;
            }
        }
    }
}

/// Ends when the stream does.
async fn receive(stream: &mut LeaseKeepAliveStream, waiting: &Mutex<Waiting>) {
    while let Ok(Some(message)) = stream.message().await {
        let lease = LeaseId(message.id());
        let renewed = if message.ttl() > 0 { Ok(()) } else { Err(StoreError::LeaseNotFound(lease)) };
        let reply = waiting.lock().take(lease);
        if let Some(reply) = reply {
            answer(reply, renewed);
        }
    }
}

/// Ends when somebody waits and no answer to anybody came for so long: the member hangs.
async fn silence(waiting: &Mutex<Waiting>, patience: Duration) {
    loop {
        let silent_since = {
            let waiting = waiting.lock();
            if waiting.by_lease.is_empty() { Instant::now() } else { waiting.silent_since }
        };
        let until = silent_since + patience;
        if until <= Instant::now() {
            return;
        }
        sleep_until(until).await;
    }
}

/// Who waits for which answer; those of one lease come in the order of its requests.
struct Waiting {
    by_lease: HashMap<LeaseId, VecDeque<Reply>>,
    /// Since when somebody waits without any answer having come.
    silent_since: Instant,
}

impl Waiting {
    fn new() -> Self {
        Self { by_lease: HashMap::new(), silent_since: Instant::now() }
    }

    fn add(&mut self, renewals: impl Iterator<Item = (LeaseId, Reply)>) {
        if self.by_lease.is_empty() {
            self.silent_since = Instant::now();
        }
        for (lease, reply) in renewals {
            self.by_lease.entry(lease).or_default().push_back(reply);
        }
    }

    fn take(&mut self, lease: LeaseId) -> Option<Reply> {
        self.silent_since = Instant::now();
        let replies = self.by_lease.get_mut(&lease)?;
        let reply = replies.pop_front();
        if replies.is_empty() {
            self.by_lease.remove(&lease);
        }
        reply
    }
}

/// A caller that went away does not miss its answer.
fn answer(reply: Reply, result: Result<()>) {
    drop(reply.send(result));
}
