//! The cluster's members: connections to each, and which one calls go to.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{
    Certificate, Client, ConnectOptions, Error, Identity, KvClient, LeaseClient, MaintenanceClient,
    TlsOptions, WatchClient,
};
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout_at};

use super::error::{answer_too_large, never_sent, store_error};
use super::{EtcdOptions, EtcdTls, PING_INTERVAL, PING_TIMEOUT};
use crate::{Result, StoreError};

/// Largest answer that is taken, in bytes: a page of large values.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// A read's time is shared by so many members at most, so that each gets enough.
const MAX_SHARES: u32 = 3;

/// Clients of one connection.
#[derive(Clone)]
pub(super) struct Member {
    pub(super) kv: KvClient,
    pub(super) lease: LeaseClient,
    pub(super) watch: WatchClient,
    pub(super) maintenance: MaintenanceClient,
}

/// Whether a call that may have been carried out can be made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// It reads, or doing it twice is as good as once.
    Always,
    /// Only if it was certainly not sent.
    IfNeverSent,
}

/// All members. Connections are made when they are first needed, and again by themselves.
pub(super) struct Members {
    endpoints: Vec<String>,
    connect: ConnectOptions,
    pub(super) request_timeout: Duration,
    /// By member, then by connection.
    connections: Vec<Vec<OnceCell<Member>>>,
    /// Which member is preferred.
    preferred: AtomicUsize,
    /// Which connection is next.
    turn: AtomicUsize,
}

impl Members {
    pub(super) fn new(options: EtcdOptions) -> Result<Self> {
        if options.endpoints.is_empty() {
            return Err(StoreError::InvalidRequest("no etcd endpoint is given".to_owned()));
        }
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(options.dial_timeout)
            .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
            .with_keep_alive_while_idle(false)
            // A member that has lost the others says so instead of hanging.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some(tls) = &options.tls {
            connect = connect.with_tls(read_tls(tls)?);
        }
        if let Some((name, password)) = &options.user {
            connect = connect.with_user(name, password);
        }
        let channels = || (0..options.channels.max(1)).map(|_| OnceCell::new()).collect();
        let connections: Vec<_> = options.endpoints.iter().map(|_| channels()).collect();
        // Many servers with the same list must not all prefer the same member.
        let preferred = rand::random_range(0..options.endpoints.len());
        Ok(Self {
            endpoints: options.endpoints,
            connect,
            request_timeout: options.request_timeout,
            connections,
            preferred: AtomicUsize::new(preferred),
            turn: AtomicUsize::new(0),
        })
    }

    /// All of them, for messages.
    pub(super) fn endpoints(&self) -> String {
        self.endpoints.join(", ")
    }

    pub(super) fn len(&self) -> usize {
        self.endpoints.len()
    }

    pub(super) fn endpoint(&self, index: usize) -> &str {
        &self.endpoints[index]
    }

    /// Which member is preferred now.
    pub(super) fn preferred(&self) -> usize {
        self.preferred.load(Ordering::Relaxed) % self.endpoints.len()
    }

    /// Prefers the next member, unless somebody has moved on from this one already.
    pub(super) fn failed(&self, index: usize) {
        let next = (index + 1) % self.endpoints.len();
        if self.preferred.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
            && next != index
        {
            tracing::warn!(from = %self.endpoints[index], to = %self.endpoints[next], "changing the etcd member");
        }
    }

    /// A connection to a member. Only with a user this talks to the member.
    pub(super) async fn member(&self, index: usize) -> std::result::Result<Member, Error> {
        let connections = &self.connections[index];
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % connections.len();
        let endpoint = &self.endpoints[index];
        let connect = || async {
            let client = Client::connect([endpoint], Some(self.connect.clone())).await?;
            Ok::<_, Error>(Member {
                kv: client.kv_client().max_decoding_message_size(MAX_ANSWER_BYTES),
                lease: client.lease_client(),
                watch: client.watch_client().max_decoding_message_size(MAX_ANSWER_BYTES),
                maintenance: client.maintenance_client(),
            })
        };
        connections[turn].get_or_try_init(connect).await.cloned()
    }

    /// Calls the preferred member, and the others if that fails and the call can be repeated.
    pub(super) async fn call<T, F>(
        &self,
        repeat: Repeat,
        request: impl Fn(Member) -> F,
    ) -> std::result::Result<T, StoreError>
    where
        F: Future<Output = std::result::Result<T, Error>>,
    {
        self.try_call(repeat, request).await.map_err(|failure| failure.into_store_error(self))
    }

    /// As [`Self::call`]; the caller looks at the error itself.
    pub(super) async fn try_call<T, F>(
        &self,
        repeat: Repeat,
        request: impl Fn(Member) -> F,
    ) -> std::result::Result<T, Failure>
    where
        F: Future<Output = std::result::Result<T, Error>>,
    {
        let deadline = Instant::now() + self.request_timeout;
        let mut left = self.len();
        loop {
            let index = self.preferred();
            left -= 1;
            let share = match repeat {
                Repeat::Always => {
                    deadline.saturating_duration_since(Instant::now()) / (left as u32 + 1).min(MAX_SHARES)
                }
                Repeat::IfNeverSent => deadline.saturating_duration_since(Instant::now()),
            };
            let attempt = async { request(self.member(index).await?).await };
            let failure = match timeout_at(Instant::now() + share, attempt).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => Failure::Error { error, index },
                Err(_) => Failure::Timeout,
            };
            if !failure.is_members_fault() {
                return Err(failure);
            }
            self.failed(index);
            if left == 0 || !failure.repeatable(repeat) || Instant::now() >= deadline {
                return Err(failure);
            }
        }
    }
}

/// Why a call failed, and at which member.
pub(super) enum Failure {
    Error { error: Error, index: usize },
    Timeout,
}

impl Failure {
    /// Whether another member could do better.
    fn is_members_fault(&self) -> bool {
        match self {
            Self::Timeout => true,
            Self::Error { error, .. } if answer_too_large(error) => false,
            Self::Error { error: Error::GRpcStatus(status), .. } => {
                matches!(store_error(Error::GRpcStatus(status.clone()), ""), StoreError::Unavailable { .. })
            }
            Self::Error { error, .. } => {
                !matches!(error, Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::LeaseKeepAliveError(_))
            }
        }
    }

    fn repeatable(&self, repeat: Repeat) -> bool {
        match (repeat, self) {
            (Repeat::Always, _) => true,
            (Repeat::IfNeverSent, Self::Error { error, .. }) => never_sent(error),
            (Repeat::IfNeverSent, Self::Timeout) => false,
        }
    }

    pub(super) fn into_store_error(self, members: &Members) -> StoreError {
        match self {
            // Where several were tried, name them all.
            Self::Error { error, index } => match store_error(error, members.endpoint(index)) {
                StoreError::Unavailable { source, .. } => {
                    StoreError::Unavailable { endpoint: members.endpoints(), source }
                }
                error => error,
            },
            Self::Timeout => members.timeout(),
        }
    }
}

impl Members {
    pub(super) fn timeout(&self) -> StoreError {
        let timeout_ms = u64::try_from(self.request_timeout.as_millis()).unwrap_or(u64::MAX);
        StoreError::Timeout { endpoint: self.endpoints(), timeout_ms }
    }
}

fn read_tls(tls: &EtcdTls) -> Result<TlsOptions> {
    let read = |path: &Path| {
        fs::read(path).map_err(|source| StoreError::Io {
            operation: "reading a certificate",
            path: path.display().to_string(),
            source: source.into(),
        })
    };
    let identity = Identity::from_pem(read(&tls.cert)?, read(&tls.key)?);
    Ok(TlsOptions::new().ca_certificate(Certificate::from_pem(read(&tls.ca)?)).identity(identity))
}
