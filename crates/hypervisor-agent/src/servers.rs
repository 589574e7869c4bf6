//! The servers that the agent may dial: one at a time, the next when one fails.

use std::sync::atomic::{AtomicUsize, Ordering};

use hv_client::{ClientError, ClientOptions, Clients, channel};
use hv_types::ErrorCode;

/// The servers, all of one cluster.
pub(crate) struct Servers {
    all: Vec<Server>,
    current: AtomicUsize,
}

/// One of them.
pub(crate) struct Server {
    pub(crate) options: ClientOptions,
    pub(crate) clients: Clients,
    index: usize,
}

impl Servers {
    /// Nothing is dialled yet.
    ///
    /// # Errors
    /// An address or the certificates cannot be used.
    pub(crate) fn new(all: Vec<ClientOptions>) -> Result<Self, ClientError> {
        let server = |(index, options): (usize, ClientOptions)| {
            let clients = Clients::new(channel(&options)?);
            Ok(Server { options, clients, index })
        };
        let all = all.into_iter().enumerate().map(server).collect::<Result<Vec<_>, ClientError>>()?;
        Ok(Self { all, current: AtomicUsize::new(0) })
    }

    /// One server that is reached through these clients.
    pub(crate) fn only(options: ClientOptions, clients: Clients) -> Self {
        Self { all: vec![Server { options, clients, index: 0 }], current: AtomicUsize::new(0) }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.all.len()
    }

    /// The one that is dialled now.
    pub(crate) fn current(&self) -> &Server {
        &self.all[self.current.load(Ordering::Relaxed) % self.all.len()]
    }

    /// A call to a server failed: unless somebody has turned away from it already, the next is taken from now on.
    pub(crate) fn failed(&self, server: &Server, code: ErrorCode) {
        let is_its_own =
            matches!(code, ErrorCode::Unavailable | ErrorCode::DeadlineExceeded | ErrorCode::Internal);
        if !is_its_own || self.all.len() < 2 {
            return;
        }
        let (now, next) = (server.index, (server.index + 1) % self.all.len());
        let turned = self.current.compare_exchange(now, next, Ordering::Relaxed, Ordering::Relaxed);
        if turned.is_ok() {
            let (from, to) = (&server.options.endpoint, &self.all[next].options.endpoint);
            tracing::info!(from, to, "turning to the next server");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_sees_a_failure_turns_to_the_next_server_once() {
        let options = |port: u16| ClientOptions::new(format!("127.0.0.1:{port}"));
        let servers = Servers::new(vec![options(1), options(2), options(3)]).unwrap();
        let at = || servers.current().options.endpoint.clone();
        let first = servers.current();
        servers.failed(first, ErrorCode::NotFound);
        assert_eq!(at(), "127.0.0.1:1", "an answer is no failure of the server");
        servers.failed(first, ErrorCode::Unavailable);
        servers.failed(first, ErrorCode::Unavailable);
        assert_eq!(at(), "127.0.0.1:2");
        servers.failed(servers.current(), ErrorCode::DeadlineExceeded);
        servers.failed(servers.current(), ErrorCode::Unavailable);
        assert_eq!(at(), "127.0.0.1:1");
    }
}
