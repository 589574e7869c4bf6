//! Channels to many agents, kept while they are used.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::clients::{AgentClient, Clients};
use crate::endpoint::{ClientOptions, ClientTls, Peer, channel};
use crate::error::ClientError;

/// How a pool talks to agents, and how many it keeps.
#[derive(Clone, Debug)]
pub struct AgentPoolOptions {
    /// Certificates; `None` is plain text.
    pub tls: Option<ClientTls>,
    /// How long a connection may take.
    pub connect_timeout: Duration,
    /// How long each call may take until its first answer; `None` is as long as the agent likes.
    pub request_timeout: Option<Duration>,
    /// Most channels kept. The one that was not used for longest goes first.
    pub max_channels: usize,
    /// How long a channel is kept without being used.
    pub idle: Duration,
}

impl Default for AgentPoolOptions {
    fn default() -> Self {
        Self {
            tls: None,
            connect_timeout: Duration::from_secs(5),
            request_timeout: None,
            max_channels: 1024,
            idle: Duration::from_mins(5),
        }
    }
}

/// Channels to agents by address. Clones share them. A call in flight is never cut: the pool forgets, the call's own
/// clone of the channel lives on.
#[derive(Clone, Debug)]
pub struct AgentPool {
    options: Arc<AgentPoolOptions>,
    channels: Arc<Mutex<HashMap<String, Kept>>>,
}

#[derive(Debug)]
struct Kept {
    channel: Channel,
    last_used: Instant,
}

impl AgentPool {
    /// An empty pool.
    #[must_use]
    pub fn new(options: AgentPoolOptions) -> Self {
        Self { options: Arc::new(options), channels: Arc::default() }
    }

    /// A client for the agent at `host:port`. Connects with its first call, and again after the connection broke.
    ///
    /// # Errors
    /// The address or the certificates cannot be used.
    pub fn get(&self, address: &str) -> Result<AgentClient, ClientError> {
        let now = Instant::now();
        let mut channels = self.channels.lock();
        if let Some(kept) = channels.get_mut(address) {
            kept.last_used = now;
            return Ok(Clients::new(kept.channel.clone()).agent());
        }
        let channel = channel(&self.client_options(address))?;
        channels.retain(|_, kept| now.duration_since(kept.last_used) < self.options.idle);
        if channels.len() >= self.options.max_channels {
            let oldest =
                channels.iter().min_by_key(|(_, kept)| kept.last_used).map(|(address, _)| address.clone());
            oldest.and_then(|address| channels.remove(&address));
        }
        channels.insert(address.to_owned(), Kept { channel: channel.clone(), last_used: now });
        Ok(Clients::new(channel).agent())
    }

    /// How the agent at `address` is reached; also what [`crate::explain`] wants.
    #[must_use]
    pub fn client_options(&self, address: &str) -> ClientOptions {
        ClientOptions {
            peer: Peer::Agent,
            tls: self.options.tls.clone(),
            connect_timeout: self.options.connect_timeout,
            request_timeout: self.options.request_timeout,
            ..ClientOptions::new(address)
        }
    }

    /// Forgets a channel, because calls over it fail: the next call dials afresh.
    pub fn forget(&self, address: &str) {
        self.channels.lock().remove(address);
    }

    /// How many channels are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.channels.lock().len()
    }

    /// Whether no channel is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn idle_channels_go_and_the_bound_holds() {
        let options =
            AgentPoolOptions { max_channels: 2, idle: Duration::from_mins(1), ..Default::default() };
        let pool = AgentPool::new(options);
        for address in ["a:1", "b:1"] {
            pool.get(address).unwrap();
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        pool.get("a:1").unwrap();
        tokio::time::advance(Duration::from_secs(1)).await;
        pool.get("c:1").unwrap();
        let mut kept: Vec<_> = pool.channels.lock().keys().cloned().collect();
        kept.sort();
        assert_eq!(kept, ["a:1", "c:1"], "the one that was not used for longest had to go");

        tokio::time::advance(Duration::from_mins(2)).await;
        pool.get("d:1").unwrap();
        assert_eq!(pool.len(), 1);
        pool.forget("d:1");
        assert!(pool.is_empty());
    }

    #[tokio::test]
    async fn an_address_that_is_none_is_refused_and_not_kept() {
        let pool = AgentPool::new(AgentPoolOptions::default());
        assert!(pool.get("nonsense").is_err());
        assert!(pool.is_empty());
    }
}
