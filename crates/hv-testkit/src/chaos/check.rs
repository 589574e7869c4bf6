//! Holding what was acknowledged against what is.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::future::join_all;
use hv_client::Clients;
use hv_proto::v1;
use tokio::time::Instant;
use tonic::Code;

use super::load::{Book, Record};
use super::truth::{Truth, Violation};
use super::world::World;
use crate::instances::create_request;

/// How long everything may take to settle after all faults are mended.
const SETTLED: Duration = Duration::from_secs(60);
/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(250);

/// What came of a run.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Instances that were acknowledged.
    pub instances: usize,
    /// Calls that were answered.
    pub calls: usize,
    /// What must not happen and did; empty if all is well.
    pub violations: Vec<Violation>,
}

/// Checks a world in which everything has been mended.
///
/// # Errors
/// It cannot be told: a server does not answer, a file cannot be read.
pub async fn check(world: &World, book: Book) -> Result<Verdict> {
    let clients = world.clients()?;
    let truth = world.truth();
    let mut violations = book.violations;
    violations.extend(until_settled(&clients, &truth, &book.records).await?);
    violations.extend(truth.overlaps()?);
    let most = truth.most_at_once()?;
    let too_many = most.iter().enumerate().filter(|(_, most)| **most > world.options.cores as usize);
    violations.extend(too_many.map(|(node, most)| format!("node {node} ran {most} instances at once")));
    violations.extend(keys_answer_as_before(&clients, &book.records).await?);
    Ok(Verdict { instances: book.records.len(), calls: book.answered.len(), violations })
}

/// Waits until every instance is as was acknowledged; what is not so in the end.
async fn until_settled(clients: &[Clients], truth: &Truth, records: &[Record]) -> Result<Vec<Violation>> {
    let deadline = Instant::now() + SETTLED;
    loop {
        let mut wrong = Vec::new();
        // Every server must tell the same.
        for (server, client) in clients.iter().enumerate() {
            match all_instances(client).await {
                Ok(seen) => {
                    let found = differences(truth, records, seen)?;
                    wrong.extend(found.into_iter().map(|what| format!("server {server}: {what}")));
                }
                Err(error) => wrong.push(format!("server {server} does not list: {error:#}")),
            }
        }
        if wrong.is_empty() || Instant::now() > deadline {
            return Ok(wrong);
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn all_instances(client: &Clients) -> Result<BTreeMap<String, v1::Instance>> {
    let mut request = v1::ListInstancesRequest { page_size: 1000, ..v1::ListInstancesRequest::default() };
    let mut seen = BTreeMap::new();
    loop {
        let page = client.compute().list_instances(request.clone()).await?.into_inner();
        seen.extend(page.instances.into_iter().map(|instance| (instance.id.clone(), instance)));
        if page.next_page_token.is_empty() {
            return Ok(seen);
        }
        request.page_token = page.next_page_token;
    }
}

fn differences(
    truth: &Truth,
    records: &[Record],
    mut seen: BTreeMap<String, v1::Instance>,
) -> Result<Vec<Violation>> {
    let mut wrong = Vec::new();
    for record in records {
        let instance = seen.remove(&record.id);
        let runs_on = truth.runs_on(&record.id)?;
        let name = &record.name;
        let told = instance.as_ref().map(|i| {
            format!(
                "{} ({}), generation {} of {}",
                i.state().as_str_name(),
                i.state_reason,
                i.observed_generation,
                i.generation
            )
        });
        let as_wanted = match (record.wanted, &instance) {
            (v1::InstanceWanted::Deleted, None) => runs_on.is_empty(),
            (v1::InstanceWanted::Running, Some(i)) => {
                i.state() == v1::InstanceState::Running && is_done(i) && runs_on.len() == 1
            }
            (v1::InstanceWanted::Stopped, Some(i)) => {
                i.state() == v1::InstanceState::Stopped && is_done(i) && runs_on.is_empty()
            }
            _ => false,
        };
        if !as_wanted {
            let told = told.unwrap_or_else(|| "does not exist".into());
            wrong.push(format!(
                "{name} is to be {:?}: it is {told} and runs on nodes {runs_on:?}",
                record.wanted
            ));
        }
    }
    // What nobody was told of was made twice for one key.
    wrong.extend(
        seen.into_values().map(|i| format!("{} {} exists though it was never acknowledged", i.name, i.id)),
    );
    Ok(wrong)
}

fn is_done(instance: &v1::Instance) -> bool {
    instance.observed_generation >= instance.generation
}

/// Asks for every create once more, with its key: the answer must name the same instance.
async fn keys_answer_as_before(clients: &[Clients], records: &[Record]) -> Result<Vec<Violation>> {
    let client = clients.first().context("there is no server")?.compute();
    let asked = records.iter().map(|record| {
        let mut client = client.clone();
        let policy = if record.failover { v1::FailoverPolicy::Restart } else { v1::FailoverPolicy::Never };
        let request = v1::CreateInstanceRequest {
            request_key: record.create_key.clone(),
            failover_policy: policy.into(),
            ..create_request(&record.name)
        };
        async move {
            match client.create_instance(request).await {
                Ok(answer) if answer.get_ref().id == record.id => None,
                Ok(answer) => {
                    Some(format!("{} came to a second instance {}", record.create_key, answer.get_ref().id))
                }
                Err(status) if status.code() == Code::Unavailable => None,
                Err(status) => Some(format!("{} is not remembered: {status}", record.create_key)),
            }
        }
    });
    Ok(join_all(asked).await.into_iter().flatten().collect())
}
