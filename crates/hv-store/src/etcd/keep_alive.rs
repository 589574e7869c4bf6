//! Renewing leases: all renewals share one stream, however many leases there are.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use etcd_client::{Error, LeaseKeepAliveStream, LeaseKeeper};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::error::store_error;
use super::members::Members;
use crate::{LeaseId, Result, StoreError};

/// Most renewals that wait to be sent.
const MAX_QUEUED: usize = 4096;

type Reply = oneshot::Sender<Result<()>>;

/// Hands renewals to the task that owns the stream.
pub(super) struct KeepAlive {
    members: Arc<Members>,
    renewals: mpsc::Sender<(LeaseId, Reply)>,
}

impl KeepAlive {
    /// Starts the task. It ends when this handle is gone.
    pub(super) fn start(members: Arc<Members>) -> Self {
        let (renewals, queue) = mpsc::channel(MAX_QUEUED);
        tokio::spawn(Renewer { members: Arc::clone(&members), queue }.run());
        Self { members, renewals }
    }

    pub(super) async fn renew(&self, lease: LeaseId) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let renewed = async {
            self.renewals.send((lease, reply)).await.map_err(|_| StoreError::Closed)?;
            answer.await.map_err(|_| StoreError::Closed)?
        };
        timeout(self.members.request_timeout, renewed).await.unwrap_or_else(|_| Err(self.members.timeout()))
    }
}

struct Renewer {
    members: Arc<Members>,
    queue: mpsc::Receiver<(LeaseId, Reply)>,
}

/// An open stream and who waits for its answers, which come in the order of the requests of each lease.
struct Open {
    keeper: LeaseKeeper,
    stream: LeaseKeepAliveStream,
    waiting: HashMap<LeaseId, VecDeque<Reply>>,
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
        Ok(Open { keeper, stream, waiting: HashMap::new() })
    }

    /// Sends renewals and hands out answers until the stream fails; whoever waits then is told.
    async fn serve(&mut self, mut open: Open, index: usize) {
        let patience = self.members.request_timeout;
        // Since when somebody waits without any answer having come.
        let mut silent_since = Instant::now();
        loop {
            let idle = open.waiting.is_empty();
            tokio::select! {
                renewal = self.queue.recv() => {
                    let Some((lease, reply)) = renewal else { return };
                    if idle {
                        silent_since = Instant::now();
                    }
                    open.waiting.entry(lease).or_default().push_back(reply);
                    open.keeper.id = lease.0;
                    if !matches!(timeout(patience, open.keeper.keep_alive()).await, Ok(Ok(()))) {
                        break;
                    }
                }
                message = open.stream.message() => {
                    let Ok(Some(message)) = message else { break };
                    silent_since = Instant::now();
                    let lease = LeaseId(message.id());
                    let renewed =
                        if message.ttl() > 0 { Ok(()) } else { Err(StoreError::LeaseNotFound(lease)) };
                    if let Some(waiting) = open.waiting.get_mut(&lease) {
                        if let Some(reply) = waiting.pop_front() {
                            answer(reply, renewed);
                        }
                        if waiting.is_empty() {
                            open.waiting.remove(&lease);
                        }
                    }
                }
                // The member hangs.
                () = sleep_until(silent_since + patience), if !idle => break,
            }
        }
        self.members.failed(index);
        for reply in open.waiting.into_values().flatten() {
            let source = "the stream of renewals broke".into();
            answer(
                reply,
                Err(StoreError::Unavailable { endpoint: self.members.endpoint(index).to_owned(), source }),
            );
        }
    }
}

/// A caller that went away does not miss its answer.
fn answer(reply: Reply, result: Result<()>) {
    drop(reply.send(result));
}
