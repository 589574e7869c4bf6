//! The HTTP port: health and metrics.

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// Serves until `stop`.
pub(crate) async fn serve(router: axum::Router, listener: TcpListener, stop: CancellationToken) {
    let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await;
    if let Err(cause) = served {
        error!(error = hv_telemetry::error_chain(&cause), "the HTTP port failed");
    }
}
