//! How the cluster is doing.

use std::time::Duration;

use etcd_client::{AlarmAction, AlarmType, StatusResponse};
use futures::future::join_all;
use tokio::time::timeout;

use super::members::Members;
use super::wire::from_etcd;
use crate::{Health, Result, Revision, StoreError};

/// How long a member may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(2);

/// Versions that lose acknowledged writes when they are killed under load (etcd's issue 13766, fixed in 3.5.3).
const LOSING_WRITES: [&str; 3] = ["3.5.0", "3.5.1", "3.5.2"];

/// Asks all members at once. An error if none answers.
pub(super) async fn health(members: &Members) -> Result<Health> {
    let asked = join_all((0..members.len()).map(|index| status(members, index))).await;
    let mut warnings = Vec::new();
    let mut answered = Vec::new();
    for (index, status) in asked.into_iter().enumerate() {
        match status {
            Some(status) => answered.push((index, status)),
            None => warnings.push(format!("etcd member {} does not answer", members.endpoint(index))),
        }
    }
    let newest = answered.iter().max_by_key(|(_, status)| status.header().map(|header| header.revision()));
    let Some((index, newest)) = newest else {
        return Err(StoreError::Unavailable {
            endpoint: members.endpoints(),
            source: format!("no member answered within {PATIENCE:?}").into(),
        });
    };
    for (index, status) in &answered {
        let endpoint = members.endpoint(*index);
        warnings.extend(status.errors().iter().map(|error| format!("etcd member {endpoint}: {error}")));
        if LOSING_WRITES.contains(&status.version()) {
            warnings.push(format!(
                "etcd member {endpoint} is version {}, which loses acknowledged writes when it crashes: use 3.5.3 or later",
                status.version()
            ));
        }
        if status.leader() == 0 {
            warnings.push(format!("etcd member {endpoint} knows no leader"));
        }
    }
    warnings.extend(alarms(members, *index).await);
    warnings.sort();
    warnings.dedup();
    Ok(Health {
        backend: "etcd",
        version: newest.version().to_owned(),
        size_bytes: from_etcd(newest.db_size()),
        revision: Revision(newest.header().map_or(0, |header| from_etcd(header.revision()))),
        warnings,
    })
}

pub(super) async fn status(members: &Members, index: usize) -> Option<StatusResponse> {
    let asked = async { members.member(index).await?.maintenance.status().await };
    timeout(PATIENCE, asked).await.ok()?.ok()
}

/// Whether the preferred member leads.
pub(super) async fn is_leader(members: &Members) -> bool {
    let status = status(members, members.preferred()).await;
    status.is_some_and(|status| status.header().map(|header| header.member_id()) == Some(status.leader()))
}

async fn alarms(members: &Members, index: usize) -> Vec<String> {
    let asked = async {
        let mut member = members.member(index).await?;
        member.maintenance.alarm(AlarmAction::Get, AlarmType::None, None).await
    };
    match timeout(PATIENCE, asked).await {
        Ok(Ok(answer)) => answer
            .alarms()
            .iter()
            .map(|alarm| match alarm.alarm() {
                AlarmType::Nospace => {
                    "etcd has used up its quota: compact, defragment and disarm the alarm".to_owned()
                }
                AlarmType::Corrupt => "an etcd member's data is damaged: replace that member".to_owned(),
                AlarmType::None => "etcd raised an alarm that is not known here".to_owned(),
            })
            .collect(),
        Ok(Err(_)) | Err(_) => Vec::new(),
    }
}
