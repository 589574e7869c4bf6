//! Prometheus metrics of the process.
//!
//! Code records with the macros of the `metrics` crate (`counter!`, `gauge!`, `histogram!`); this module installs the
//! recorder behind them and renders what was recorded.
//!
//! # Cardinality
//! Every combination of label values is a series that lives as long as the process. Label values therefore come from
//! closed sets (a method, a state, an error code), never from users or the fleet: no instance ids, names, request ids
//! or addresses. What grows with the fleet is a gauge of its size, or a log record.

use std::sync::OnceLock;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use parking_lot::Mutex;

/// The content type of [`Metrics::render`] (Prometheus text exposition format 0.0.4).
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds in seconds of the histograms whose names end in `_seconds`: from a store write to a slow boot.
const SECONDS_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// Metrics cannot be recorded.
#[derive(Debug, thiserror::Error)]
#[error("cannot install the metrics recorder")]
pub struct MetricsError {
    source: BuildError,
}

/// The process's metrics. Clones share them.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Installs the recorder of this process. Further calls give the same metrics, so that several servers can run in
    /// one test process.
    ///
    /// # Errors
    /// [`MetricsError`] if another recorder was installed before.
    pub fn install() -> Result<Self, MetricsError> {
        static INSTALLED: OnceLock<Metrics> = OnceLock::new();
        static INSTALLING: Mutex<()> = Mutex::new(());

        let _installing = INSTALLING.lock();
        if let Some(metrics) = INSTALLED.get() {
            return Ok(metrics.clone());
        }
        let handle = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS)
            .and_then(PrometheusBuilder::install_recorder)
            .map_err(|source| MetricsError { source })?;
        Ok(INSTALLED.get_or_init(|| Self { handle }).clone())
    }

    /// Everything recorded so far, in the Prometheus text format; serve it as [`CONTENT_TYPE`].
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds the observations of histograms into their buckets, which otherwise happens on [`render`](Self::render):
    /// call it now and then where nobody may be scraping, or observations pile up in memory.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_rendered_by_every_handle() {
        let first = Metrics::install().unwrap();
        let second = Metrics::install().unwrap();
        ::metrics::counter!("hv_test_total", "kind" => "a").increment(2);
        ::metrics::histogram!("hv_test_seconds").record(0.03);
        first.upkeep();
        let text = second.render();
        assert!(text.contains("hv_test_total{kind=\"a\"} 2"), "{text}");
        assert!(text.contains("hv_test_seconds_bucket{le=\"0.025\"} 0"), "{text}");
        assert!(text.contains("hv_test_seconds_bucket{le=\"0.05\"} 1"), "{text}");
    }
}
