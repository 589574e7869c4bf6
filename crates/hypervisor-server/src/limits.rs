//! What one caller, and all callers together, may ask at once: beyond it the answer is a clear error, not a stall.
//!
//! # Theory of operation
//! Each call passes two gates before it is parsed. The first counts the calls that are under way, of users and of nodes
//! apart, so that no flood of users keeps heartbeats from being answered. The second gives each address a bucket that is
//! refilled at a steady rate (the generic cell rate algorithm); nodes are not counted there, as many may come through one
//! address. A call that is refused carries when to come back, in the metadata `grpc-retry-pushback-ms` (gRPC A6).
//!
//! A stream holds its place only until it begins: how many there are is bounded per connection.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use hv_types::{ErrorCode, ServiceError};
use tokio::sync::{Semaphore, TryAcquireError};
use tonic::Status;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};

use crate::methods::{Kind, kind};
use crate::settings::LimitSettings;

/// Addresses whose buckets are kept; full ones are forgotten when there are more.
const ADDRESSES_KEPT: usize = 10_000;
/// When a caller is to come back who found all places taken.
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// The gates.
pub(crate) struct Limits {
    users: Arc<Semaphore>,
    nodes: Arc<Semaphore>,
    rate: Option<DefaultKeyedRateLimiter<IpAddr>>,
    per_second: u32,
    clock: DefaultClock,
}

impl Limits {
    pub(crate) fn new(settings: &LimitSettings) -> Arc<Self> {
        let quota = NonZeroU32::new(settings.calls_per_second).map(|rate| {
            let burst = NonZeroU32::new(settings.burst).unwrap_or(rate).max(rate);
            Quota::per_second(rate).allow_burst(burst)
        });
        Arc::new(Self {
            users: Arc::new(Semaphore::new(settings.calls_at_once)),
            nodes: Arc::new(Semaphore::new(settings.node_calls_at_once)),
            rate: quota.map(RateLimiter::keyed),
            per_second: settings.calls_per_second,
            clock: DefaultClock::default(),
        })
    }

    /// Whether an address may call now; otherwise when.
    fn admit(&self, address: IpAddr) -> Result<(), Duration> {
        let Some(rate) = &self.rate else { return Ok(()) };
        if rate.len() > ADDRESSES_KEPT {
            rate.retain_recent();
        }
        rate.check_key(&address).map_err(|until| until.wait_time_from(self.clock.now()))
    }
}

/// Lets a call through, or refuses it.
pub(crate) async fn enforce(State(limits): State<Arc<Limits>>, request: Request, next: Next) -> Response {
    let Some(kind) = kind(request.uri().path()) else { return next.run(request).await };
    let places = match kind {
        Kind::Node => &limits.nodes,
        Kind::Read | Kind::Change | Kind::Upkeep => {
            if let Some(address) = address(&request)
                && let Err(pause) = limits.admit(address)
            {
                let per_second = limits.per_second;
                return refuse(pause, format!("{address} calls more than {per_second} times a second"));
            }
            &limits.users
        }
    };
    let place = match places.clone().try_acquire_owned() {
        Ok(place) => place,
        Err(TryAcquireError::NoPermits | TryAcquireError::Closed) => {
            return refuse(BUSY_PAUSE, "this server has as many calls as it takes at once".to_owned());
        }
    };
    let response = next.run(request).await;
    drop(place);
    response
}

fn address(request: &Request) -> Option<IpAddr> {
    let extensions = request.extensions();
    let plain = extensions.get::<TcpConnectInfo>();
    let tls = extensions.get::<TlsConnectInfo<TcpConnectInfo>>().map(TlsConnectInfo::get_ref);
    plain.or(tls).and_then(TcpConnectInfo::remote_addr).map(|address| address.ip())
}

fn refuse(pause: Duration, why: String) -> Response {
    metrics::counter!("hypervisor_calls_refused_total").increment(1);
    let milliseconds = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX).max(1);
    let message = format!("{why}; nothing was done, try again in {milliseconds} ms");
    let error = ServiceError::new(ErrorCode::ResourceExhausted, message);
    let mut status: Status = hv_proto::status::to_status(&error);
    if let Ok(value) = milliseconds.to_string().parse() {
        status.metadata_mut().insert(hv_proto::status::RETRY_PUSHBACK_KEY, value);
    }
    status.into_http()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(calls_per_second: u32, burst: u32) -> Arc<Limits> {
        Limits::new(&LimitSettings { calls_per_second, burst, ..LimitSettings::default() })
    }

    #[test]
    fn an_address_gets_its_burst_and_then_its_rate_and_others_are_not_touched() {
        let limits = limits(10, 20);
        let (one, other) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let admitted = (0..100).take_while(|_| limits.admit(one).is_ok()).count();
        assert!((20..30).contains(&admitted), "{admitted}");
        let pause = limits.admit(one).unwrap_err();
        assert!(pause <= Duration::from_millis(100), "{pause:?}");
        assert_eq!(limits.admit(other), Ok(()));
    }

    #[test]
    fn no_rate_is_no_limit() {
        let limits = limits(0, 0);
        assert!((0..100_000).all(|_| limits.admit("::1".parse().unwrap()).is_ok()));
    }
}
