//! Logs, metrics, health, error chains, request ids, crash points and shutdown: what every program shows of itself.
//!
//! # Example
//! ```
//! use std::time::Duration;
//!
//! use hv_telemetry::health::Health;
//! use hv_telemetry::metrics::Metrics;
//! use hv_telemetry::{LogFormat, LogLevel, LogOptions, Shutdown};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! hv_telemetry::init(LogOptions { level: LogLevel::Info, format: LogFormat::Text })?;
//! let metrics = Metrics::install()?;
//! let shutdown = Shutdown::on_signals()?;
//!
//! let health = Health::new();
//! let store = health.check("store"); // not ready: starting
//! let _router: axum::Router = health.router(metrics); // /healthz /readyz /metrics
//! store.ready();
//!
//! let token = shutdown.token();
//! shutdown.spawn("reconciler", async move { token.cancelled().await });
//! # shutdown.trigger();
//! shutdown.wait(Duration::from_secs(30)).await?; // SIGTERM or SIGINT; a second one ends the wait at once
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })
//! # }
//! ```

pub mod crash;
mod error_chain;
pub mod health;
mod log;
pub mod metrics;
pub mod request_id;
mod shutdown;
pub mod supervisor;

pub use error_chain::error_chain;
pub use log::{InitError, LogFormat, LogLevel, LogOptions, ParseLogOptionError, init, subscriber};
pub use request_id::RequestId;
pub use shutdown::{Shutdown, ShutdownError, SignalError};
