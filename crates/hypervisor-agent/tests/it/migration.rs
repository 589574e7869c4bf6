//! What an agent does of a hand-over, on either side of it.

use std::time::Duration;

use hv_driver_fake::LedgerEvent;
use hv_proto::v1::{self, InstanceState, MigrationPhase};
use tonic::Code;

use crate::control::{Control, assignment, scripted};
use crate::node::{Node, eventually};

const M: &str = "0190-m";

/// Two nodes, of which the first runs the instance `a`.
struct Pair {
    source: Node,
    target: Node,
    here: Control,
    there: Control,
    bound: v1::Assignment,
}

impl Pair {
    async fn new(bound: v1::Assignment) -> Self {
        let (here, there) = (Control::start().await, Control::start().await);
        let (source, target) = (Node::started(&here).await, Node::started(&there).await);
        // What waits at the target is not bound to it.
        there.state.lock().is_lenient = true;
        here.assign(bound.clone());
        here.settled("a", InstanceState::Running).await;
        Self { source, target, here, there, bound }
    }

    fn asked(migration: &str) -> v1::AgentMigrationRequest {
        v1::AgentMigrationRequest { instance_id: "a".into(), migration_id: migration.into() }
    }

    async fn prepare(&self, migration: &str) -> Result<Vec<u8>, tonic::Status> {
        let request = v1::AgentPrepareIncomingRequest {
            assignment: Some(self.bound.clone()),
            migration_id: migration.into(),
            copy_storage: false,
            driver: "fake".into(),
            ..v1::AgentPrepareIncomingRequest::default()
        };
        let answer = self.target.client().prepare_incoming(request).await?;
        Ok(answer.into_inner().target.to_vec())
    }

    async fn begin(&self, migration: &str, target: Vec<u8>) -> Result<(), tonic::Status> {
        let request = v1::AgentBeginMigrationRequest {
            instance_id: "a".into(),
            epoch: 1,
            migration_id: migration.into(),
            target: target.into(),
            downtime_limit_ms: 300,
            ..v1::AgentBeginMigrationRequest::default()
        };
        self.source.client().begin_migration(request).await.map(drop)
    }

    async fn phase(&self, node: &Node) -> MigrationPhase {
        let status = node.client().get_migration(Self::asked(M)).await.unwrap().into_inner();
        assert_eq!(status.driver, "fake");
        status.phase()
    }

    async fn until_handed_over(&self) {
        let wait = async {
            while self.phase(&self.source).await != MigrationPhase::HandedOver {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), wait).await.expect("it is handed over");
    }

    async fn handed_over(bound: v1::Assignment) -> Self {
        let pair = Self::new(bound).await;
        let target = pair.prepare(M).await.unwrap();
        pair.begin(M, target).await.unwrap();
        pair.until_handed_over().await;
        pair
    }

    fn runs(&self, node: &Node) -> usize {
        node.count("a", LedgerEvent::Started) - node.count("a", LedgerEvent::Ended)
    }

    fn bind_there(&self) {
        let next = v1::Assignment { epoch: 2, migration_id: M.into(), ..self.bound.clone() };
        self.there.assign(next);
    }
}

#[tokio::test]
async fn what_was_handed_over_goes_on_where_it_is_bound_to_and_only_then() {
    let pair = Pair::handed_over(assignment("a")).await;
    assert_eq!(pair.phase(&pair.target).await, MigrationPhase::HandedOver);
    assert_eq!((pair.runs(&pair.source), pair.runs(&pair.target)), (0, 0));
    pair.bind_there();
    let report = pair.there.settled("a", InstanceState::Running).await;
    assert_eq!((report.epoch, report.migration_id.as_str()), (2, ""));
    assert_eq!((pair.runs(&pair.source), pair.runs(&pair.target)), (0, 1));
    // It was taken up, not made.
    assert_eq!(pair.target.count("a", LedgerEvent::Started), 1);
    // A late word of the migration does nothing any more.
    pair.target.client().abort_migration(Pair::asked(M)).await.unwrap();
    assert_eq!(pair.runs(&pair.target), 1);
}

#[tokio::test]
async fn an_abort_after_the_hand_over_lets_it_go_on_at_the_source_and_is_final() {
    let pair = Pair::handed_over(assignment("a")).await;
    pair.source.client().abort_migration(Pair::asked(M)).await.unwrap();
    pair.target.client().abort_migration(Pair::asked(M)).await.unwrap();
    assert_eq!((pair.runs(&pair.source), pair.runs(&pair.target)), (1, 0));
    eventually("nothing is left there", || pair.target.driver_list_is_empty().then_some(())).await;
    // A request that was late on its way begins nothing anew.
    let late = pair.begin(M, b"{\"driver\":\"fake\",\"target\":{}}".to_vec()).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition, "{late}");
    // Another migration is another matter.
    let target = pair.prepare("0190-n").await.unwrap();
    pair.begin("0190-n", target).await.unwrap();
}

#[tokio::test]
async fn what_was_handed_over_is_not_started_by_an_agent_that_comes_back() {
    let mut pair = Pair::handed_over(scripted("a", &[])).await;
    pair.source.kill();
    pair.source.start().await;
    pair.here.settled("a", InstanceState::Running).await;
    assert_eq!(pair.phase(&pair.source).await, MigrationPhase::HandedOver);
    assert_eq!(pair.runs(&pair.source), 0);
    let restart = v1::AgentRestartInstanceRequest {
        instance_id: "a".into(),
        ..v1::AgentRestartInstanceRequest::default()
    };
    let refused = pair.source.client().restart_instance(restart).await.unwrap_err();
    assert!(refused.message().contains("is being moved to another node"), "{refused}");
    // The target's agent dies as well; what waits there is still what goes on.
    pair.target.kill();
    pair.target.start().await;
    pair.bind_there();
    pair.there.settled("a", InstanceState::Running).await;
    assert_eq!((pair.runs(&pair.source), pair.runs(&pair.target)), (0, 1));
}

#[tokio::test]
async fn what_waits_is_removed_once_the_control_plane_says_so() {
    let mut pair = Pair::new(assignment("a")).await;
    pair.prepare(M).await.unwrap();
    assert_eq!(pair.prepare(M).await.unwrap(), pair.prepare(M).await.unwrap(), "asked again it is the same");
    assert_eq!(pair.target.journalled().len(), 1);
    pair.there.state.lock().is_lenient = false;
    pair.target.kill();
    pair.target.start().await;
    // Its report says which migration it waits for, and is answered.
    eventually("it is gone", || pair.target.journalled().is_empty().then_some(())).await;
    let report = pair.there.last("a").unwrap();
    assert_eq!((report.migration_id.as_str(), report.epoch), (M, 1));
    assert_eq!(pair.runs(&pair.source), 1);
}

#[tokio::test]
async fn a_hand_over_of_another_binding_is_refused() {
    let pair = Pair::new(assignment("a")).await;
    let target = pair.prepare(M).await.unwrap();
    let request = v1::AgentBeginMigrationRequest {
        instance_id: "a".into(),
        epoch: 7,
        migration_id: M.into(),
        target: target.into(),
        ..v1::AgentBeginMigrationRequest::default()
    };
    assert!(pair.source.client().begin_migration(request).await.is_err());
    assert_eq!((pair.runs(&pair.source), pair.phase(&pair.source).await), (1, MigrationPhase::Unspecified));
    // And an instance that runs on a node is not prepared there.
    let request = v1::AgentPrepareIncomingRequest {
        assignment: Some(pair.bound.clone()),
        migration_id: M.into(),
        copy_storage: false,
        driver: "fake".into(),
        ..v1::AgentPrepareIncomingRequest::default()
    };
    let refused = pair.source.client().prepare_incoming(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
}
