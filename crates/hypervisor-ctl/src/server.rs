//! The connection to the server: bounded calls, tried again where that is safe.

use std::time::Duration;

use hv_client::{ClientOptions, Clients, ClusterClient, ComputeClient, OperationClient, StoreClient};
use hv_telemetry::RequestId;
use hv_types::{RequestKey, ServiceError};
use tokio::time::Instant;
use tonic::{Code, Response, Status};

use crate::cli::RequestKeyArgs;
use crate::error::CtlError;
use crate::settings::Settings;

/// How often a call is sent at most.
const MAX_ATTEMPTS: u32 = 4;
/// Longest wait before the second attempt, in milliseconds; it doubles with each further one.
const FIRST_PAUSE_MS: u64 = 100;
/// Longest wait between two attempts, in milliseconds.
const MAX_PAUSE_MS: u64 = 2000;
/// How long the answer to one call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// The server, and how long this command may take.
#[derive(Debug)]
pub(crate) struct Server {
    options: ClientOptions,
    clients: Clients,
    /// How long to wait for what was asked for.
    pub(crate) timeout: Duration,
}

impl Server {
    /// A connection that is made with the first call. Must be called within a runtime.
    pub(crate) fn new(settings: &Settings) -> Result<Self, CtlError> {
        let options = settings.client_options();
        let channel = hv_client::channel(&options).map_err(ServiceError::from)?;
        Ok(Self { options, clients: Clients::new(channel), timeout: settings.ctl.timeout.get() })
    }

    pub(crate) fn compute(&self) -> ComputeClient {
        self.clients.compute()
    }

    pub(crate) fn cluster(&self) -> ClusterClient {
        self.clients.cluster()
    }

    pub(crate) fn operations(&self) -> OperationClient {
        self.clients.operations()
    }

    pub(crate) fn store(&self) -> StoreClient {
        self.clients.store()
    }

    /// The same settings towards another server.
    pub(crate) fn elsewhere(&self, address: &str) -> Result<Self, CtlError> {
        let options = ClientOptions { endpoint: address.to_owned(), ..self.options.clone() };
        let channel = hv_client::channel(&options).map_err(ServiceError::from)?;
        Ok(Self { options, clients: Clients::new(channel), timeout: self.timeout })
    }

    /// Where it is.
    pub(crate) fn address(&self) -> &str {
        &self.options.endpoint
    }

    /// The error that a failed call stands for.
    pub(crate) fn error(&self, status: &Status) -> CtlError {
        CtlError::Service(hv_client::explain(&self.options, status))
    }

    /// Sends a call until it is answered or [`MAX_ATTEMPTS`] are used up. Only for calls that have one effect however
    /// often they are sent: those that read, and those with a request key.
    pub(crate) async fn call<T>(
        &self,
        send: impl AsyncFn() -> Result<Response<T>, Status>,
    ) -> Result<T, CtlError> {
        let deadline = Instant::now() + self.timeout;
        let mut attempt = 1;
        loop {
            let limit = CALL_TIMEOUT.min(deadline.saturating_duration_since(Instant::now()));
            let status = match tokio::time::timeout(limit, send()).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => {
                    let seconds = limit.as_secs_f32();
                    let text = format!(
                        "the server at {} did not answer within {seconds:.0} s",
                        self.options.endpoint
                    );
                    return Err(CtlError::Service(ServiceError::unavailable(text)));
                }
            };
            let pause = pushback(&status).unwrap_or_else(|| pause_before(attempt + 1));
            let again = (status.code() == Code::Unavailable || pushback(&status).is_some())
                && attempt < MAX_ATTEMPTS
                && Instant::now() + pause < deadline;
            if !again {
                return Err(self.error(&status));
            }
            tracing::debug!(
                attempt,
                ?pause,
                reason = status.message(),
                "the server does not answer, trying again"
            );
            tokio::time::sleep(pause).await;
            attempt += 1;
        }
    }
}

/// After how long the server that had too much to do wants to be asked again.
fn pushback(status: &Status) -> Option<Duration> {
    let value = status.metadata().get(hv_proto::status::RETRY_PUSHBACK_KEY)?;
    value.to_str().ok()?.parse().ok().map(Duration::from_millis)
}

/// How long to wait before an attempt: a random part of a bound that doubles, so that many clients do not come back at once.
pub(crate) fn pause_before(attempt: u32) -> Duration {
    let bound = FIRST_PAUSE_MS.saturating_mul(1 << attempt.saturating_sub(2).min(16)).min(MAX_PAUSE_MS);
    Duration::from_millis(rand::random_range(bound / 2..=bound))
}

/// The keys of a command's mutations: the user's own, or new ones.
#[derive(Debug)]
pub(crate) struct RequestKeys {
    base: RequestKey,
    used: u32,
}

impl RequestKeys {
    pub(crate) fn new(args: &RequestKeyArgs) -> Self {
        Self { base: args.request_key.clone().unwrap_or_else(RequestKey::generate), used: 0 }
    }

    /// The next one. The first is the user's own as it is; further mutations of the same command get numbers, so that a
    /// repeated command repeats them all.
    pub(crate) fn next(&mut self) -> String {
        self.used += 1;
        match self.used {
            1 => self.base.to_string(),
            number => format!("{}.{number}", self.base),
        }
    }
}

/// The identity of this command's calls.
pub(crate) fn request_id(given: Option<&RequestId>) -> RequestId {
    given.cloned().unwrap_or_else(RequestId::generate)
}
