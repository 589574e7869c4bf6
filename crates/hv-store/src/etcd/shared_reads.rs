//! One read of the revision for all who ask at the same time.
//!
//! A linearizable read costs etcd a round among its members, and every list of every user begins with one. So those who
//! ask while a read is under way wait for the next one, together. A read that had begun before somebody asked is never
//! given to them: what was acknowledged to anybody before the question is in the answer.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::{Result, Revision, StoreError};

/// Most callers that wait for the next read; it is also how many one read serves.
const MAX_WAITING: usize = 16 * 1024;

type Reply = oneshot::Sender<std::result::Result<Revision, Arc<StoreError>>>;

/// Hands questions to the task that reads.
pub(super) struct SharedReads {
    asks: mpsc::Sender<Reply>,
}

impl SharedReads {
    /// Starts the task. It ends when this handle is gone. `read` must end in a bounded time.
    pub(super) fn start<F>(read: impl Fn() -> F + Send + 'static) -> Self
    where
        F: Future<Output = Result<Revision>> + Send,
    {
        let (asks, mut queue) = mpsc::channel::<Reply>(MAX_WAITING);
        tokio::spawn(async move {
            let mut waiting = Vec::new();
            while queue.recv_many(&mut waiting, MAX_WAITING).await > 0 {
                let answer = read().await.map_err(Arc::new);
                for reply in waiting.drain(..) {
                    // A caller that went away does not miss its answer.
                    drop(reply.send(answer.clone()));
                }
            }
        });
        Self { asks }
    }

    /// The revision, by a read that begins after this call.
    pub(super) async fn revision(&self) -> Result<Revision> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(reply).await.map_err(|_| StoreError::Closed)?;
        let answer = answer.await.map_err(|_| StoreError::Closed)?;
        answer.map_err(|error| Arc::try_unwrap(error).unwrap_or_else(|shared| copy(&shared)))
    }
}

/// The same error for another caller. Its cause becomes text.
fn copy(error: &StoreError) -> StoreError {
    match error {
        StoreError::Unavailable { endpoint, source } => {
            StoreError::Unavailable { endpoint: endpoint.clone(), source: source.to_string().into() }
        }
        StoreError::Timeout { endpoint, timeout_ms } => {
            StoreError::Timeout { endpoint: endpoint.clone(), timeout_ms: *timeout_ms }
        }
        StoreError::InvalidRequest(why) => StoreError::InvalidRequest(why.clone()),
        StoreError::Closed => StoreError::Closed,
        other => StoreError::InvalidRequest(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use futures::future::join_all;

    use super::*;

    /// Each read answers with its number, which it takes when it begins.
    fn numbered(begun: &Arc<AtomicU64>) -> SharedReads {
        let begun = Arc::clone(begun);
        SharedReads::start(move || {
            let number = begun.fetch_add(1, Ordering::SeqCst) + 1;
            async move {
                tokio::time::sleep(Duration::from_micros(number % 7 * 50)).await;
                Ok(Revision(number))
            }
        })
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nobody_is_given_a_read_that_began_before_they_asked() {
        let begun = Arc::new(AtomicU64::new(0));
        let reads = Arc::new(numbered(&begun));
        let callers = (0..64).map(|_| {
            let (reads, begun) = (Arc::clone(&reads), Arc::clone(&begun));
            tokio::spawn(async move {
                for _ in 0..200 {
                    let before = begun.load(Ordering::SeqCst);
                    let given = reads.revision().await.unwrap();
                    assert!(given.0 > before, "read {} began before the question, at {before}", given.0);
                }
            })
        });
        join_all(callers).await.into_iter().for_each(|caller| caller.unwrap());
        let reads = begun.load(Ordering::SeqCst);
        assert!(reads < 64 * 200 / 4, "{reads} reads for {} questions", 64 * 200);
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_takes_nobody_along() {
        let reads = numbered(&Arc::default());
        {
            let mut gone = Box::pin(reads.revision());
            assert!(futures::poll!(&mut gone).is_pending());
        }
        assert!(reads.revision().await.is_ok());
    }

    #[tokio::test]
    async fn everybody_who_waits_is_told_of_a_failure() {
        let reads = SharedReads::start(|| async {
            tokio::task::yield_now().await;
            Err(StoreError::Timeout { endpoint: "e".to_owned(), timeout_ms: 7 })
        });
        for answer in join_all((0..8).map(|_| reads.revision())).await {
            assert!(matches!(answer, Err(StoreError::Timeout { timeout_ms: 7, .. })), "{answer:?}");
        }
    }
}
