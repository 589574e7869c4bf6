//! What is told to all, as a stream for one.

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use tokio::sync::broadcast;

/// What is told from now on, until nobody can tell any more. Whoever is too slow loses the oldest.
pub fn heard<T: Clone + Send + 'static>(receiver: broadcast::Receiver<T>) -> BoxStream<'static, T> {
    stream::unfold(receiver, |mut receiver| async {
        loop {
            match receiver.recv().await {
                Ok(told) => return Some((told, receiver)),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    })
    .boxed()
}
