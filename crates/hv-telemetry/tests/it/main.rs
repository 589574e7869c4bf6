//! The integration tests of hv-telemetry: what is seen from outside the process.

#[cfg(debug_assertions)]
mod crash;
mod http;
mod log;
#[cfg(unix)]
mod signals;
