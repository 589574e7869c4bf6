//! Tells the control plane what was seen, until it has an answer to each report.
//!
//! # Theory of operation
//! Of each instance only the latest report waits, so the queue is bounded by the number of instances. Reports are sent
//! only while the assignment stream has delivered the whole set: a report of an old binding could otherwise get an
//! instance removed whose new binding is just on its way.
//!
//! # Failure and recovery
//! A call that was given up may still arrive, at a server that stood still say, after a newer report was taken through
//! another one, and what it says is then recorded last. So everything is reported again from time to time; where the record
//! says so already, nothing is written.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use hv_proto::v1::{InstanceReport, ReportInstancesRequest, ReportVerdict};
use hv_telemetry::crash::{Point, reach};
use hv_types::{Epoch, InstanceId};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::instances::Instances;
use crate::servers::Servers;

/// Most reports in one call: what the contract takes.
const BATCH: usize = 100;

/// How often everything is reported again, give or take a quarter.
const REPEAT_EVERY: Duration = Duration::from_secs(60);

/// The latest report of each instance that has one to send.
#[derive(Default)]
pub(crate) struct Reports {
    waiting: Mutex<BTreeMap<InstanceId, InstanceReport>>,
    /// The last one that was taken: the next batch begins after it, so that none is sent twice before all were once.
    last: Mutex<Option<InstanceId>>,
    wake: Notify,
}

impl Reports {
    /// Replaces what was to be reported of an instance.
    pub(crate) fn submit(&self, id: InstanceId, report: InstanceReport) {
        self.waiting.lock().insert(id, report);
        self.wake.notify_one();
    }

    /// Nothing is to be reported of it any more.
    pub(crate) fn withdraw(&self, id: &InstanceId) {
        self.waiting.lock().remove(id);
    }

    fn take(&self) -> Vec<(InstanceId, InstanceReport)> {
        let mut waiting = self.waiting.lock();
        let mut last = self.last.lock();
        let after = last.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        let behind = waiting.range::<InstanceId, _>((after, Bound::Unbounded)).map(|(id, _)| id);
        let ids: Vec<InstanceId> =
            behind.chain(waiting.keys()).take(BATCH.min(waiting.len())).cloned().collect();
        *last = ids.last().cloned();
        ids.into_iter().filter_map(|id| waiting.remove_entry(&id)).collect()
    }

    /// Puts back what was not answered, unless something newer waits.
    fn put_back(&self, unanswered: Vec<(InstanceId, InstanceReport)>) {
        let mut waiting = self.waiting.lock();
        for (id, report) in unanswered {
            waiting.entry(id).or_insert(report);
        }
    }

    async fn some(&self) {
        loop {
            let woken = self.wake.notified();
            if !self.waiting.lock().is_empty() {
                return;
            }
            woken.await;
        }
    }
}

/// When everything is to be reported again: not at the same moment on all nodes.
fn next_repetition() -> Instant {
    Instant::now() + REPEAT_EVERY.mul_f64(rand::random_range(0.75..1.25))
}

/// Sends the reports.
pub(crate) struct Reporter {
    pub(crate) instances: Arc<Instances>,
    pub(crate) servers: Arc<Servers>,
    /// The cluster, while the whole set of assignments is known.
    pub(crate) synced: watch::Receiver<Option<String>>,
    pub(crate) timeout: Duration,
    pub(crate) backoff: Backoff,
}

impl Reporter {
    /// Reports until the agent stops.
    pub(crate) async fn run(mut self, stopping: CancellationToken) {
        tokio::select! {
            () = stopping.cancelled() => {}
            () = self.report() => {}
        }
    }

    async fn report(&mut self) {
        let context = Arc::clone(self.instances.context());
        let mut repeat = next_repetition();
        loop {
            let Ok(cluster_id) = self.synced.wait_for(Option::is_some).await.map(|cluster| cluster.clone())
            else {
                return;
            };
            if tokio::time::timeout_at(repeat, context.reports.some()).await.is_err() {
                repeat = next_repetition();
                self.instances.report_all().await;
                continue;
            }
            let batch = context.reports.take();
            reach(Point::AgentReportBefore);
            let request = ReportInstancesRequest {
                node_id: context.node_id.to_string(),
                cluster_id: cluster_id.unwrap_or_default(),
                reports: batch.iter().map(|(_, report)| report.clone()).collect(),
            };
            let server = self.servers.current();
            let mut client = server.clients.assignment();
            let call = client.report_instances(request);
            let verdicts = match tokio::time::timeout(self.timeout, call).await {
                Ok(Ok(answer)) => answer.into_inner().verdicts,
                Ok(Err(status)) => {
                    tracing::warn!(code = ?status.code(), error = status.message(), "reports were not taken");
                    self.servers.failed(server, hv_client::explain(&server.options, &status).code());
                    Vec::new()
                }
                Err(_) => {
                    tracing::warn!(timeout = ?self.timeout, "the server does not answer reports");
                    Vec::new()
                }
            };
            reach(Point::AgentReportAfter);
            let sent = batch.len();
            let unanswered = self.conclude(batch, &verdicts).await;
            if unanswered.len() < sent {
                self.backoff.reset();
            }
            if !unanswered.is_empty() {
                context.reports.put_back(unanswered);
                tokio::time::sleep(self.backoff.pause()).await;
            }
        }
    }

    /// Follows the verdicts; what has none is returned.
    async fn conclude(
        &self,
        batch: Vec<(InstanceId, InstanceReport)>,
        verdicts: &[i32],
    ) -> Vec<(InstanceId, InstanceReport)> {
        let mut unanswered = Vec::new();
        for (index, (id, report)) in batch.into_iter().enumerate() {
            let verdict = verdicts.get(index).and_then(|verdict| ReportVerdict::try_from(*verdict).ok());
            let epoch = Epoch(report.epoch);
            let name = match verdict {
                Some(ReportVerdict::Accepted) => {
                    if report.gone {
                        self.instances.gone_is_known(&id, epoch, report.observed_generation).await;
                    }
                    "accepted"
                }
                Some(ReportVerdict::Release) => {
                    tracing::info!(instance = %id, %epoch, "the control plane says that it is not this node's");
                    self.instances.release(&id, Some(epoch)).await;
                    "release"
                }
                Some(ReportVerdict::Retry | ReportVerdict::Unspecified) | None => {
                    unanswered.push((id, report));
                    "retry"
                }
            };
            metrics::counter!("hypervisor_agent_reports_total", "verdict" => name).increment(1);
        }
        unanswered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(state_reason: &str) -> InstanceReport {
        InstanceReport { state_reason: state_reason.into(), ..InstanceReport::default() }
    }

    fn id(index: usize) -> InstanceId {
        format!("i-{index:03}").parse().unwrap()
    }

    #[test]
    fn what_is_put_back_does_not_replace_something_newer() {
        let reports = Reports::default();
        reports.submit(id(0), report("old"));
        let taken = reports.take();
        reports.submit(id(0), report("new"));
        reports.put_back(taken);
        let texts: Vec<_> = reports.take().into_iter().map(|(_, report)| report.state_reason).collect();
        assert_eq!(texts, ["new"]);
    }

    #[test]
    fn those_that_are_refused_again_and_again_do_not_keep_others_from_being_sent() {
        let reports = Reports::default();
        for index in 0..250 {
            reports.submit(id(index), report(""));
        }
        let mut sent = std::collections::BTreeSet::new();
        for _ in 0..3 {
            let batch = reports.take();
            assert_eq!(batch.len(), BATCH);
            sent.extend(batch.iter().map(|(id, _)| id.clone()));
            reports.put_back(batch);
        }
        assert_eq!(sent.len(), 250);
    }
}
