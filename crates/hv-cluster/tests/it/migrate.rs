//! Claims about moves of running instances: whatever fails, wherever the leader dies, one copy runs.

mod deadline;
mod targets;

use std::sync::Arc;
use std::time::Duration;

use hv_cluster::Mutation;
use hv_cluster::operations::migrate::MigrateOptions;
use hv_cluster::reports::{Report, Verdict};
use hv_proto::{convert, v1};
use hv_types::instance::{FailoverPolicy, Request, StopOptions};
use hv_types::node::Schedulability;
use hv_types::{
    ErrorCode, InstanceId, InstanceRecord, InstanceState, NodeId, OperationRecord, OperationState, Wanted,
};
use tokio::task::JoinHandle;

use crate::movers::{Call, Fault, Movers};
use crate::world::{Disk, Mute, Server, asked, code, config, disk, gone, node, report, until};

fn mover(id: &str, cores: i32) -> v1::RegisterNodeRequest {
    let fencing = Some(v1::FencingStatus { armed: true, message: "a fencer".into() });
    let driver = |t: v1::InstanceType| v1::DriverInfo {
        name: "fake".into(),
        r#type: t.into(),
        healthy: true,
        capabilities: vec!["migrate".into(), "migrate_storage".into()],
        ..v1::DriverInfo::default()
    };
    v1::RegisterNodeRequest { drivers: vec![driver(v1::InstanceType::Container)], fencing, ..node(id, cores) }
}

fn options() -> MigrateOptions {
    MigrateOptions::try_from(&v1::MigrateInstanceRequest::default()).unwrap()
}

fn to(node: &str) -> MigrateOptions {
    MigrateOptions { target: Some(node.parse().unwrap()), ..options() }
}

async fn begin(
    server: &Server,
    id: &InstanceId,
    options: &MigrateOptions,
) -> Result<String, hv_cluster::Error> {
    let done = server.cluster.migrate_instance(&Mutation::once("migrate"), id, options).await?;
    Ok(done.reply.id)
}

async fn operation(server: &Server, id: &str) -> OperationRecord {
    OperationRecord::clone(&*server.cluster.operation(id).await.unwrap())
}

async fn ended(server: &Server, id: &str) -> OperationRecord {
    until("the move to end", async || Some(operation(server, id).await).filter(|o| o.state.is_final())).await
}

/// A server with two nodes, an instance that runs on the first, and the nodes' doubles.
struct Set {
    disk: Disk,
    server: Server,
    movers: Arc<Movers>,
    id: InstanceId,
    agents: JoinHandle<()>,
}

impl Set {
    async fn new() -> Self {
        Self::with(config("a"), asked("web")).await
    }

    async fn with(config: hv_cluster::ClusterConfig, record: InstanceRecord) -> Self {
        let disk = disk();
        let server = Server::start(&disk.store, config).await;
        let movers = Movers::new();
        server.cluster.set_nodes(movers.clone());
        server.add_node(mover("n1", 4)).await;
        let (id, _) = server.running(record).await;
        server.add_node(mover("n2", 4)).await;
        let agents = movers.agents(&server, &id);
        Self { disk, server, movers, id, agents }
    }

    async fn record(&self) -> Arc<InstanceRecord> {
        self.server.get(&self.id).await
    }

    async fn allocated(&self) -> (u32, u32) {
        self.server.cluster.sync().await.unwrap();
        let of = |id: &str| {
            let node: NodeId = id.parse().unwrap();
            self.server.cluster.cache().read(|state| state.node(&node).unwrap().allocated.cpu_cores)
        };
        (of("n1"), of("n2"))
    }

    /// It runs on the first node as if nothing had been asked, and nothing of it is left on the second.
    async fn is_as_before(&self) {
        let record = self.record().await;
        assert_eq!(record.node_id().map(NodeId::as_str), Some("n1"));
        assert_eq!((record.epoch.0, &record.migration, record.wanted), (1, &None, Wanted::Running));
        assert_eq!(self.allocated().await, (1, 0));
        let seen = self.movers.seen.lock();
        assert!(seen.source_runs() && !seen.target_runs && seen.incoming.is_none());
    }

    /// It runs on the second node.
    async fn is_moved(&self) {
        let record = self.record().await;
        assert_eq!(record.node_id().map(NodeId::as_str), Some("n2"));
        assert_eq!((record.epoch.0, &record.migration, record.state), (2, &None, InstanceState::Running));
        assert_eq!(self.allocated().await, (0, 1));
        let seen = self.movers.seen.lock();
        assert!(!seen.source_runs() && seen.target_runs);
        assert_eq!((seen.count(Call::AbortSource), seen.count(Call::AbortTarget)), (0, 0));
    }

    /// What is said to a report once it is heard: the double of the agent may report at the same moment, and a node is
    /// heard one call at a time.
    async fn heard(&self, node: &NodeId, report: Report) -> Verdict {
        let heard = async || match self.server.report_one(node, report.clone()).await {
            Verdict::Retry => None,
            verdict => Some(verdict),
        };
        until("the report to be heard", heard).await
    }

    async fn until_call(&self, call: Call) {
        until("a call to a node", async || (self.movers.seen.lock().count(call) > 0).then_some(())).await;
    }

    /// Moves with a node that fails so; the operation as it ended.
    async fn fails(&self) -> OperationRecord {
        let operation = begin(&self.server, &self.id, &options()).await.unwrap();
        ended(&self.server, &operation).await
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        self.agents.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_instance_moves_and_takes_room_on_both_nodes_meanwhile() {
    let set = Set::new().await;
    *set.movers.polls.lock() = u32::MAX;
    let operation = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::Begin).await;
    assert_eq!(set.allocated().await, (1, 1));
    let shown = convert::instance_to(&*set.record().await);
    assert_eq!(shown.migration_target, "n2");
    for request in [Request::Start, Request::Stop, Request::Restart, Request::Pause, Request::Resume] {
        let refused = set.server.change(&set.id, request).await.unwrap_err();
        assert!(refused.to_string().contains("being moved to node n2"), "{refused}");
        assert_eq!(refused.code(), ErrorCode::FailedPrecondition);
    }
    let again = begin(&set.server, &set.id, &options()).await;
    assert_eq!(code(again), ErrorCode::FailedPrecondition);
    // There is room for three more on the second node, and not for four.
    let big = |name: &str, cores| {
        let mut record = asked(name);
        Arc::make_mut(&mut record.spec).cpu_cores = cores;
        record.placement = Arc::default();
        record
    };
    let waiting = set.server.create(big("four", 4)).await.unwrap();
    assert_eq!(waiting.state(), v1::InstanceState::Pending);
    *set.movers.polls.lock() = 0;
    let done = ended(&set.server, &operation).await;
    assert_eq!(done.state, OperationState::Succeeded, "{}", done.message);
    assert!(done.message.contains("stood still for 1.5 ms"), "{}", done.message);
    // What it took on the first node is free for another again.
    let id: InstanceId = waiting.id.parse().unwrap();
    assert_eq!(set.server.bound(&id).await.as_str(), "n1");
    set.server.cluster.sync().await.unwrap();
    assert_eq!(set.allocated().await, (4, 1));
    let seen = set.movers.seen.lock();
    assert!(!seen.source_runs() && seen.target_runs);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_before_the_commit_leaves_it_running_where_it_was() {
    type Break = fn(&Movers);
    let cases: [(&str, Break); 5] = [
        ("Prepare is refused", |m| m.fault(Call::Prepare, Fault::Refused)),
        ("Begin is refused", |m| m.fault(Call::Begin, Fault::Refused)),
        ("the wire broke", |m| *m.source_fails.lock() = true),
        ("does not hold what was sent", |m| *m.target_dies.lock() = true),
        ("AskTarget is refused", |m| m.fault(Call::AskTarget, Fault::Refused)),
    ];
    for (expected, fault) in cases {
        let set = Set::new().await;
        fault(&set.movers);
        let operation = set.fails().await;
        assert_eq!(operation.state, OperationState::Failed, "{expected}");
        assert!(operation.message.contains(expected), "{expected}: {}", operation.message);
        set.is_as_before().await;
        // And it can be tried again.
        set.movers.heal();
        (*set.movers.source_fails.lock(), *set.movers.target_dies.lock()) = (false, false);
        assert_eq!(set.fails().await.state, OperationState::Succeeded, "{expected}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_and_answers_that_are_lost_are_asked_again() {
    for call in [Call::Prepare, Call::Begin, Call::AskSource, Call::AskTarget] {
        for fault in [Fault::Lost(2), Fault::Unanswered(2)] {
            let set = Set::new().await;
            set.movers.fault(call, fault);
            let operation = set.fails().await;
            assert_eq!(
                operation.state,
                OperationState::Succeeded,
                "{call:?} {fault:?}: {}",
                operation.message
            );
            set.is_moved().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_is_repeated_until_the_source_has_heard_of_it() {
    for fault in [Fault::Lost(2), Fault::Unanswered(2)] {
        let set = Set::new().await;
        *set.movers.target_dies.lock() = true;
        set.movers.fault(Call::AbortSource, fault);
        assert_eq!(set.fails().await.state, OperationState::Failed);
        set.is_as_before().await;
        assert!(set.movers.seen.lock().count(Call::AbortSource) >= 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_move_leaves_it_where_it_was_in_every_phase() {
    for call in [Call::Prepare, Call::Begin, Call::AskSource, Call::AskTarget] {
        let set = Set::new().await;
        if call != Call::AskTarget {
            *set.movers.polls.lock() = u32::MAX;
        }
        if call != Call::AskSource {
            set.movers.fault(call, Fault::Lost(u32::MAX));
        }
        let operation = begin(&set.server, &set.id, &to("n2")).await.unwrap();
        set.until_call(call).await;
        set.server.cluster.cancel_operation(&Mutation::once("cancel"), &operation).await.unwrap();
        let done = ended(&set.server, &operation).await;
        assert_eq!(done.state, OperationState::Cancelled, "{call:?}: {}", done.message);
        set.is_as_before().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_leader_goes_on_wherever_the_last_one_died() {
    for call in [Call::Prepare, Call::Begin, Call::AskSource, Call::AskTarget] {
        let mut set = Set::new().await;
        if call == Call::AskSource {
            *set.movers.polls.lock() = u32::MAX;
        } else {
            set.movers.fault(call, Fault::Unanswered(u32::MAX));
        }
        let operation = begin(&set.server, &set.id, &options()).await.unwrap();
        set.until_call(call).await;
        set.agents.abort();
        let next = Server::start(&set.disk.store, config("b")).await;
        next.cluster.set_nodes(set.movers.clone());
        std::mem::replace(&mut set.server, next).kill().await;
        set.agents = set.movers.agents(&set.server, &set.id);
        set.movers.heal();
        *set.movers.polls.lock() = 2;
        let done = ended(&set.server, &operation).await;
        assert_eq!(done.state, OperationState::Succeeded, "{call:?}: {}", done.message);
        set.is_moved().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_leader_finishes_an_abort() {
    let mut set = Set::new().await;
    *set.movers.target_dies.lock() = true;
    set.movers.fault(Call::AbortSource, Fault::Lost(u32::MAX));
    let operation = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::AbortSource).await;
    let next = Server::start(&set.disk.store, config("b")).await;
    next.cluster.set_nodes(set.movers.clone());
    std::mem::replace(&mut set.server, next).kill().await;
    // Everything would be well again; it was decided otherwise.
    *set.movers.target_dies.lock() = false;
    set.movers.heal();
    assert_eq!(ended(&set.server, &operation).await.state, OperationState::Failed);
    set.is_as_before().await;
}

/// A set whose leader's transactions can be held up.
async fn gated() -> (Set, Arc<Mute>) {
    let disk = disk();
    let mute = Mute::over(&disk.store);
    let store: hv_store::SharedStore = mute.clone();
    let server = Server::start(&store, config("a")).await;
    let movers = Movers::new();
    server.cluster.set_nodes(movers.clone());
    server.add_node(mover("n1", 4)).await;
    let (id, _) = server.running(asked("web")).await;
    server.add_node(mover("n2", 4)).await;
    let agents = movers.agents(&server, &id);
    (Set { disk, server, movers, id, agents }, mute)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_that_comes_before_a_commit_on_its_way_wins() {
    let (set, mute) = gated().await;
    set.movers.fault(Call::AskTarget, Fault::Lost(u32::MAX));
    let operation = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::AskTarget).await;
    let gate = mute.leader_gate.write().await;
    let before = mute.leader_waits.load(std::sync::atomic::Ordering::SeqCst);
    set.movers.heal();
    until("the commit to be on its way", async || {
        (mute.leader_waits.load(std::sync::atomic::Ordering::SeqCst) > before).then_some(())
    })
    .await;
    set.server.cluster.cancel_operation(&Mutation::once("cancel"), &operation).await.unwrap();
    drop(gate);
    assert_eq!(ended(&set.server, &operation).await.state, OperationState::Cancelled);
    set.is_as_before().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deposed_leader_neither_commits_nor_aborts() {
    for dies in [false, true] {
        let (mut set, mute) = gated().await;
        set.movers.fault(Call::AskTarget, Fault::Lost(u32::MAX));
        let operation = begin(&set.server, &set.id, &options()).await.unwrap();
        set.until_call(Call::AskTarget).await;
        let gate = mute.leader_gate.write().await;
        let before = mute.leader_waits.load(std::sync::atomic::Ordering::SeqCst);
        // The old leader is about to write one of the two, and the new one does the other.
        *set.movers.target_dies.lock() = dies;
        set.movers.heal();
        until("the old leader's decision", async || {
            (mute.leader_waits.load(std::sync::atomic::Ordering::SeqCst) > before).then_some(())
        })
        .await;
        let leader = hv_store::Op::delete(set.server.cluster.keys().leader("scheduler"));
        let deposed = hv_store::Txn { then: vec![leader], ..hv_store::Txn::default() };
        set.disk.store.txn(deposed).await.unwrap();
        *set.movers.target_dies.lock() = !dies;
        let next = Server::start(&set.disk.store, config("b")).await;
        next.cluster.set_nodes(set.movers.clone());
        set.agents.abort();
        let old = std::mem::replace(&mut set.server, next);
        set.agents = set.movers.agents(&set.server, &set.id);
        let done = ended(&set.server, &operation).await;
        drop(gate);
        let expected = if dies { OperationState::Succeeded } else { OperationState::Failed };
        assert_eq!(done.state, expected, "{}", done.message);
        old.stop().await;
        if dies { set.is_moved().await } else { set.is_as_before().await }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_is_lost_is_made_once() {
    let (set, mute) = gated().await;
    set.movers.fault(Call::AskTarget, Fault::Lost(u32::MAX));
    let operation = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::AskTarget).await;
    let gate = mute.leader_gate.write().await;
    let before = mute.leader_waits.load(std::sync::atomic::Ordering::SeqCst);
    set.movers.heal();
    until("the commit to be on its way", async || {
        (mute.leader_waits.load(std::sync::atomic::Ordering::SeqCst) > before).then_some(())
    })
    .await;
    mute.lose_next.store(true, std::sync::atomic::Ordering::SeqCst);
    drop(gate);
    assert_eq!(ended(&set.server, &operation).await.state, OperationState::Succeeded);
    set.is_moved().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_moved_is_refused_with_its_reason() {
    let set = Set::new().await;
    let reason = async |options: &MigrateOptions| begin(&set.server, &set.id, options).await.unwrap_err();
    assert_eq!(reason(&to("n9")).await.code(), ErrorCode::NotFound);
    assert!(reason(&to("n1")).await.to_string().contains("it is on node host-n1 already"));
    let plain = set.server.add_node(v1::RegisterNodeRequest { drivers: vec![], ..mover("n3", 4) }).await;
    let refused = reason(&to(plain.as_str())).await.to_string();
    assert!(refused.contains("no healthy driver") && refused.contains("`migrate`"), "{refused}");
    set.server.change(&set.id, Request::Stop).await.unwrap();
    let refused = reason(&options()).await;
    assert!(refused.to_string().contains("only a running instance can"), "{refused}");
    // On a node whose driver cannot.
    let other = disk();
    let server = Server::start(&other.store, config("a")).await;
    server.add_node(node("n1", 4)).await;
    let (id, _) = server.running(asked("web")).await;
    assert_eq!(code(begin(&server, &id, &options()).await), ErrorCode::Unsupported);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_for_which_there_is_no_room_fails_and_says_so() {
    let set = Set::new().await;
    let full = |name: &str| {
        let mut record = asked(name);
        Arc::make_mut(&mut record.spec).cpu_cores = 4;
        record
    };
    set.server.running(full("big")).await;
    for options in [options(), to("n2")] {
        let operation = begin(&set.server, &set.id, &options).await.unwrap();
        let done = ended(&set.server, &operation).await;
        assert_eq!(done.state, OperationState::Failed);
        assert!(done.message.contains("cannot be moved"), "{}", done.message);
    }
    assert_eq!(set.record().await.migration, None);
    assert_eq!(set.movers.seen.lock().count(Call::Prepare), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_ends_the_move_first() {
    let set = Set::new().await;
    *set.movers.polls.lock() = u32::MAX;
    let operation = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::Begin).await;
    set.server.change(&set.id, Request::Delete).await.unwrap();
    let done = ended(&set.server, &operation).await;
    assert_eq!(done.state, OperationState::Cancelled, "{}", done.message);
    assert!(set.movers.seen.lock().incoming.is_none());
    let record = set.record().await;
    assert_eq!((record.wanted, &record.migration), (Wanted::Deleted, &None));
    assert_eq!(set.heard(&"n1".parse().unwrap(), gone(&record)).await, Verdict::Accepted);
    assert_eq!(set.allocated().await, (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_whose_record_is_gone_leaves_nothing_at_the_target() {
    let set = Set::new().await;
    *set.movers.polls.lock() = u32::MAX;
    let operation = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::Begin).await;
    // The record goes before the leader has ended the move.
    set.movers.fault(Call::AbortSource, Fault::Lost(u32::MAX));
    set.server.change(&set.id, Request::Delete).await.unwrap();
    let record = set.record().await;
    assert_eq!(set.heard(&"n1".parse().unwrap(), gone(&record)).await, Verdict::Accepted);
    assert_eq!(ended(&set.server, &operation).await.state, OperationState::Cancelled);
    assert!(set.movers.seen.lock().incoming.is_none());
    assert_eq!(set.allocated().await, (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_drained_or_removed_ends_the_move() {
    for removed in [false, true] {
        let set = Set::new().await;
        *set.movers.polls.lock() = u32::MAX;
        let operation = begin(&set.server, &set.id, &options()).await.unwrap();
        set.until_call(Call::Begin).await;
        let target: NodeId = "n2".parse().unwrap();
        if removed {
            let once = Mutation::once("remove");
            set.server.cluster.deregister_node(&once, &target, false).await.unwrap();
        } else {
            set.server.drain(&target).await;
        }
        let done = ended(&set.server, &operation).await;
        assert_eq!(done.state, OperationState::Failed);
        let expected = if removed { "was removed" } else { "is being drained" };
        assert!(done.message.contains(expected), "{}", done.message);
        assert_eq!(set.record().await.migration, None);
        assert!(set.movers.seen.lock().source_runs());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_of_the_source_lets_a_move_finish() {
    let set = Set::new().await;
    *set.movers.polls.lock() = u32::MAX;
    let operation = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::Begin).await;
    let source: NodeId = "n1".parse().unwrap();
    set.server.drain(&source).await;
    *set.movers.polls.lock() = 0;
    let done = ended(&set.server, &operation).await;
    assert_eq!(done.state, OperationState::Succeeded, "{}", done.message);
    set.is_moved().await;
    until("the drain to end", async || {
        let node = set.server.cluster.node(&source).await.unwrap().0;
        (node.schedulability == Schedulability::Cordoned).then_some(())
    })
    .await;
}

fn waits(record: &InstanceRecord, migration: &str) -> Report {
    Report { migration: migration.to_owned(), ..report(record, InstanceState::Paused) }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_at_a_target_is_released_once_its_move_is_over_and_not_before() {
    let set = Set::new().await;
    *set.movers.polls.lock() = u32::MAX;
    let target: NodeId = "n2".parse().unwrap();
    let operation = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::Begin).await;
    let before = set.record().await;
    let incoming = waits(&before, &operation);
    assert_eq!(set.heard(&target, incoming.clone()).await, Verdict::Accepted);
    assert_eq!(set.heard(&target, waits(&before, "another")).await, Verdict::Release);
    // The target does not hear of the abort, and is told when it reports.
    set.movers.fault(Call::AbortTarget, Fault::Lost(u32::MAX));
    set.server.cluster.cancel_operation(&Mutation::once("cancel"), &operation).await.unwrap();
    ended(&set.server, &operation).await;
    assert_eq!(set.heard(&target, incoming).await, Verdict::Release);
    // After a move that succeeded it is the target's, however late it says that it waits.
    set.movers.heal();
    *set.movers.polls.lock() = 0;
    let incoming = waits(&before, &begin(&set.server, &set.id, &options()).await.unwrap());
    until("it to be moved", async || (set.record().await.epoch.0 == 2).then_some(())).await;
    assert_eq!(set.heard(&target, incoming).await, Verdict::Accepted);
    let source: NodeId = "n1".parse().unwrap();
    assert_eq!(set.heard(&source, report(&before, InstanceState::Running)).await, Verdict::Release);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_was_committed_cannot_be_cancelled() {
    let mut set = Set::new().await;
    // Nobody lets it go on at the target for a while.
    set.agents.abort();
    let operation = begin(&set.server, &set.id, &options()).await.unwrap();
    until("the commit", async || (set.record().await.epoch.0 == 2).then_some(())).await;
    let once = Mutation::once("cancel");
    let refused = set.server.cluster.cancel_operation(&once, &operation).await.unwrap_err();
    assert!(refused.to_string().contains("cannot be cancelled any more"), "{refused}");
    assert_eq!(set.record().await.state, InstanceState::Starting);
    set.agents = set.movers.agents(&set.server, &set.id);
    assert_eq!(ended(&set.server, &operation).await.state, OperationState::Succeeded);
    set.is_moved().await;
}

fn quick() -> hv_cluster::ClusterConfig {
    hv_cluster::ClusterConfig {
        heartbeat_timeout: Duration::from_secs(1),
        failover_grace: Duration::from_millis(400),
        ..config("a")
    }
}

fn beats(server: &Server, id: &str) -> JoinHandle<()> {
    let (cluster, id) = (server.cluster.clone(), id.parse::<NodeId>().unwrap());
    tokio::spawn(async move {
        loop {
            let _ = cluster.heartbeat(None, &id, hv_cluster::nodes::Sign::default()).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_dies_in_the_middle_is_failed_over_and_the_move_ends() {
    let record = InstanceRecord { failover_policy: FailoverPolicy::Restart, ..asked("web") };
    let set = Set::with(quick(), record).await;
    let (_n1, n2) = (beats(&set.server, "n1"), beats(&set.server, "n2"));
    *set.movers.polls.lock() = u32::MAX;
    let operation = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::Begin).await;
    // It answers nothing any more.
    for call in [Call::AskSource, Call::AbortSource] {
        set.movers.fault(call, Fault::Lost(u32::MAX));
    }
    _n1.abort();
    let done = ended(&set.server, &operation).await;
    assert_eq!(done.state, OperationState::Failed);
    assert!(done.message.contains("does not answer"), "{}", done.message);
    let record = until("it to be started afresh", async || {
        Some(set.record().await).filter(|record| record.epoch.0 == 2)
    })
    .await;
    // As an instance like any other: what may wait there of the move is not taken up.
    assert_eq!((record.node_id().map(NodeId::as_str), &record.migration), (Some("n2"), &None));
    assert_eq!(convert::assignment_to(&record).migration_id, "");
    n2.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_cut_off_is_waited_for_and_said_so() {
    let set = Set::with(quick(), asked("web")).await;
    let (n1, n2) = (beats(&set.server, "n1"), beats(&set.server, "n2"));
    set.movers.fault(Call::AskTarget, Fault::Lost(u32::MAX));
    let operation_id = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::AskTarget).await;
    n1.abort();
    set.movers.fault(Call::AbortSource, Fault::Lost(u32::MAX));
    let waiting = until("the reason to be seen", async || {
        let operation = operation(&set.server, &operation_id).await;
        operation.message.contains("waits for node host-n1").then_some(operation)
    })
    .await;
    assert_eq!((waiting.phase.as_str(), waiting.state), ("aborting", OperationState::Running));
    assert!(!set.movers.seen.lock().source_runs(), "it stands still until its node hears of the abort");
    set.movers.heal();
    assert_eq!(ended(&set.server, &operation_id).await.state, OperationState::Failed);
    set.is_as_before().await;
    n2.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_dies_before_the_commit_is_not_waited_for() {
    let set = Set::with(quick(), asked("web")).await;
    let (n1, n2) = (beats(&set.server, "n1"), beats(&set.server, "n2"));
    *set.movers.polls.lock() = u32::MAX;
    let operation = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::Begin).await;
    set.movers.fault(Call::AbortTarget, Fault::Lost(u32::MAX));
    n2.abort();
    let done = ended(&set.server, &operation).await;
    assert!(done.message.contains("it was to go to, does not answer"), "{}", done.message);
    assert_eq!(set.record().await.migration, None);
    assert!(set.movers.seen.lock().source_runs());
    n1.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_dies_after_the_commit_keeps_what_it_holds() {
    let mut set = Set::with(quick(), asked("web")).await;
    set.agents.abort();
    let (n1, n2) = (beats(&set.server, "n1"), beats(&set.server, "n2"));
    let operation_id = begin(&set.server, &set.id, &options()).await.unwrap();
    until("the commit", async || (set.record().await.epoch.0 == 2).then_some(())).await;
    n2.abort();
    let target: NodeId = "n2".parse().unwrap();
    until("the target to be lost", async || {
        let live = set.server.cluster.cache().read(|state| state.node(&target).unwrap().is_live());
        (!live).then_some(())
    })
    .await;
    // It is waited for, as it alone has the instance: its assignment still says what it is to take up.
    let record = set.record().await;
    assert_eq!(convert::assignment_to(&record).migration_id, operation_id);
    assert!(!operation(&set.server, &operation_id).await.state.is_final());
    let n2 = beats(&set.server, "n2");
    set.server.add_node(mover("n2", 4)).await;
    set.agents = set.movers.agents(&set.server, &set.id);
    assert_eq!(ended(&set.server, &operation_id).await.state, OperationState::Succeeded);
    set.is_moved().await;
    n1.abort();
    n2.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_deletion_ends_a_move_whose_source_is_lost() {
    let set = Set::with(quick(), asked("web")).await;
    let (n1, n2) = (beats(&set.server, "n1"), beats(&set.server, "n2"));
    *set.movers.polls.lock() = u32::MAX;
    let operation_id = begin(&set.server, &set.id, &options()).await.unwrap();
    set.until_call(Call::Begin).await;
    set.movers.fault(Call::AbortSource, Fault::Lost(u32::MAX));
    n1.abort();
    set.until_call(Call::AbortSource).await;
    let force = StopOptions { force: true, ..StopOptions::default() };
    let once = Mutation::once("delete");
    set.server.cluster.change_instance(&once, &set.id, Request::Delete, force).await.unwrap();
    assert_eq!(ended(&set.server, &operation_id).await.state, OperationState::Failed);
    assert_eq!(set.allocated().await, (0, 0));
    n2.abort();
}
