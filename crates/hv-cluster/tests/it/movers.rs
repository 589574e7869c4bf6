//! A double: two nodes' agents, as moves see them, that count which copy of the instance runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hv_cluster::operations::{Answer, Nodes};
use hv_cluster::reports::{Report, Verdict};
use hv_proto::v1;
use hv_types::{ErrorCode, InstanceId, InstanceState, NodeId, ServiceError};
use parking_lot::Mutex;
use tokio::task::JoinHandle;

use crate::world::{Server, report};

/// The calls, as faults name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Call {
    Prepare,
    Begin,
    AskSource,
    AskTarget,
    AbortSource,
    AbortTarget,
}

/// How a call goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// So often it does not arrive.
    Lost(u32),
    /// So often it is done, and its answer does not arrive.
    Unanswered(u32),
    /// It cannot be.
    Refused,
}

#[derive(Default)]
pub(crate) struct Seen {
    /// The migration that the target waits for.
    pub(crate) incoming: Option<String>,
    /// The migration that the source works on.
    pub(crate) outgoing: Option<String>,
    pub(crate) handed_over: bool,
    pub(crate) target_runs: bool,
    /// Aborted at the source.
    ended: BTreeSet<String>,
    polls: u32,
    calls: BTreeMap<Call, u32>,
}

impl Seen {
    pub(crate) fn source_runs(&self) -> bool {
        !self.handed_over
    }

    pub(crate) fn count(&self, call: Call) -> u32 {
        self.calls.get(&call).copied().unwrap_or(0)
    }
}

/// Two nodes, between which one instance moves.
pub(crate) struct Movers {
    pub(crate) seen: Mutex<Seen>,
    faults: Mutex<BTreeMap<Call, Fault>>,
    /// After so many polls everything is there; `u32::MAX`: never.
    pub(crate) polls: Mutex<u32>,
    /// What waits at the target is lost before the commit.
    pub(crate) target_dies: Mutex<bool>,
    /// The source gives up by itself.
    pub(crate) source_fails: Mutex<bool>,
    /// The target fetches the image of what comes.
    pub(crate) target_fetches: Mutex<bool>,
    /// Not everything that was sent has reached the target.
    pub(crate) is_on_its_way: Mutex<bool>,
}

/// The image that the source's store gave the instance.
const IMAGE: &str = "sha256:1";

impl Movers {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            seen: Mutex::default(),
            faults: Mutex::default(),
            polls: Mutex::new(2),
            target_dies: Mutex::new(false),
            source_fails: Mutex::new(false),
            target_fetches: Mutex::new(false),
            is_on_its_way: Mutex::new(false),
        })
    }

    pub(crate) fn fault(&self, call: Call, fault: Fault) {
        self.faults.lock().insert(call, fault);
    }

    pub(crate) fn heal(&self) {
        self.faults.lock().clear();
    }

    fn fate(&self, call: Call) -> Option<Fault> {
        *self.seen.lock().calls.entry(call).or_default() += 1;
        let mut faults = self.faults.lock();
        let fault = faults.get_mut(&call)?;
        let now = *fault;
        match fault {
            Fault::Refused => {}
            Fault::Lost(left) | Fault::Unanswered(left) => {
                if *left == 0 {
                    return None;
                }
                *left = left.saturating_sub(1);
            }
        }
        Some(now)
    }

    fn answer<T>(&self, call: Call, act: impl FnOnce(&mut Seen) -> Answer<T>) -> Answer<T> {
        let lost = || ServiceError::new(ErrorCode::Unavailable, format!("{call:?} does not arrive"));
        match self.fate(call) {
            Some(Fault::Lost(_)) => Err(lost()),
            Some(Fault::Unanswered(_)) => {
                act(&mut self.seen.lock())?;
                Err(lost())
            }
            Some(Fault::Refused) => Err(ServiceError::precondition(format!("{call:?} is refused here"))),
            None => act(&mut self.seen.lock()),
        }
    }

    fn source(node: &NodeId) -> bool {
        node.as_str() == "n1"
    }

    /// The agents: the target goes on with what was bound to it, both report. Ends when aborted.
    pub(crate) fn agents(self: &Arc<Self>, server: &Server, id: &InstanceId) -> JoinHandle<()> {
        let (movers, id, cluster) = (self.clone(), id.clone(), server.cluster.clone());
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(5)).await;
                let Some(record) = cluster.cache().read(|state| state.instance(&id).cloned()) else {
                    continue;
                };
                let Some(node) = record.node_id().filter(|node| !Self::source(node)).cloned() else {
                    continue;
                };
                let arrives = record.arrives_by().map(|migration| migration.operation.clone());
                {
                    let mut seen = movers.seen.lock();
                    if arrives.is_some() && seen.incoming == arrives {
                        assert!(!seen.source_runs(), "it goes on at the target while it runs at the source");
                        seen.incoming = None;
                        seen.target_runs = true;
                    }
                    if !seen.target_runs {
                        continue;
                    }
                }
                let running: Report = report(&record, InstanceState::Running);
                let verdicts = cluster.report(&cluster.id(), &node, &[running]).await;
                assert!(!matches!(verdicts.as_deref(), Ok([Verdict::Release])), "what runs was released");
            }
        })
    }
}

#[async_trait]
impl Nodes for Movers {
    async fn prepare_incoming(
        &self,
        node: &NodeId,
        request: v1::AgentPrepareIncomingRequest,
    ) -> Answer<v1::AgentPrepareIncomingResponse> {
        assert!(!Self::source(node) && request.driver == "fake" && request.image_digest == IMAGE);
        let fetches = *self.target_fetches.lock();
        self.answer(Call::Prepare, |seen| {
            seen.incoming = Some(request.migration_id);
            if fetches {
                let progress = "its image: downloading, 50 % of 2 MiB".into();
                return Ok(v1::AgentPrepareIncomingResponse {
                    progress,
                    done_bytes: 1 << 20,
                    total_bytes: 2 << 20,
                    ..Default::default()
                });
            }
            Ok(v1::AgentPrepareIncomingResponse { target: "{}".into(), ..Default::default() })
        })
    }

    async fn begin_migration(
        &self,
        node: &NodeId,
        request: v1::AgentBeginMigrationRequest,
    ) -> Answer<v1::AgentMigrationStatus> {
        assert!(Self::source(node));
        self.answer(Call::Begin, |seen| {
            if seen.ended.contains(&request.migration_id) {
                return Err(ServiceError::precondition("it was aborted"));
            }
            if seen.outgoing.as_ref() != Some(&request.migration_id) {
                seen.outgoing = Some(request.migration_id);
                seen.polls = 0;
            }
            Ok(v1::AgentMigrationStatus::default())
        })
    }

    async fn migration(
        &self,
        node: &NodeId,
        _: &InstanceId,
        migration: &str,
    ) -> Answer<v1::AgentMigrationStatus> {
        let mut status = v1::AgentMigrationStatus {
            driver: "fake".into(),
            image_digest: IMAGE.into(),
            ..Default::default()
        };
        if !Self::source(node) {
            let (dies, is_on_its_way) = (*self.target_dies.lock(), *self.is_on_its_way.lock());
            return self.answer(Call::AskTarget, |seen| {
                let waits = seen.incoming.as_deref() == Some(migration) && !dies;
                status.set_phase(match waits {
                    true if is_on_its_way => v1::MigrationPhase::Memory,
                    true => v1::MigrationPhase::HandedOver,
                    false => v1::MigrationPhase::Failed,
                });
                status.message = if waits { String::new() } else { "it is gone".into() };
                Ok(status)
            });
        }
        let (polls, fails) = (*self.polls.lock(), *self.source_fails.lock());
        self.answer(Call::AskSource, |seen| {
            if seen.outgoing.as_deref() != Some(migration) {
                return Ok(status);
            }
            seen.polls += 1;
            if fails {
                status.set_phase(v1::MigrationPhase::Failed);
                status.message = "the wire broke".into();
            } else if seen.polls > polls {
                seen.handed_over = true;
                status.set_phase(v1::MigrationPhase::HandedOver);
                status.downtime_us = 1500;
            } else {
                status.set_phase(v1::MigrationPhase::Memory);
            }
            (status.done_bytes, status.total_bytes) = (u64::from(seen.polls) * 10, 1000);
            Ok(status)
        })
    }

    async fn abort_migration(&self, node: &NodeId, _: &InstanceId, migration: &str) -> Answer<()> {
        if Self::source(node) {
            return self.answer(Call::AbortSource, |seen| {
                assert!(!seen.target_runs, "it is let go on at the source while it runs at the target");
                seen.ended.insert(migration.to_owned());
                if seen.outgoing.as_deref() == Some(migration) {
                    seen.outgoing = None;
                    seen.handed_over = false;
                }
                Ok(())
            });
        }
        self.answer(Call::AbortTarget, |seen| {
            assert!(!seen.target_runs, "what runs is removed");
            if seen.incoming.as_deref() == Some(migration) {
                seen.incoming = None;
            }
            Ok(())
        })
    }
}
