//! The members in detail, and their defragmentation one after the other.

use std::time::Duration;

use etcd_client::{AlarmAction, AlarmMember, AlarmOptions, AlarmType, StatusResponse};
use futures::future::join_all;
use tokio::time::{Instant, sleep, timeout};

use super::error::store_error;
use super::health;
use super::members::Members;
use super::quota::{self, Quota};
use super::wire::from_etcd;
use crate::{DefragmentStep, MemberStatus, OnDefragment, Result, Revision, StoreError, StoreStatus};

/// How long a question to one member may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long to wait for etcd to say which revisions are compacted: it says nothing if none are.
const COMPACTED_PATIENCE: Duration = Duration::from_millis(300);
/// How long a member may take to defragment itself: about 10 s for each GiB on a slow disk, at etcd's largest quota.
const DEFRAGMENT_TIMEOUT: Duration = Duration::from_secs(300);
/// How long it may take to answer and to catch up afterwards.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(60);
/// How often it is asked meanwhile.
const RECOVERY_POLL: Duration = Duration::from_millis(100);

pub(super) async fn status(members: &Members, quota: &Quota) -> Result<StoreStatus> {
    let health = health::health(members).await?;
    quota::observe(members, quota).await;
    let alarms = alarms(members).await.unwrap_or_default();
    let asked = join_all((0..members.len()).map(|index| health::status(members, index))).await;
    let described: Vec<_> = asked
        .into_iter()
        .enumerate()
        .map(|(index, status)| describe(members.endpoint(index), status, &alarms))
        .collect();
    let oldest = timeout(COMPACTED_PATIENCE, super::watch::oldest(members, Revision(0))).await;
    let mut warnings = health.warnings;
    warnings.extend(quota.warning());
    Ok(StoreStatus {
        backend: health.backend,
        revision: health.revision,
        oldest: oldest.ok().filter(|oldest| oldest.0 > 1),
        size_bytes: described.iter().map(|member| member.size_bytes).max().unwrap_or(0),
        used_bytes: described.iter().map(|member| member.used_bytes).max().unwrap_or(0),
        quota_bytes: Some(quota.bytes()),
        is_full: quota.is_refusing() || alarms.iter().any(|alarm| alarm.alarm() == AlarmType::Nospace),
        members: described,
        warnings,
    })
}

fn describe(endpoint: &str, status: Option<StatusResponse>, alarms: &[AlarmMember]) -> MemberStatus {
    let endpoint = endpoint.to_owned();
    let Some(status) = status else {
        let error = Some(format!("it did not answer within {} s", PATIENCE.as_secs()));
        return MemberStatus { endpoint, error, ..MemberStatus::default() };
    };
    let id = id_of(&status);
    let raised = alarms.iter().filter(|alarm| alarm.member_id() == id);
    MemberStatus {
        endpoint,
        id: format!("{id:x}"),
        version: status.version().to_owned(),
        is_leader: id == status.leader(),
        size_bytes: from_etcd(status.db_size()),
        used_bytes: from_etcd(status.raft_used_db_size()),
        raft_index: status.raft_index(),
        raft_applied: status.raft_applied_index(),
        alarms: raised.map(|alarm| format!("{:?}", alarm.alarm()).to_uppercase()).collect(),
        error: (!status.errors().is_empty()).then(|| status.errors().join("; ")),
    }
}

fn id_of(status: &StatusResponse) -> u64 {
    status.header().map_or(0, etcd_client::ResponseHeader::member_id)
}

async fn alarms(members: &Members) -> Result<Vec<AlarmMember>> {
    let asked = members.call(super::members::Repeat::Always, |mut member| async move {
        member.maintenance.alarm(AlarmAction::Get, AlarmType::None, None).await
    });
    Ok(asked.await?.alarms().to_vec())
}

/// See [`crate::Store::defragment`].
pub(super) async fn defragment(members: &Members, quota: &Quota, on_step: OnDefragment<'_>) -> Result<()> {
    let total = members.len();
    let mut order = Vec::new();
    for index in 0..total {
        let status = health::status(members, index).await.ok_or_else(|| silent(members, index))?;
        order.push((id_of(&status) == status.leader(), index));
    }
    // Followers first: the cluster keeps its leader as long as possible.
    order.sort_unstable();
    for (done, (is_leader, index)) in order.into_iter().enumerate() {
        let endpoint = members.endpoint(index);
        let role = if is_leader { "the leader" } else { "a follower" };
        on_step(DefragmentStep { message: format!("defragmenting {endpoint}, {role}"), done, total });
        let before = health::status(members, index).await.ok_or_else(|| silent(members, index))?;
        one_member(members, index).await?;
        let after = recovered(members, index, before.raft_applied_index()).await?;
        let mib = |bytes: i64| from_etcd(bytes) >> 20;
        let message =
            format!("{endpoint} went from {} to {} MiB", mib(before.db_size()), mib(after.db_size()));
        on_step(DefragmentStep { message, done: done + 1, total });
    }
    quota::observe(members, quota).await;
    disarm(members, quota).await
}

async fn one_member(members: &Members, index: usize) -> Result<()> {
    let call = async { members.member(index).await?.maintenance.defragment().await };
    match timeout(DEFRAGMENT_TIMEOUT, call).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(store_error(error, members.endpoint(index))),
        Err(_) => Err(StoreError::Timeout {
            endpoint: members.endpoint(index).to_owned(),
            timeout_ms: u64::try_from(DEFRAGMENT_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
        }),
    }
}

/// Waits until a member answers without complaint, knows a leader, and has applied at least what it had before.
async fn recovered(members: &Members, index: usize, applied: u64) -> Result<StatusResponse> {
    let deadline = Instant::now() + RECOVERY_TIMEOUT;
    while Instant::now() < deadline {
        if let Some(status) = health::status(members, index).await
            && status.leader() != 0
            && status.raft_applied_index() >= applied
            // What an alarm says of the file is what this is about; it is cleared at the end.
            && status.errors().iter().all(|error| error.contains("NOSPACE"))
        {
            return Ok(status);
        }
        sleep(RECOVERY_POLL).await;
    }
    Err(silent(members, index))
}

/// Clears the alarm of a quota that is used up no more.
async fn disarm(members: &Members, quota: &Quota) -> Result<()> {
    if quota.is_refusing() {
        return Ok(());
    }
    for alarm in alarms(members).await? {
        if alarm.alarm() != AlarmType::Nospace {
            continue;
        }
        let member_id = alarm.member_id();
        let cleared = members.call(super::members::Repeat::Always, |mut member| async move {
            let mut options = AlarmOptions::new();
            options.with_member(member_id);
            member.maintenance.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(options)).await
        });
        cleared.await?;
        tracing::info!(member = format!("{member_id:x}"), "cleared etcd's alarm: it has room again");
    }
    Ok(())
}

fn silent(members: &Members, index: usize) -> StoreError {
    StoreError::Unavailable {
        endpoint: members.endpoint(index).to_owned(),
        source: "the member does not answer as a healthy one does".into(),
    }
}
